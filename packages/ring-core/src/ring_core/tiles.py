"""From a segment table to what the Hopper forward reads: tiles of queries, and the blocks of keys that each walks.

A *tile* is up to `tile_rows` rows of one strip. For each segment of its strip that it sees anything of, a row of the
*walk* says where the tile's blocks begin, how many there are, and how many of them the band or the segment's end cuts.
The kernel does no arithmetic on bands beyond comparing columns of those edge blocks with two bounds per row.

    key ──►   j_lo                                   j_hi
    row 0     ┌ ─ ─ ┬─────┬─────┬ ─ ─ ┐              left edge: some row does not see the block's first keys
     │        │ ╲   │     │     │ ╲   │              full:      every row sees every key; no mask
     ▼        │   ╲ │     │     │   ╲ │              right edge: some row does not see the last keys, or k_len cuts
    row 127   └ ─ ─ ┴─────┴─────┴ ─ ─ ┘

Visiting order within a segment: right edges from the right, then left edges, then full blocks, so that a kernel needs
one loop with a mask and one without. Segments are visited in table order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ring_core.sections import section_of
from ring_core.segment import COLUMNS, FIRST, LAST, Table

ITEM = ("walk_start", "walk_stop", "q_row", "rows", "batch", "flags", "blocks", "unused")
"""Columns 6 and 7 are head and "there is such a tile" in what the kernel makes of an item."""
WALK = (
    "k_row", "k_len", "j_lo", "blocks", "right", "edges", "lower", "upper", "piece", "k_start", "distance", "stride",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tiles, longest first, and their walks.

    items: int32 (N, 8), columns `ITEM`: rows walk_start..walk_stop of the walk, the tile's first row in q, how many
        rows, the batch entry (-1: every one), FIRST and LAST of the strip, how many blocks in all.
    walk: int32 (M, 12), columns `WALK`: the segment's first key among all pieces' keys (piece * piece_length +
        k_start), k_len, the first key j_lo of block 0, blocks, how many of them are right edges, right and left edges;
        row r of the tile sees key j iff r + lower <= j <= r + upper, from a global position that is
        distance + stride (r - j) behind the key's.
    """

    items: NDArray[np.int32]
    walk: NDArray[np.int32]

    @property
    def every_batch(self) -> bool:
        """Whether all tiles are about every batch entry."""
        return bool((self.items[:, ITEM.index("batch")] < 0).all())

    def section(self, head_batches: int, resident: int, processors: int) -> int:
        """See `ring_core.sections.section_of`."""
        return section_of(self.items[:, ITEM.index("blocks")], head_batches, resident, processors)

    def for_batch(self, batch: int) -> NDArray[np.int32]:
        """Items, those of every batch entry repeated with its number, longest first."""
        column = self.items[:, ITEM.index("batch")]
        repeats = np.where(column < 0, batch, 1)
        items = np.repeat(self.items, repeats, axis=0)
        number = np.arange(len(items)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        items[:, ITEM.index("batch")] = np.where(
            items[:, ITEM.index("batch")] < 0, number, items[:, ITEM.index("batch")]
        )
        return items


def with_first_walk(items: NDArray[np.int32], walk: NDArray[np.int32]) -> NDArray[np.int32]:
    """Items (N, 16) as the kernel reads them: then the first eight columns of the tile's first row of the walk, or of
    any row where it has none."""
    first = walk[np.minimum(items[:, 0], len(walk) - 1), :8]
    return np.concatenate((items, first), axis=1)


def make_schedule(table: Table, *, tile_rows: int, block: int, piece_length: int) -> Schedule:
    """Tiles of `tile_rows` rows and walks in blocks of `block` keys for a query-major table."""
    rows = table.rows.astype(np.int64)
    field = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    start, stop = table.groups[:-1].astype(np.int64), table.groups[1:].astype(np.int64)
    q_len = field["q_len"][start]

    # tiles of all strips: `group` is the strip of a tile, `first` its first row in the strip
    tiles = -(-q_len // tile_rows)
    group = np.repeat(np.arange(len(start)), tiles)
    first = (np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile_rows
    count = np.minimum(tile_rows, q_len[group] - first)

    # one row for each (tile, segment of its strip)
    segments = (stop - start)[group]
    tile = np.repeat(np.arange(len(group)), segments)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(segments) - segments, segments)
    row = start[group[tile]] + nth
    lower, upper = field["lower"][row] + first[tile], field["upper"][row] + first[tile]
    k_len, last_row = field["k_len"][row], count[tile] - 1
    j_lo = np.clip(lower, 0, k_len)
    j_hi = np.clip(last_row + upper + 1, 0, k_len)
    blocks = np.where(lower <= upper, -(-np.maximum(j_hi - j_lo, 0) // block), 0)
    left = np.clip(-(-(last_row + lower - j_lo) // block), 0, blocks)
    full_stop = np.clip((np.minimum(upper + 1, k_len) - j_lo) // block, left, blocks)
    right = blocks - full_stop
    piece, k_start = field["piece"][row], field["k_start"][row]
    stride = field["stride"][row]
    distance = field["q_position"][row] + stride * first[tile] - field["k_position"][row]
    columns = (
        piece * piece_length + k_start,
        k_len,
        j_lo,
        blocks,
        right,
        right + left,
        lower,
        upper,
        piece,
        k_start,
        distance,
        stride,
    )
    kept = blocks > 0
    walk = np.stack(columns, axis=1)[kept].astype(np.int32)

    number = np.bincount(tile[kept], minlength=len(group))
    ends = np.cumsum(number)
    total = np.bincount(tile, weights=blocks, minlength=len(group)).astype(np.int64)
    flags = (field["flags"][start] & FIRST) | (field["flags"][stop - 1] & LAST)
    items = np.stack(
        (
            ends - number,
            ends,
            field["q_start"][start][group] + first,
            count,
            field["batch"][start][group],
            flags[group],
            total,
            np.zeros_like(total),
        ),
        axis=1,
    ).astype(np.int32)
    longest_first = np.argsort(-total, kind="stable")
    return Schedule(items[longest_first], walk)
