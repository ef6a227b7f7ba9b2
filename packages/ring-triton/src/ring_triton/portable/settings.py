"""Launch settings of the portable kernels: data, each with the reason beside it.

The key is (target, kernel, width, bits): `width` is the head dim padded to a power of two, `bits` that of an element.
`spills` is what the compiler was seen to spill (bytes of stack a thread) without dropout, softcap, ALiBi and sinks: the
compile tests fail on more. A target serves every newer device that has its shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl

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

SETTINGS: dict[tuple[Target, Kernel, int, int], Setting] = {}


@cache
def target_of(device: torch.device) -> Target:
    """The target whose settings a device takes: by architecture, then by shared memory."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    room = properties.shared_memory_per_block_optin
    if properties.major >= 9 and room >= 227 * 1024:
        return "sm_90"
    return "sm_80" if room >= 163 * 1024 else "sm_86"


def width_of(head_dim: int) -> int:
    """The tile's extent along the head dim: a power of two, at least what a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def setting_of(device: torch.device, kernel: Kernel, head_dim: int, bits: int) -> Setting:
    """The setting of a launch."""
    target = target_of(device)
    if target == "interpreter":
        return INTERPRETER
    return SETTINGS[target, kernel, width_of(head_dim), bits]
