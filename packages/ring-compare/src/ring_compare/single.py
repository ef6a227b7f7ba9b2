"""One call of a ready-made kernel on the whole sequence: what the error of a ring is held against.

flash-attn where it is installed, else the FlashAttention-2 inside torch, on GPUs and in half precision; on CPUs torch's
own choice.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_compare.suites import Cell

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class SingleCall:
    """A differentiable causal or full attention of (B, S, H, D) tensors."""

    provider: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, dq, dk, dv."""
        q, k, v = (x.detach().contiguous().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            out = self.attend(q, k, v)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.contiguous())
        return out.detach(), dq, dk, dv


def flash_attn_here(device: torch.device) -> bool:
    """Whether flash-attn can be imported for this device."""
    if device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return False
    # flash-attn-4 alone brings a package of that name too, with nothing but its own kernels inside.
    return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None


def single_call(cell: Cell, device: torch.device) -> SingleCall | None:
    """The call for a problem, or None: windows and packed documents are not what the yardstick is defined for."""
    if cell.mask == "window" or cell.documents or cell.Sq != cell.Sk:
        return None
    if flash_attn_here(device) and cell.dtype in _HALF:
        flash_attn = importlib.import_module("flash_attn")
        return SingleCall("flash-attn", lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=cell.causal))
    if device.type == "cuda" and cell.dtype not in _HALF:
        return None
    flash = device.type == "cuda"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # Repeated rather than enable_gqa, which the flash kernel of some releases refuses.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if not flash:
            return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal).transpose(1, 2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal).transpose(1, 2)

    return SingleCall("aten" if flash else "torch", attend)
