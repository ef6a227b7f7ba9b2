"""`torch.nn.functional.scaled_dot_product_attention` called directly, as models call it: what a kernel costs with
nothing of ours round it. The option names torch's kernel; without one torch chooses.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_compare.implementations import Traits
from ring_compare.suites import Cell

_KERNELS = {"": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Sdpa:
    """Causal (of equal lengths) and full attention on one rank; gives no lse."""

    def __init__(self, option: str = "") -> None:
        if option not in _KERNELS:
            raise ValueError(f"sdpa[{option}]: there are {', '.join(filter(None, _KERNELS))}, and no option")
        self.name = f"sdpa[{option}]" if option else "sdpa"
        self.traits = Traits(omits=frozenset({"lse"}), label=self.name)
        self._kernel = _KERNELS[option]

    def provider(self, device: torch.device) -> str:
        """torch's."""
        return "torch"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """One rank; masks that is_causal says; what torch itself says its kernel takes."""
        if reason := one_rank_alone(cell):
            return reason
        if cell.causal and cell.Sq != cell.Sk:
            return "torch aligns causal masks of unequal lengths the other way"
        if self._kernel is not None:
            if device.type != "cuda":
                return f"torch has this kernel on GPUs, not on {device.type}"
            return self._refused(cell, device, self._kernel)
        return None

    def _refused(self, cell: Cell, device: torch.device, kernel: SDPBackend) -> str | None:
        """Asked of torch on a few tokens: a call that fails would cost the whole problem another run."""
        dtype = getattr(torch, cell.dtype)
        q, k = (
            torch.zeros(1, heads, 64, cell.D, dtype=dtype, device=device, requires_grad=True)
            for heads in (cell.Hq, cell.Hkv)
        )
        try:
            with self._chosen():
                out = F.scaled_dot_product_attention(q, k, k, is_causal=cell.causal, enable_gqa=cell.Hq != cell.Hkv)
            torch.autograd.grad(out.sum(), (q, k))
        except RuntimeError as error:  # what torch raises where no kernel is left
            return f"torch's {kernel.name} refuses: {' '.join(str(error).split())}"
        return None

    def _chosen(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._kernel is None else sdpa_kernel(self._kernel)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """out (B, Sq, Hq, D), None."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
        with self._chosen():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal, enable_gqa=cell.Hq != cell.Hkv)
        return out.transpose(1, 2), None


def one_rank_alone(cell: Cell) -> str | None:
    """Why a kernel that knows causal and full masks on one rank cannot do the cell, or None."""
    if cell.world_size != 1:
        return "it runs on one rank"
    if cell.documents:
        return "it is compared on one sequence"
    if cell.mask == "window":
        return "it is compared on causal and full masks"
    return None
