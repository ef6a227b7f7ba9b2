"""Work lists: which tile each program of a kernel owns. Made on the host, once for a table, kept in its cache.

A list has one int32 row (offset, begin, end, batch) for each tile, those with most to do first, so that none of them
starts when the others have finished. Segments [begin, end) are the tile's; batch -1 means every batch entry (the grid's
third axis).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ring_core.backend import DeviceTable
from ring_core.segment import COLUMNS, Table, count_pairs

Array = NDArray[Any]
Q_START, Q_LEN, K_LEN, LOWER, UPPER, BATCH = (
    COLUMNS.index(name) for name in ("q_start", "q_len", "k_len", "lower", "upper", "batch")
)


@dataclass(frozen=True)
class Work:
    """rows: int32 (T, 4) on the device; numbers: int32, the segments that [begin, end) counts, where they are not
    simply those of the table; entries: the grid's third axis."""

    rows: Tensor
    numbers: Tensor | None
    entries: int

    def __len__(self) -> int:
        return self.rows.shape[0]


def strip_work(table: DeviceTable, side: Literal["q", "k"], block: int, batches: int) -> Work:
    """Tiles of `block` queries (of keys) for a query-major (key-major) table; offset counts from the strip's first."""
    return _kept(table, ("strips", side, block, batches), lambda host: _strip_rows(host, side, block, batches))


def query_work(table: DeviceTable, block: int, batches: int, length: int, *, cover: bool) -> Work:
    """Tiles of `block` queries for a key-major table; offset counts from the sequence's first. cover: also the tiles
    that no segment touches."""
    key = "queries", block, batches, length, cover
    return _kept(table, key, lambda host: _query_rows(host, block, batches, length, cover))


def _kept(table: DeviceTable, key: tuple[Any, ...], make: Callable[[Table], tuple[Array, Array | None, int]]) -> Work:
    key = ("ring_triton", str(table.device), *key)
    cache = table.host.cache
    if key not in cache:
        rows, numbers, entries = make(table.host)
        on_device = [
            None if x is None else torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(table.device)
            for x in (rows, numbers)
        ]
        assert on_device[0] is not None
        cache[key] = Work(on_device[0], on_device[1], entries)
    work: Work = cache[key]
    return work


def _expanded(begin: Array, count: Array) -> tuple[Array, Array]:
    """(which, index): the ranges [begin, begin + count) one after the other, and the range that each comes from."""
    which = np.repeat(np.arange(len(begin)), count)
    first = np.cumsum(count) - count
    return which, np.arange(len(which)) - first[which] + begin[which]


def _longest_first(rows: Array, pairs: Array) -> Array:
    sorted_rows: Array = rows[np.argsort(-pairs, kind="stable")]
    return sorted_rows


def _strip_rows(host: Table, side: str, block: int, batches: int) -> tuple[Array, None, int]:
    groups = host.groups.astype(np.int64)
    begin, end = groups[:-1], groups[1:]
    table = host.rows.astype(np.int64)
    length = table[begin, Q_LEN if side == "q" else K_LEN]
    group, number = _expanded(np.zeros_like(begin), -(-length // block))
    offset = number * block
    rows = np.stack([offset, begin[group], end[group], table[begin[group], BATCH]], axis=1)
    tile, at = _expanded(begin[group], (end - begin)[group])
    segment, a = table[at], offset[tile]
    own = np.minimum(block, length[group][tile] - a)
    q_len, k_len, shift = (own, segment[:, K_LEN], a) if side == "q" else (segment[:, Q_LEN], own, -a)
    pairs = count_pairs(q_len, k_len, segment[:, LOWER] + shift, segment[:, UPPER] + shift)
    rows = _longest_first(rows, np.bincount(tile, pairs, minlength=len(rows)))
    if (rows[:, 3] < 0).all():
        return rows, None, batches
    copies = np.where(rows[:, 3] < 0, batches, 1)  # some entries have rows of their own: each tile names its entry
    which, entry = _expanded(np.maximum(rows[:, 3], 0), copies)
    rows = rows[which]
    rows[:, 3] = entry
    return rows, None, 1


def _query_rows(host: Table, block: int, batches: int, length: int, cover: bool) -> tuple[Array, Array, int]:
    table = host.rows.astype(np.int64)
    shared = bool((table[:, BATCH] < 0).all())
    entries = 1 if shared else batches
    number = np.flatnonzero((table[:, Q_LEN] > 0) & (table[:, K_LEN] > 0))
    copies = np.where(table[number, BATCH] < 0, entries, 1)
    which, entry = _expanded(np.maximum(table[number, BATCH], 0), copies)
    number = number[which]
    q_start, q_stop = table[number, Q_START], table[number, Q_START] + table[number, Q_LEN]
    which, tile = _expanded(q_start // block, -(-q_stop // block) - q_start // block)
    number, entry = number[which], entry[which]
    order = np.lexsort((number, tile, entry))
    number, tile, entry = number[order], tile[order], entry[order]
    tiles = -(-length // block)
    count = np.bincount(entry * tiles + tile, minlength=entries * tiles)
    end = np.cumsum(count)
    place = np.arange(entries * tiles)
    batch = np.full_like(place, -1) if shared else place // max(1, tiles)
    rows = np.stack([place % max(1, tiles) * block, end - count, end, batch], axis=1)
    segment = table[number]
    shift = np.maximum(tile * block - segment[:, Q_START], 0)
    stop = np.minimum((tile + 1) * block - segment[:, Q_START], segment[:, Q_LEN])
    pairs = count_pairs(stop - shift, segment[:, K_LEN], segment[:, LOWER] + shift, segment[:, UPPER] + shift)
    weight = np.bincount(entry * tiles + tile, pairs, minlength=len(rows))
    if not cover:
        rows, weight = rows[count > 0], weight[count > 0]
    return _longest_first(rows, weight), number, batches if shared else 1
