"""Packed documents over ring_core: who holds which tokens, and the call."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist

from ring_compare.documents import boundaries, document_lengths
from ring_compare.suites import Cell
from ring_core import PackedPlan, plan_packed, ring_attention_packed


@lru_cache(maxsize=64)
def _plan(cell: Cell, rank: int) -> PackedPlan:
    assert cell.layout != "stripe"  # check_cell
    return plan_packed(
        boundaries(document_lengths(cell.documents, cell.Sq)),
        layout=cell.layout,
        causal=cell.causal,
        window_size=cell.window_size,
        rank=rank,
        world_size=cell.world_size,
    )


def packed_positions(cell: Cell, rank: int) -> torch.Tensor:
    """Positions of a rank's tokens in the packed stream."""
    return _plan(cell, rank).shard(torch.arange(cell.Sq))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of this rank's tokens, (1, T, H, D) and (1, H, T); planned once, as for the layers of a model."""
    assert cell.schedule != "own"
    rank = dist.get_rank(group) if cell.world_size > 1 else 0
    plan = _plan(cell, rank)
    out, lse = ring_attention_packed(
        q[0], k[0], v[0], plan, schedule=cell.schedule, backend=backend, group=group, return_lse=True
    )
    return out[None], lse[None]
