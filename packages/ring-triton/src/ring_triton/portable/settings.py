"""Launch settings of the portable kernels: data, each with the reason beside it.

`spills` is what the compiler (triton 3.7.1) was seen to spill, in bytes of stack a thread, without dropout, softcap,
ALiBi and sinks: the compile tests fail on more. A target serves every newer device that has its shared memory: "sm_80"
163 KiB, "sm_86" 99 KiB, "sm_90" 227 KiB. No setting has been timed on a GPU yet: they are the largest tiles of those
tried that hardly spill, as larger tiles read less.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    "sm_90": {  # 64 rows a warpgroup is what wgmma takes: own tiles of 128 for two of them, 64 where that spills
        "forward": {
            64: Setting(128, 128, 8, 2, 0),
            128: Setting(128, 128, 8, 2, 8),  # 4 warps: 464 with 64 keys
            256: Setting(128, 64, 8, 2, 16),
        },
        "gradients_kv": {
            64: Setting(32, 128, 8, 2, 0),  # 64 rows: 96; 4 warps: 232
            128: Setting(32, 128, 8, 2, 64),  # 64 rows: 232
            256: Setting(32, 64, 8, 2, 152),  # 32 keys: 0, but no wgmma
        },
        "gradients_q": {
            64: Setting(128, 64, 8, 2, 0),
            128: Setting(128, 64, 8, 2, 0),
            256: Setting(64, 32, 8, 2, 0),  # 64 keys in one stage: 592
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
