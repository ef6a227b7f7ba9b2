"""Compiles the Hopper forward for sm_90a without a GPU and holds what comes out to account.

    python hopper_compiling.py [GROUP…]

No spills beyond the table here, all products on wgmma, shared memory within its limit, no warning of ptxas (it warns
where it serializes wgmma), and the exponentials of a block ahead of the wait for the products that they overlap.
Prints a table; exit status 1 if a check failed. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from ring_triton.hopper.kernel import forward_kernel
from ring_triton.hopper.launch import WIDEST_AHEAD, keys_descriptor, query_buffers, rows_descriptor
from ring_triton.hopper.settings import CONSUMERS, Settings, padded_head_dim, settings_for


class NoGpu:
    """Enough of a driver for `warmup`."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


@dataclass(frozen=True)
class Compiled:
    """What a kernel became."""

    registers: int
    stack: int
    spills: int
    shared: int
    hgmma: int
    warnings: list[str]
    ptx: str
    sass: str


def compile_forward(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    state: bool = False,
    flags: bool = False,
    sinks: bool = False,
    settings: Settings | None = None,
    **changed: Any,
) -> Compiled:
    """The forward kernel of these settings for sm_90a."""
    triton.runtime.driver.set_active(NoGpu())
    chosen = replace(settings or settings_for(head_dim), **changed)
    q = torch.zeros(1, 256, 4, head_dim, dtype=dtype)
    k = torch.zeros(1, 1, 256, 2, head_dim, dtype=dtype)
    lse, total = torch.zeros(1, 4, 256), torch.zeros(1, 256, 4, head_dim)
    ints = torch.zeros(64, dtype=torch.int32)
    big = (256 * 4 * head_dim, 4 * head_dim, head_dim)
    ahead = state and padded_head_dim(head_dim) <= WIDEST_AHEAD
    queries = query_buffers(head_dim, chosen, ahead)
    kernel = forward_kernel.warmup(
        *(rows_descriptor(q), keys_descriptor(k, chosen.block), keys_descriptor(k, chosen.block)),
        rows_descriptor(total if ahead else q),
        *(rows_descriptor(q), q, lse, total if state else ints, total if sinks else ints, ints, ints, ints, ints, ints),
        0.125,
        *(3, 3, 4, 4, 12, 2, 0, 1 << 20),
        *(*big, 1024, 256, *(big if state else (0, 0, 0))),
        BLOCK=chosen.block,
        D=padded_head_dim(head_dim),
        HEAD_DIM=head_dim,
        STAGES=chosen.stages,
        QUERIES=queries,
        STATE=state,
        AHEAD=ahead,
        OUT_TMA=queries > 1,
        SINKS=sinks,
        FLAGS=flags,
        PING_PONG=chosen.ping_pong,
        OVERLAP=chosen.overlap,
        CONSUMERS=CONSUMERS,
        REGISTERS=chosen.registers,
        grid=(1,),
        num_warps=4,
        maxnreg=168,
        enable_fp_fusion=True,
    )
    ptxas = Path(get_ptxas(90).path)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        said = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", ptx, "-o", cubin], capture_output=True, text=True, check=True
        ).stderr
        sass = subprocess.run(
            [ptxas.parent / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    number = lambda pattern: sum(map(int, re.findall(pattern, said)))  # noqa: E731
    return Compiled(
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill"),
        shared=kernel.metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        warnings=[line for line in said.splitlines() if "arning" in line or "C75" in line],
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


SPILLED = {256: 136}
"""Bytes: addresses, moved once a tile and not in the loops. O takes 128 registers there, and so does the state that is
added to it (triton 3.7; 88 with 3.6)."""
SHARED_LIMIT = 227 << 10
GROUPS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "128": [(128, {}), (128, {"state": True, "flags": True}), (128, {"state": True, "sinks": True})],
    "64": [(64, {}), (64, {"state": True, "flags": True}), (64, {"state": True, "sinks": True})],
    "256": [(256, {}), (256, {"state": True, "flags": True}), (256, {"state": True, "sinks": True})],
    "padded": [(40, {}), (96, {}), (192, {"state": True})],
    "fp16": [(64, {"dtype": torch.float16}), (128, {"dtype": torch.float16})],
    "variants": [
        (128, {"ping_pong": True}),
        (128, {"overlap": 1}),
        (128, {"block": 64, "stages": 4}),
    ],
}


def exponentials_around_wait(sass: str) -> list[tuple[int, int]]:
    """For each two products in flight together: exponentials before and after the wait for the second of them."""
    code = {"WARPGROUP.ARRIVE": "A", "HGMMA": "H", "WARPGROUP.DEPBAR": "W", "MUFU.EX2": "E"}
    operations = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", sass)
    events = "".join(code.get(next((c for c in code if o.startswith(c)), ""), "") for o in operations)
    found = []
    for rest in re.findall(r"AH+AH+([WE]+)", events):
        _, before, after = rest.split("W")
        found.append((len(before), len(after)))
    return found


def problems(compiled: Compiled, head_dim: int, changed: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    width = padded_head_dim(head_dim)
    block = changed.get("block", settings_for(head_dim).block)
    # scores before, in and between the two loops; sums in them and at the end
    products = CONSUMERS * (3 * (width // 16) + 3 * (block // 16))
    overlap = changed.get("overlap", settings_for(head_dim).overlap)
    order = exponentials_around_wait(compiled.sass)
    overlapped = len(order) == 2 * CONSUMERS and all(before >= block // 2 and after <= 2 for before, after in order)
    wrong = {
        f"{compiled.hgmma} wgmma instructions, not {products}": compiled.hgmma != products,
        f"{compiled.spills} bytes spilled": compiled.spills > SPILLED.get(width, 0),
        f"{compiled.shared} bytes of shared memory": compiled.shared > SHARED_LIMIT,
        "; ".join(compiled.warnings): bool(compiled.warnings),
        "not for sm_90a": ".target sm_90a" not in compiled.ptx,
        f"exponentials before and after the wait: {order}": overlap > 0 and not overlapped,
    }
    return [message for message, is_so in wrong.items() if is_so]


def main() -> int:
    print("triton", triton.__version__, flush=True)
    failed = 0
    for group in sys.argv[1:] or GROUPS:
        for head_dim, changed in GROUPS[group]:
            got = compile_forward(head_dim, **changed)
            wrong = problems(got, head_dim, changed)
            failed += bool(wrong)
            print(
                f"D {head_dim} {changed or ''}: {got.registers} registers, {got.spills} B spilled, "
                f"{got.shared} B shared, {got.hgmma} wgmma, exponentials before and after the wait "
                f"{exponentials_around_wait(got.sass)} {wrong or ''}",
                flush=True,
            )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
