"""Packed documents over ring_core: who holds which tokens, and the call."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ring_compare.suites import Cell
from ring_core import UnsupportedError


def packed_positions(cell: Cell, rank: int) -> torch.Tensor:
    """Global positions of a rank's tokens."""
    raise UnsupportedError("this ring_core has no packed documents")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of this rank's tokens."""
    raise UnsupportedError("this ring_core has no packed documents")
