"""From what the DSL made of a kernel to a library that neither the DSL nor its runtime is needed for."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from cutlass.cute.runtime import find_runtime_libraries
from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

from ring_cute.launches import again_source

SHIM = """
/* What the DSL's runtime library has for reporting CUDA errors: compiled functions call it. Declared here, so that a
   compiler without the C library's headers will do. */
int snprintf(char *text, unsigned long size, const char *format, ...);
void CuteDSLRT_TVMFFISetRaisedCudaError(void (*raise)(const char *, const char **, int), int code) {
    char text[32];
    const char *parts[2] = {"CUDA error ", text};
    snprintf(text, sizeof text, "%d", code);
    if (raise) raise("RuntimeError", parts, 2);
}
"""


def link(compiled: Any, name: str, target: Path) -> None:
    """Writes a compiled kernel as a library that needs the CUDA runtime and tvm_ffi.

    Raises:
        FileNotFoundError: there is no C compiler, or no static runtime among the DSL's libraries.
        subprocess.CalledProcessError: it could not link.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler on the PATH (cc, gcc or clang), which links a compiled kernel")
    folders = {Path(library).parent for library in find_runtime_libraries(enable_tvm_ffi=False)}
    runtimes = [path for folder in sorted(folders) for path in folder.glob("libcuda_dialect_runtime_static.a")]
    if not runtimes:
        raise FileNotFoundError(f"no libcuda_dialect_runtime_static.a in {', '.join(map(str, folders))}")
    with tempfile.TemporaryDirectory() as folder:
        made, source = Path(folder, "kernel.o"), Path(folder, "shim.c")
        compiled.export_to_c(str(made), function_name=name)
        source.write_text(SHIM + again_source(name))
        headers = [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
        options = ["-shared", "-fPIC", "-O2", "-ffreestanding", *headers]
        subprocess.run([compiler, *options, "-o", target, made, source, runtimes[0]], check=True, capture_output=True)
