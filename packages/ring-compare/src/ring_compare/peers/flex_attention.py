"""torch's FlexAttention: Triton kernels that the compiler makes of a mask. Each cell compiles kernels of its own, some
ten seconds' worth, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ring_compare.implementations import Traits
from ring_compare.peers.sdpa import one_rank_alone
from ring_compare.suites import Cell

_CELLS = 256


class FlexAttention:
    """Compiled FlexAttention with static shapes, the block mask made once for a cell."""

    name = "flex"

    def __init__(self) -> None:
        self.traits = Traits(label=self.name)
        self._masks: dict[tuple[int, int, torch.device], BlockMask] = {}
        # Otherwise a backward may write into what its forward saved, and cannot be timed by itself.
        torch._functorch.config.donated_buffer = False
        # Every cell is a graph of its own; beyond the limit dynamo would quietly run the unfused fallback.
        torch._dynamo.config.recompile_limit = max(_CELLS, torch._dynamo.config.recompile_limit)

    def provider(self, device: torch.device) -> str:
        """torch's."""
        return "torch"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """GPUs: on CPUs it has no backward."""
        if device.type != "cuda":
            return f"FlexAttention is compared compiled, and has no backward on {device.type}"
        return one_rank_alone(cell)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """out (B, Sq, Hq, D), lse (B, Hq, Sq)."""
        mask = self._mask(cell, q.device) if cell.causal else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
        if hasattr(flex, "AuxRequest"):  # torch 2.9
            out, more = _compiled()(
                q, k, v, block_mask=mask, enable_gqa=cell.Hq != cell.Hkv, return_aux=flex.AuxRequest(lse=True)
            )
            return out.transpose(1, 2), more.lse
        out, lse = _compiled()(q, k, v, block_mask=mask, enable_gqa=cell.Hq != cell.Hkv, return_lse=True)
        return out.transpose(1, 2), lse

    def _mask(self, cell: Cell, device: torch.device) -> BlockMask:
        """Made once, by the first call: it takes Sq · Sk bytes for a moment."""
        key = cell.Sq, cell.Sk, device
        if key not in self._masks:
            ahead = cell.Sk - cell.Sq

            def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return j <= i + ahead

            self._masks[key] = create_block_mask(causal, None, None, cell.Sq, cell.Sk, device=device)
        return self._masks[key]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
