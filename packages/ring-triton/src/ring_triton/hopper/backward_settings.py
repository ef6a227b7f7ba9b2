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
    64: BackwardSettings(block=64, q_stages=4, do_stages=2, order=0),
    128: BackwardSettings(block=64, q_stages=3, do_stages=2, order=1),
}
"""By head dim, rounded up to the next key. TFLOP/s on an H200 (triton 3.6) at 4 x 4096 tokens causal and full and
1 x 16384 causal and full, 16 heads of 128 or 32 of 64:

    D 128: order 1, 3 + 2 stages 494 543 569 570; 4 + 2 stages 484 532 558 559; order 0 482 531 552 538;
           order 2 493 545 554 536, packed 452 480 490 479; dq not transposed 465 473 503 500; by piece 490 508 539 540
    D 64:  order 0 352 385 400 407; order 1 355 383 397 406; order 2 349 379 398 403; dq not transposed 342 366 391 390;
           blocks of 128, order 2 255 274 285 286, packed 307 325 348 349
"""

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
