"""Launch settings of the portable kernels: data, each with the reason beside it.

`spills` is what the compiler (triton 3.7.1) was seen to spill, in bytes of stack a thread, without dropout, softcap,
ALiBi and sinks: the compile tests fail on more. `spills_36` is the same of triton 3.6, where that is much more. A
target serves every newer device that has its shared memory: "sm_80" 163 KiB, "sm_86" 99 KiB, "sm_90" 227 KiB. Those of
fp16 and bf16 on sm_90 are the fastest of those timed; all others are the largest tiles of those tried that hardly
spill, as larger tiles read less, and have not been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ring_triton import tuned
from ring_triton.tuned import Mask, Place

INTERPRETED = not isinstance(tl.cdiv, triton.runtime.JITFunction)
"""Whether kernels run in Triton's interpreter: whether TRITON_INTERPRET was 1 when triton was imported (by torch, as a
rule)."""

Kernel = Literal["forward", "gradients_kv", "gradients_q"]
Target = Literal["interpreter", "sm_80", "sm_86", "sm_90"]


@dataclass(frozen=True, slots=True)
class Setting:
    """rows, keys: the tile of scores. precision: of products of fp32 numbers."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    spills: int = 0
    precision: str = "ieee"
    spills_36: int | None = field(default=None, compare=False)


INTERPRETER = Setting(32, 16)
"""Small, so that short sequences have several tiles; unequal, so that rows taken for keys are seen."""

_THREE = "tf32x3"
"""On tensor cores, three products for one, good to 22 bits. "ieee" (no tensor cores) spills kilobytes in the widest
tiles; 64 rows by 32 keys spill 6 KB at head dim 128."""

FULL: dict[Kernel, dict[int, Setting]] = {  # fp32, on every target: by width
    "forward": {
        64: Setting(64, 32, 8, 2, 120, _THREE),
        128: Setting(32, 32, 8, 1, 56, _THREE),  # 64 x 32: 184, and 131 KB
        256: Setting(16, 16, 4, 1, 208, _THREE),  # 32 x 16: 2136
    },
    "gradients_kv": {
        64: Setting(32, 32, 8, 1, 32, _THREE),  # 32 x 64: 80
        128: Setting(16, 32, 8, 1, 16, _THREE),  # 32 x 32: 72
        256: Setting(16, 16, 8, 1, 264, _THREE),  # 32 x 32: 8912
    },
    "gradients_q": {
        64: Setting(32, 32, 8, 1, 8, _THREE),
        128: Setting(32, 16, 8, 1, 64, _THREE),
        256: Setting(16, 16, 8, 1, 80, _THREE),  # 32 x 32: 7544
    },
}

HALF: dict[Target, dict[Kernel, dict[int, Setting]]] = {  # fp16 and bf16: by width
    # 64 rows a warpgroup is what wgmma takes. Milliseconds: bf16, causal / full, 16384 tokens in sequences of 8192 (32
    # heads of 64, 16 of 128, 8 of 256), on an H200 with triton 3.6, 2026-11-21; a third stage is what most of it is
    "sm_90": {
        "forward": {
            64: Setting(128, 64, 4, 3, 32),  # 1.49 / 2.66; 8 warps 1.70 / 3.19; 128 keys 1.76 / 3.15; 64 rows 1.55
            128: Setting(128, 64, 8, 3, 0),  # 1.24 / 2.29; 2 stages 1.65 / 2.78; 128 keys 1.22 / 2.25, at 16384 slower
            256: Setting(128, 64, 8, 2, 16),  # 1.16 / 2.13; 32 keys in 3 stages 1.38 / 2.42; 64 rows 2.18 / 4.20
        },
        "gradients_kv": {
            64: Setting(64, 64, 4, 3, 136, spills_36=784),  # 2.71 / 5.11; 32 rows 3.02 / 5.79; 64 x 128 3.25 / 6.06
            128: Setting(32, 64, 4, 3, 208, spills_36=496),  # - / 4.53; 64 x 128, 8 warps - / 4.51; 2 stages - / 5.69
            256: Setting(64, 64, 8, 2, 544, spills_36=888),  # 4.58 / 9.27; 32 rows 4.93 / 11.6, in 3 stages 4.79 / 9.58
        },
        "gradients_q": {
            64: Setting(128, 64, 4, 3, 56),  # 1.37 / 2.72; 64 rows 1.50 / 2.88; 128 keys, 8 warps 1.66 / 3.07
            128: Setting(128, 64, 8, 3, 0),  # 1.39 / 2.63; 2 stages 1.84 / 3.32; 64 rows, 4 warps 1.50 / 2.68
            256: Setting(128, 32, 8, 2, 0),  # 2.06 / 3.95; 64 x 64 3.11 / 6.30; 64 x 32 4.88 / 9.82
        },
    },
    "sm_80": {
        "forward": {
            64: Setting(128, 64, 4, 3, 8),
            128: Setting(128, 64, 8, 2, 0),  # 4 warps: 304
            256: Setting(64, 64, 8, 2, 0),  # 106 KB
        },
        "gradients_kv": {
            64: Setting(32, 128, 8, 2, 0),  # 64 rows: 80
            128: Setting(64, 64, 8, 2, 16),  # 8 where dk and dv are added to; 32 x 128: 184
            256: Setting(32, 64, 8, 2, 32),
        },
        "gradients_q": {
            64: Setting(128, 64, 8, 2, 0),
            128: Setting(64, 64, 8, 2, 0),
            256: Setting(64, 32, 8, 2, 8),
        },
    },
}
HALF["sm_86"] = {  # as on sm_80 where it fits into 99 KiB
    "forward": HALF["sm_80"]["forward"] | {256: Setting(64, 32, 8, 2, 0)},  # 70 KB
    "gradients_kv": HALF["sm_80"]["gradients_kv"] | {256: Setting(32, 32, 8, 1, 0)},  # 82 KB
    "gradients_q": HALF["sm_80"]["gradients_q"] | {256: Setting(32, 32, 8, 2, 0)},  # 68 KB
}


@cache
def target_of(device: torch.device) -> Target:
    """The target whose settings a device takes: by architecture, then by shared memory."""
    if INTERPRETED:
        return "interpreter"
    properties: Any = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin
    if properties.major >= 9 and room >= 227 * 1024:
        return "sm_90"
    return "sm_80" if room >= 163 * 1024 else "sm_86"


def width_of(head_dim: int) -> int:
    """The tile's extent along the head dim: a power of two, at least what a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def place_of(kernel: Kernel, head_dim: int, mask: Mask, bits: int) -> Place:
    """Where tuned settings of a launch would be found."""
    names: dict[Kernel, tuned.Kernel] = {
        "forward": "portable forward",
        "gradients_kv": "portable gradients_kv",
        "gradients_q": "portable gradients_q",
    }
    return Place(names[kernel], width_of(head_dim), mask, bits)


@cache
def setting_of(device: torch.device, kernel: Kernel, head_dim: int, bits: int) -> Setting:
    """The setting of a launch."""
    target = target_of(device)
    if target == "interpreter":
        return INTERPRETER
    return listed(target, kernel, width_of(head_dim), bits)


def listed(target: Target, kernel: Kernel, width: int, bits: int) -> Setting:
    """What the tables say; widths of 16 and 32 are launched as 64 is."""
    table = FULL[kernel] if bits == 32 else HALF[target][kernel]
    return table[max(64, width)]
