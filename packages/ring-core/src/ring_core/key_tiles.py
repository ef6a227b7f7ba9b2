"""From a key-major segment table to what the Hopper backward reads: tiles of keys, and the blocks of queries of each.

A *tile* is up to `tile_keys` keys of one strip. For each segment of its strip that sees anything of it, a row of the
*walk* says where the tile's blocks of queries begin, how many there are, and which of them every pair takes part in.

    query ──►  i_lo
    key 0      ┌ ─ ─ ┬─────┬─────┬ ─ ─ ┐      edge blocks: some query does not see some key, the segment's queries end
     │         │ ╲   │     │     │ ╲   │      in the block, or its keys in the tile
     ▼         │   ╲ │     │     │   ╲ │      whole blocks: from whole_from up to whole_to, no mask
    key 127    └ ─ ─ ┴─────┴─────┴ ─ ─ ┘
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ring_core.sections import section_of
from ring_core.segment import COLUMNS, Table

ITEM = ("walk_start", "unused", "token", "keys", "batch", "piece", "blocks", "unused2")
WALK = (
    "q_start", "q_len", "i_lo", "blocks", "unused", "whole_from", "whole_to", "lower", "upper", "next", "distance",
    "stride",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tiles and their walks.

    items: int32 (N, 8), columns `ITEM`: first row of the walk, the tile's first key in its piece, how many keys, the
        batch entry (-1: every one), the piece, how many blocks for one query head.
    walk: int32 (M, 12), columns `WALK`: the segment's queries, the first query of block 0 (counted from q_start),
        blocks, whole blocks; key r of the tile takes part with query i of the segment iff lower <= r - i <= upper, and
        its global position is distance + stride (i - r) before the query's; `next`: the row after this one, for a
        tile's last row its first.
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

    def seen_keys(self, batch: int) -> int:
        """Keys in tiles that have blocks, of all batch entries."""
        keys, entries, blocks = (self.items[:, ITEM.index(name)] for name in ("keys", "batch", "blocks"))
        return int((keys * np.where(entries < 0, batch, 1) * (blocks > 0)).sum(dtype=np.int64))

    def for_batch(self, batch: int) -> NDArray[np.int32]:
        """Items, those of every batch entry repeated with its number, in the same order."""
        column = self.items[:, ITEM.index("batch")]
        repeats = np.where(column < 0, batch, 1)
        number = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        items = np.repeat(self.items, repeats, axis=0)
        own = items[:, ITEM.index("batch")]
        items[:, ITEM.index("batch")] = np.where(own < 0, number, own)
        return items


def make_schedule(table: Table, *, tile_keys: int, block: int, by_piece: bool = False) -> Schedule:
    """Tiles of `tile_keys` keys and walks in blocks of `block` queries for a key-major table.

    by_piece: all tiles of a piece before those of the next, in table order, and longest first only within a piece: for
        pieces that arrive or depart one by one. Otherwise longest first.
    """
    rows = table.rows.astype(np.int64)
    field = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    start, stop = table.groups[:-1].astype(np.int64), table.groups[1:].astype(np.int64)
    k_len = field["k_len"][start]

    # tiles of all strips: `group` is the strip of a tile, `first` its first key in the strip
    tiles = -(-k_len // tile_keys)
    group = np.repeat(np.arange(len(start)), tiles)
    first = (np.arange(len(group)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile_keys
    keys = np.minimum(tile_keys, k_len[group] - first)

    # one row for each (tile, segment of its strip)
    segments = (stop - start)[group]
    tile = np.repeat(np.arange(len(group)), segments)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(segments) - segments, segments)
    row = start[group[tile]] + nth
    lower, upper = field["lower"][row] - first[tile], field["upper"][row] - first[tile]
    q_len, last_key = field["q_len"][row], keys[tile] - 1
    i_lo = np.clip(-upper, 0, q_len)
    i_hi = np.clip(last_key - lower + 1, 0, q_len)
    blocks = np.where(lower <= upper, -(-np.maximum(i_hi - i_lo, 0) // block), 0)
    # block b has queries i_lo + b block to i_lo + (b + 1) block - 1
    whole_from = np.clip(-(-(last_key - upper - i_lo) // block), 0, blocks)
    whole_to = np.clip((np.minimum(1 - lower, q_len) - i_lo) // block, whole_from, blocks)
    whole_to = np.where(keys[tile] == tile_keys, whole_to, whole_from)

    kept = blocks > 0
    number = np.bincount(tile[kept], minlength=len(group))
    ends = np.cumsum(number)
    own = tile[kept]
    following = np.arange(1, len(own) + 1)
    following = np.where(following == ends[own], (ends - number)[own], following)
    stride = field["stride"][row]
    distance = field["q_position"][row] - field["k_position"][row] - stride * first[tile]
    columns = (
        field["q_start"][row][kept],
        q_len[kept],
        i_lo[kept],
        blocks[kept],
        np.zeros_like(following),
        whole_from[kept],
        whole_to[kept],
        lower[kept],
        upper[kept],
        following,
        distance[kept],
        stride[kept],
    )
    walk = np.stack(columns, axis=1).astype(np.int32)

    total = np.bincount(tile, weights=blocks, minlength=len(group)).astype(np.int64)
    piece = field["piece"][start][group]
    nothing = np.zeros_like(total)
    items = np.stack(
        (
            ends - number,
            nothing,
            field["k_start"][start][group] + first,
            keys,
            field["batch"][start][group],
            piece,
            total,
            nothing,
        ),
        axis=1,
    ).astype(np.int32)
    _, appearance = np.unique(piece, return_index=True)
    rank = np.searchsorted(np.sort(appearance), appearance[np.searchsorted(np.unique(piece), piece)])
    order = np.lexsort((-total, rank)) if by_piece else np.argsort(-total, kind="stable")
    return Schedule(items[order], walk)
