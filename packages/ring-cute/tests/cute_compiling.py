"""Compiles the kernels for sm_90a without a GPU and holds what comes out to account.

    python cute_compiling.py [GROUP…]

No spills, all products on wgmma, the expected number of TMA instructions, shared memory within its limit. Prints a
table; exit status 1 if a check failed. The DSL reads its settings from the environment when it is imported, so this is
a process of its own. It needs a `cuobjdump`: on the PATH, in `CUOBJDUMP`, or that of nvidia-cuda-cuobjdump or triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ring_cute.library import Kind
from ring_cute.settings import SHARED_BYTES, ForwardKind, Settings, kind_for, settings_for


@dataclass(frozen=True)
class Compiled:
    """What a kernel became."""

    registers: int
    stack: int
    local: int
    hgmma: int
    loads: int
    stores: int
    spilled: int
    """Instructions that move registers to and from local memory."""
    seconds: float
    ptx: str
    sass: str


def cuobjdump() -> str:
    """The program that reads cubins.

    Raises:
        FileNotFoundError: there is none here.
    """
    found = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or []:
            program = Path(folder, inside, "cuobjdump")
            if not found and program.exists():
                found = str(program)
    if not found:
        raise FileNotFoundError("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def kind_of(
    head_dim: int,
    *,
    dtype: str = "bfloat16",
    state: bool = False,
    sinks: bool = False,
    flags: bool = False,
    softcap: bool = False,
    alibi: bool = False,
    settings: Settings | None = None,
    **changed: Any,
) -> ForwardKind:
    """The kind that `launch` would ask for."""
    asked = {"softcap": softcap, "alibi": alibi}
    chosen = replace(settings or settings_for(head_dim, **asked), **changed)
    return kind_for(dtype, head_dim, chosen, state=state, sinks=sinks, flags=flags, **asked)


def compiled_and_ptx(kind: Kind, cubin_to: Path | None = None) -> tuple[Any, str]:
    """What the DSL makes of a kind, whatever GPU is here."""
    os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUTE_DSL_DUMP_DIR"] = folder
        from cutlass.cutlass_dsl import CuTeDSL

        options = CuTeDSL._get_dsl().envar  # read from the environment at import, which may have been before
        options.dump_dir, options.keep_ptx, options.keep_cubin = folder, True, True
        from ring_cute.hopper.compiling import compile_kind

        compiled = compile_kind(kind)
        (ptx,), (cubin,) = Path(folder).glob("*.ptx"), Path(folder).glob("*.cubin")
        if cubin_to is not None:
            shutil.copyfile(cubin, cubin_to)
        return compiled, ptx.read_text()


def compile_kind(kind: Kind) -> Compiled:
    """A kernel for sm_90a, taken apart."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        begin = time.monotonic()
        _, text = compiled_and_ptx(kind, cubin)
        seconds = time.monotonic() - begin
        program = cuobjdump()
        beside = os.pathsep.join((os.environ["PATH"], str(Path(program).parent)))  # it calls nvdisasm
        usage, sass = (
            subprocess.run(
                [program, flag, cubin], capture_output=True, text=True, check=True, env={**os.environ, "PATH": beside}
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    number = lambda name: sum(map(int, re.findall(rf"\b{name}:(\d+)", usage)))  # noqa: E731
    return Compiled(
        registers=number("REG"),
        stack=number("STACK"),
        local=number("LOCAL"),
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        loads=len(re.findall(r"\bUTMALDG\b", sass)),
        stores=len(re.findall(r"\bUTMASTG\b", sass)),
        spilled=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        seconds=seconds,
        ptx=text,
        sass=sass,
    )


GROUPS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "128": [(128, {}), (128, {"state": True}), (128, {"state": True, "flags": True, "sinks": True})],
    "64": [(64, {}), (64, {"state": True}), (64, {"state": True, "flags": True, "sinks": True})],
    "wide": [(192, {}), (256, {}), (192, {"state": True}), (256, {"state": True, "dtype": "float16"})],
    "padded": [(40, {}), (96, {"state": True})],
    "pairs": [(128, {"cluster": 2, "state": state}) for state in (False, True)]
    + [(192, {"cluster": 2}), (256, {"cluster": 2})],
    "fp16": [(64, {"dtype": "float16"}), (128, {"dtype": "float16"})],
    **{
        "-".join(scores): [
            (head_dim, {**dict.fromkeys(scores, True), **more})
            for head_dim in (64, 128, 192, 256)
            for more in ({}, {"state": True, "flags": True, "sinks": True})
        ]
        for scores in (("softcap",), ("alibi",), ("softcap", "alibi"))
    },
    "variants": [
        (128, {"overlap": True}),
        (128, {"query_columns": 128, "cache_hints": True}),
        (128, {"cluster": 2, "block": 176}),
        (64, {"consumers": 2, "consumer_registers": 240, "lazy": False}),
    ],
}


def exponentials_around_wait(sass: str) -> list[tuple[int, int]]:
    """For each two products in flight together: exponentials before and after the wait for the second of them."""
    code = {"WARPGROUP.ARRIVE": "A", "HGMMA": "H", "WARPGROUP.DEPBAR": "W", "MUFU.EX2": "E"}
    operations = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", sass)
    events = "".join(code.get(next((c for c in code if o.startswith(c)), ""), "") for o in operations)
    found = []
    for rest in re.findall(r"AH+AH+([WE]+)", events):
        _, before, after = (rest + "W").split("W")[:3]
        found.append((len(before), len(after)))
    return found


def problems(compiled: Compiled, kind: ForwardKind) -> list[str]:
    """What is wrong with a compiled kernel."""
    block = kind.settings.block
    # scores of the first tile's first block, in the two loops, of the next tile's; sums in the loops and last
    products = 4 * -(-kind.head_dim // 16) + 3 * (block // 16)
    # boxes are 64 columns wide: queries for each consumer, keys and values
    loads = (kind.settings.consumers + 1 + 1) * (kind.padded // 64)
    # two in each loop, one each before a tile's first block, at its end, and at the kernel's; where registers do not
    # suffice, or only some paths issue a product, ptxas waits for each by itself, and says so to nobody
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR", compiled.sass))
    wrong = {
        f"{waits} waits for wgmma, not 7: products are serialized": waits != 7,
        f"{compiled.hgmma} wgmma instructions, not {products}": compiled.hgmma != products,
        f"{compiled.loads} TMA loads, fewer than {loads}": compiled.loads < loads,
        f"{compiled.stores} TMA stores": kind.out_tma and compiled.stores < kind.padded // 64,
        f"{compiled.stack} bytes of stack, {compiled.spilled} moves to and from it": compiled.stack > 0,
        f"{compiled.local} bytes of local memory": compiled.local > 0,
        f"{kind.shared_bytes} bytes of shared memory": kind.shared_bytes > SHARED_BYTES,
        "not for sm_90a": ".target sm_90a" not in compiled.ptx,
    }
    return [message for message, is_so in wrong.items() if is_so]


def main() -> int:
    failed = 0
    for group in sys.argv[1:] or GROUPS:
        for head_dim, changed in GROUPS[group]:
            kind = kind_of(head_dim, **changed)
            got = compile_kind(kind)
            wrong = problems(got, kind)
            failed += bool(wrong)
            print(
                f"D {head_dim} {changed or ''}: {got.registers} registers, {got.stack} B stack, "
                f"{kind.shared_bytes} B shared, {got.hgmma} wgmma, {got.loads}/{got.stores} TMA loads/stores, "
                f"exponentials before and after the wait {exponentials_around_wait(got.sass)}, "
                f"{len(re.findall('/[*][0-9a-f]{4,5}[*]/', got.sass))} instructions, "
                f"compiled in {got.seconds:.1f} s {wrong or ''}",
                flush=True,
            )
            if keep := os.environ.get("KEEP_SASS"):
                name = f"{head_dim}_{'_'.join(f'{a}-{b}' for a, b in changed.items())}"
                Path(keep, f"{name}.sass").write_text(got.sass)
                Path(keep, f"{name}.ptx").write_text(got.ptx)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
