"""Who holds which tokens: positions of each rank's tokens in the whole sequence, and moving between both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from ring_compare.packed import packed_positions
from ring_compare.suites import Cell
from ring_core import local_positions

Positions = Callable[[Cell, int, int], torch.Tensor]
"""(cell, rank, length of the whole) -> int64 (local tokens,) on the CPU."""


@lru_cache(maxsize=256)
def layout_positions(cell: Cell, rank: int, length: int) -> torch.Tensor:
    """As ring_core deals the cell's layout out."""
    if cell.documents:
        return packed_positions(cell, rank)
    if cell.layout == "balanced":
        raise ValueError("balanced is a layout of packed documents")
    return local_positions(length, layout=cell.layout, rank=rank, world_size=cell.world_size).cpu()


def take(whole: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    """The tokens at `positions`, contiguous."""
    return whole.index_select(dim, positions.to(whole.device)).contiguous()


def put_together(shards: Sequence[torch.Tensor], positions: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The whole tensor from the shards of all ranks: the inverse of `take`."""
    joined = torch.cat(list(shards), dim=dim)
    return torch.empty_like(joined).index_copy_(dim, torch.cat(list(positions)).to(joined.device), joined)
