"""Compiles the Hopper forward for sm_90a without a GPU, and reads registers, spills and instructions from the cubin."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from ring_triton.hopper.forward import _keys_descriptor, _rows_descriptor
from ring_triton.hopper.kernel import forward_kernel
from ring_triton.hopper.settings import CONSUMERS, Settings, padded_head_dim, settings_for
from triton.backends.compiler import GPUTarget


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
    kernel = forward_kernel.warmup(
        *(_rows_descriptor(q), _keys_descriptor(k, chosen.block), _keys_descriptor(k, chosen.block)),
        *(q, lse, total if state else ints, ints, ints, ints, ints, ints),
        0.125,
        *(3, 3, 4, 4, 12, 2, 0, 1 << 20),
        *(*big, 1024, 256, *(big if state else (0, 0, 0))),
        BLOCK=chosen.block,
        D=padded_head_dim(head_dim),
        HEAD_DIM=head_dim,
        STAGES=chosen.stages,
        STATE=state,
        FLAGS=flags,
        DYNAMIC=chosen.dynamic and chosen.persistent,
        PING_PONG=chosen.ping_pong,
        OVERLAP=chosen.overlap,
        CONSUMERS=CONSUMERS,
        REGISTERS=chosen.registers,
        grid=(1,),
        num_warps=4,
        maxnreg=168,
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        said = subprocess.run(
            [tools / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", cubin], capture_output=True, text=True, check=True
        ).stderr
        sass = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
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


if __name__ == "__main__":
    print("triton", triton.__version__)
    for head_dim in (128, 64, 256, 96):
        for extra in ({}, {"state": True, "flags": True}, {"persistent": False}, {"dynamic": False}, {"ping_pong": True}):
            got = compile_forward(head_dim, **extra)  # type: ignore[arg-type]
            print(head_dim, extra, got.registers, got.stack, got.spills, got.shared, got.hgmma, got.warnings, flush=True)
