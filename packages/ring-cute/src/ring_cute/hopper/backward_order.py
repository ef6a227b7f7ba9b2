"""The order in which blocks add to dq, where it is to be the same every time.

Rows of q are counted in stretches as long as a block. A block of queries touches one of them, or two; it adds its dq
when all blocks that come before it, in the order of tiles and within a tile as it walks them, have added theirs to
these stretches. CTAs take tiles in this order, so that whoever waits, waits for tiles that others have begun.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ring_core.key_tiles import ITEM, WALK


def stretches_of(q_len: int, block: int) -> int:
    """Stretches of a query head's rows."""
    return -(-q_len // block)


def turns_of(
    items: NDArray[np.int32], walk: NDArray[np.int32], block: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Items (`ring_core.key_tiles.ITEM`), the second column of each its first row of turns; and turns, int32 (V, 2):
    for each block of each item, as it walks them, how many add to the stretch of its first row before it, and to the
    next stretch; -1 where it has no row there."""
    items = items.copy()
    column = {name: n for n, name in enumerate(ITEM)}
    q_start, q_len, i_lo, blocks = (walk[:, WALK.index(name)].astype(np.int64) for name in WALK[:4])
    following = walk[:, WALK.index("next")]
    first: list[NDArray[np.int64]] = []  # the first row of each block
    last: list[NDArray[np.int64]] = []
    entries: list[NDArray[np.int64]] = []
    number = 0
    for item in items:
        item[1] = number
        if not item[column["blocks"]]:
            continue
        start = stop = int(item[column["walk_start"]])
        while following[stop] > stop:
            stop += 1
        rows = np.arange(start, stop + 1)
        row = np.repeat(rows, blocks[rows])
        nth = np.repeat(np.cumsum(blocks[rows]), blocks[rows]) - 1 - np.arange(len(row))  # a row's last one first
        i = i_lo[row] + nth * block
        first.append(q_start[row] + i)
        last.append(q_start[row] + np.minimum(i + block, q_len[row]) - 1)
        entries.append(np.full(len(row), int(item[column["batch"]]) + 1, dtype=np.int64))
        number += len(row)
    if not number:
        return items, np.zeros((1, 2), dtype=np.int32)
    begins, ends = np.concatenate(first) // block, np.concatenate(last) // block
    touched = np.stack((begins, ends), axis=1)
    where = (np.concatenate(entries) * (int(ends.max()) + 1))[:, None] + touched
    there = np.stack((np.ones_like(begins, dtype=bool), ends > begins), axis=1)
    turns = np.full(there.shape, -1, dtype=np.int64)
    flat = where[there]
    order = np.argsort(flat, kind="stable")
    changes = np.flatnonzero(np.diff(flat[order], prepend=-1))
    ranks = np.arange(len(flat)) - np.repeat(changes, np.diff(np.append(changes, len(flat))))
    found = np.empty_like(ranks)
    found[order] = ranks
    turns[there] = found
    return items, turns.astype(np.int32)
