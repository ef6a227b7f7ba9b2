"""The Hopper forward's walk over tiles and blocks in NumPy: the same loops, visiting order and masks, no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ring_core.segment import Table
from ring_core.tiles import ITEM, WALK, Schedule


def blocks_of(schedule: Schedule, item: dict[str, int], block: int) -> Iterator[tuple[dict[str, int], int, bool]]:
    """(walk row, first key, masked?) of each block a tile visits, in the kernel's order."""
    for w in range(item["walk_start"], item["walk_stop"]):
        row = dict(zip(WALK, schedule.walk[w].tolist(), strict=True))
        done = 0
        for t in range(done, row["edges"]):
            yield row, row["j_lo"] + (row["blocks"] - 1 - t if t < row["right"] else t - row["right"]) * block, True
        for t in range(max(done, row["edges"]), row["blocks"]):
            yield row, row["j_lo"] + (t - row["right"]) * block, False


def visits(schedule: Schedule, *, q_len: int, keys: int, block: int, tile_rows: int) -> np.ndarray:
    """How often each (row of q, key of all pieces) is summed by the kernel; keys beyond a segment count as an error."""
    count = np.zeros((q_len, keys), dtype=np.int64)
    for values in schedule.items.tolist():
        item = dict(zip(ITEM, values, strict=True))
        assert 0 < item["rows"] <= tile_rows
        seen = 0
        for row, j, masked in blocks_of(schedule, item, block):
            seen += 1
            r = np.arange(item["rows"])[:, None]
            key = np.arange(j, j + block)[None, :]
            if masked:
                visible = (key >= r + row["lower"]) & (key <= np.minimum(r + row["upper"], row["k_len"] - 1))
                assert visible.any(), "a block that no row sees is visited"
            else:
                visible = np.ones((item["rows"], block), dtype=bool)
                assert j + block <= row["k_len"], "an unmasked block reaches beyond its segment"
            assert j >= 0
            at = np.nonzero(visible)
            np.add.at(count, (item["q_row"] + at[0], row["k_row"] + j + at[1]), 1)
        assert seen == item["blocks"]
    return count


def distances(schedule: Schedule, *, q_len: int, keys: int, block: int) -> np.ndarray:
    """How far behind each key (of all pieces) each row of q is, where the kernel sums the pair, else 0."""
    found = np.zeros((q_len, keys), dtype=np.int64)
    for values in schedule.items.tolist():
        item = dict(zip(ITEM, values, strict=True))
        for row, j, _ in blocks_of(schedule, item, block):
            r = np.arange(item["rows"])[:, None]
            key = np.arange(j, j + block)[None, :]
            visible = (key >= r + row["lower"]) & (key <= np.minimum(r + row["upper"], row["k_len"] - 1))
            distance = row["distance"] + row["stride"] * (r - key)
            at = np.nonzero(visible)
            found[item["q_row"] + at[0], row["k_row"] + j + at[1]] = distance[at]
    return found


def true_distances(table: Table, *, q_len: int, keys: int, piece_length: int) -> np.ndarray:
    """The same from the table alone."""
    found = np.zeros((q_len, keys), dtype=np.int64)
    for s in table.segments:
        i, j = np.arange(s.q_len)[:, None], np.arange(s.k_len)[None, :]
        seen = (s.lower <= j - i) & (j - i <= s.upper)
        distance = s.q_position + s.stride * i - s.k_position - s.stride * j
        k_row = s.piece * piece_length + s.k_start
        part = found[s.q_start : s.q_start + s.q_len, k_row : k_row + s.k_len]
        part[seen] = distance[seen]
    return found


def visible_pairs(table: Table, *, q_len: int, keys: int, piece_length: int) -> np.ndarray:
    """How often each (row of q, key of all pieces) is visible, from the table alone."""
    count = np.zeros((q_len, keys), dtype=np.int64)
    for s in table.segments:
        i, j = np.arange(s.q_len)[:, None], np.arange(s.k_len)[None, :]
        seen = ((s.lower <= j - i) & (j - i <= s.upper)).astype(np.int64)
        k_row = s.piece * piece_length + s.k_start
        count[s.q_start : s.q_start + s.q_len, k_row : k_row + s.k_len] += seen
    return count
