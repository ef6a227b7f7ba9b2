"""Compiles the forward; needs the DSL, but no GPU if CUTE_DSL_ARCH=sm_90a is set before it is imported."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import find_runtime_libraries, make_fake_stream

from ring_cute.hopper.backward import HopperBackward
from ring_cute.hopper.backward_ends import Finish, Prepare
from ring_cute.hopper.backward_settings import BackwardKind, EndsKind
from ring_cute.hopper.forward import HopperForward
from ring_cute.settings import ForwardKind

ADDRESSES, SIZES, STRIDES, COUNTS = 12, 4, 15, 7
BACKWARD_ADDRESSES, BACKWARD_SIZES, BACKWARD_STRIDES, BACKWARD_COUNTS = 15, 3, 16, 12

SHIM = """
#include <stdio.h>
/* What the DSL's runtime library has for reporting CUDA errors: compiled functions call it. */
void CuteDSLRT_TVMFFISetRaisedCudaError(void (*raise)(const char *, const char **, int), int code) {
    char text[32];
    const char *parts[2] = {"CUDA error ", text};
    snprintf(text, sizeof text, "%d", code);
    if (raise) raise("RuntimeError", parts, 2);
}
"""


def compile_forward(kind: ForwardKind, options: str = "--enable-tvm-ffi") -> Any:
    """The kernel for that kind: a callable that takes the numbers of `HopperForward.__call__` and a stream."""
    return cute.compile(
        HopperForward(kind),
        *(Int64(0) for _ in range(ADDRESSES)),
        Float32(0.0),
        *(Int32(0) for _ in range(SIZES)),
        *(Int64(0) for _ in range(STRIDES)),
        *(Int32(0) for _ in range(COUNTS)),
        make_fake_stream(),
        options=options,
    )


def compile_backward(kind: BackwardKind, options: str = "--enable-tvm-ffi") -> Any:
    """The kernel for that kind: a callable that takes the numbers of `HopperBackward.__call__` and a stream."""
    return cute.compile(
        HopperBackward(kind),
        *(Int64(0) for _ in range(BACKWARD_ADDRESSES)),
        Float32(0.0),
        Float32(0.0),
        *(Int32(0) for _ in range(BACKWARD_SIZES)),
        *(Int64(0) for _ in range(BACKWARD_STRIDES)),
        *(Int32(0) for _ in range(BACKWARD_COUNTS)),
        make_fake_stream(),
        options=options,
    )


def compile_ends(kind: EndsKind, options: str = "--enable-tvm-ffi") -> Any:
    """The kernel for that kind: a callable that takes the numbers of `Prepare.__call__` or `Finish.__call__`."""
    sizes = (Int32(0) for _ in range(3))
    if kind.step == "prepare":
        numbers = (Int64(0) for _ in range(7 + 11))
        return cute.compile(Prepare(kind), *numbers, *sizes, make_fake_stream(), options=options)
    strides = (Int64(0) for _ in range(3))
    numbers = (Int64(0), Int64(0), Float32(0.0))
    return cute.compile(Finish(kind), *numbers, *strides, *sizes, make_fake_stream(), options=options)


def compile_kind(kind: ForwardKind | BackwardKind | EndsKind) -> Any:
    """A kernel of any kind."""
    if isinstance(kind, BackwardKind):
        return compile_backward(kind)
    return compile_ends(kind) if isinstance(kind, EndsKind) else compile_forward(kind)


def link(compiled: Any, name: str, target: Path) -> None:
    """Writes a compiled kernel as a library that needs the CUDA runtime and tvm_ffi, but neither DSL nor its runtime.

    Raises:
        FileNotFoundError: there is no C compiler, or no static runtime among the DSL's libraries.
        subprocess.CalledProcessError: it could not link.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler on the PATH; linking a compiled kernel takes cc or gcc")
    folders = {Path(library).parent for library in find_runtime_libraries(enable_tvm_ffi=False)}
    runtimes = [path for folder in sorted(folders) for path in folder.glob("libcuda_dialect_runtime_static.a")]
    if not runtimes:
        raise FileNotFoundError(f"no libcuda_dialect_runtime_static.a in {', '.join(map(str, folders))}")
    with tempfile.TemporaryDirectory() as folder:
        made, source, library = (Path(folder, file) for file in ("kernel.o", "shim.c", "kernel.so"))
        compiled.export_to_c(str(made), function_name=name)
        source.write_text(SHIM)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", library, made, source, runtimes[0]],
            check=True,
            capture_output=True,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copyfile(library, partial)
        partial.replace(target)  # whole or not there, whoever else writes it
