"""The Hopper backward's walk over key tiles and blocks of queries in NumPy: the same loops and masks, no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ring_core.key_tiles import ITEM, WALK, Schedule
from ring_core.segment import Table


def blocks_of(schedule: Schedule, item: dict[str, int], members: int = 1) -> Iterator[tuple[dict[str, int], int, int]]:
    """(walk row, block, query head of the group) of each block a tile visits, in the kernel's order."""
    w, block, member = item["walk_start"], 0, 0
    for _ in range(item["blocks"] * members):
        row = dict(zip(WALK, schedule.walk[w].tolist(), strict=True))
        yield row, block, member
        block += 1
        if block == row["blocks"]:
            block = 0
            member += row["next"] <= w
            w = row["next"]


def visits(
    schedule: Schedule, *, q_len: int, pieces: int, length: int, block: int, tile_keys: int, members: int = 1
) -> np.ndarray:
    """How often each (query head of the group, row of q, key of all pieces) is summed by the kernel."""
    count = np.zeros((members, q_len, pieces * length), dtype=np.int64)
    for values in schedule.items.tolist():
        item = dict(zip(ITEM, values, strict=True))
        assert 0 < item["keys"] <= tile_keys
        first = item["piece"] * length + item["token"]
        for row, number, member in blocks_of(schedule, item, members):
            i = row["i_lo"] + number * block
            assert 0 <= i < row["q_len"], "a block beyond its segment"
            r, c = np.arange(tile_keys)[:, None], np.arange(block)[None, :]
            seen = np.ones((tile_keys, block), dtype=bool)
            if number < row["whole_from"] or number >= row["whole_to"]:
                at = np.maximum(r - (row["upper"] + i), -1)
                last = np.minimum(r - (row["lower"] + i), row["q_len"] - i - 1)
                seen = (c >= at) & (c <= np.where(r < item["keys"], last, -1))
            else:
                assert item["keys"] == tile_keys and i + block <= row["q_len"]
            keys, queries = np.nonzero(seen)
            np.add.at(count[member], (row["q_start"] + i + queries, first + keys), 1)
    return count


def distances(schedule: Schedule, *, q_len: int, pieces: int, length: int, block: int) -> np.ndarray:
    """How far behind each key (of all pieces) each row of q is, where the kernel sums the pair, else 0."""
    found = np.zeros((q_len, pieces * length), dtype=np.int64)
    for values in schedule.items.tolist():
        item = dict(zip(ITEM, values, strict=True))
        first = item["piece"] * length + item["token"]
        for row, number, _ in blocks_of(schedule, item):
            i = row["i_lo"] + number * block + np.arange(block)[None, :]
            r = np.arange(item["keys"])[:, None]
            seen = (row["lower"] <= r - i) & (r - i <= row["upper"]) & (i < row["q_len"])
            distance = row["distance"] + row["stride"] * (i - r)
            at = np.nonzero(seen)
            found[row["q_start"] + i[0, at[1]], first + at[0]] = distance[at]
    return found


def true_distances(table: Table, *, q_len: int, pieces: int, length: int) -> np.ndarray:
    """The same from the table alone."""
    found = np.zeros((q_len, pieces * length), dtype=np.int64)
    for s in table.segments:
        i, j = np.arange(s.q_len)[:, None], np.arange(s.k_len)[None, :]
        seen = (s.lower <= j - i) & (j - i <= s.upper)
        distance = s.q_position + s.stride * i - s.k_position - s.stride * j
        first = s.piece * length + s.k_start
        part = found[s.q_start : s.q_start + s.q_len, first : first + s.k_len]
        part[seen] = distance[seen]
    return found


def visible_pairs(table: Table, *, q_len: int, pieces: int, length: int) -> np.ndarray:
    """How often each (row of q, key of all pieces) is visible, from the table alone."""
    count = np.zeros((q_len, pieces * length), dtype=np.int64)
    for s in table.segments:
        i, j = np.arange(s.q_len)[:, None], np.arange(s.k_len)[None, :]
        first = s.piece * length + s.k_start
        seen = ((s.lower <= j - i) & (j - i <= s.upper)).astype(np.int64)
        count[s.q_start : s.q_start + s.q_len, first : first + s.k_len] += seen
    return count
