"""Launch settings of the Hopper backward, as data."""

from __future__ import annotations

from dataclasses import dataclass

TILE_KEYS = 128
"""Keys a program owns: two consumer warpgroups of 64 rows each, what `backward.backward_kernel` spells out."""


@dataclass(frozen=True, slots=True)
class BackwardSettings:
    """How one kind of call is launched."""

    block: int
    """Queries a block."""
    q_stages: int
    """Blocks of Q in shared memory: up to 4, named barriers 8 to 11 give them back."""
    do_stages: int
    """Blocks of dO in shared memory: up to 4, named barriers 12 to 15."""
    order: int
    """What is issued while dq is computed: 1 the next block's scores, then dk; 0 dk first; 2 nothing of the next
    block."""
    packed: bool = False
    """dS from P as rounded for dV: half the registers for P."""
    swap: bool = True
    """dq transposed: its fragments then lie in shared memory without bank conflicts, one word each."""
    by_piece: bool = False
    """Tiles of one piece after the other, also where no piece arrives or departs by itself."""


BACKWARD: dict[int, BackwardSettings] = {
    # padded head dim: dk and dv (128 x D), P and dP (128 x block) and dq (block x D) live in the 240 registers of each
    # of 256 threads; K, V, ds, dq and the stages in 227 KiB
    64: BackwardSettings(block=64, q_stages=4, do_stages=2, order=1),
    128: BackwardSettings(block=64, q_stages=4, do_stages=2, order=1),
}
"""By head dim, rounded up to the next key. Not yet measured on a GPU: block, stages and order are those that compile
without spills in the loop."""

ORDERED: dict[int, BackwardSettings] = {
    64: BackwardSettings(block=64, q_stages=4, do_stages=2, order=1),
    128: BackwardSettings(block=64, q_stages=4, do_stages=2, order=0),
}
"""The same where another kernel computes dq in a fixed order. At D 128 order 1 spills 500 bytes, order 0 56."""


def backward_head_dim(head_dim: int) -> int:
    """The head dim that is computed with; columns beyond the true one are zeros that TMA fills in."""
    return next(width for width in BACKWARD if head_dim <= width)


def backward_settings_for(head_dim: int, *, ordered: bool = False) -> BackwardSettings:
    """The settings for a head dim. ordered: without dq."""
    return (ORDERED if ordered else BACKWARD)[backward_head_dim(head_dim)]
