"""Cuts a rank's share of the score matrix into segments, vectorised over all sources of keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ring_core.layout import Run, local_runs
from ring_core.plan.needs import Keys
from ring_core.plan.problem import Problem
from ring_core.segment import COLUMNS, FIRST, LAST, Array, Table

STRIP_MULTIPLE = 128
"""Strips of queries begin at multiples of this from their run's first token, so that a kernel's tiles (64, 128 rows)
stay whole."""


def _bands(problem: Problem, query: Run, keys: Keys) -> tuple[Array, Array]:
    """lower, upper (sources, runs) of a run of queries against runs of keys, counted from the first token of each."""
    left, right = problem.bounds
    distance = query.index + problem.offset - keys.index
    return -((left - distance) // keys.stride), (right + distance) // keys.stride


def _strips(length: int, edges: Array) -> Array:
    """Cuts [0, length) at the edges, moved outward to whole tiles: the boundaries."""
    return np.unique(np.clip(np.concatenate([edges, [0, length]]), 0, length))


def _outward(start: Array, stop: Array, length: int | Array) -> tuple[Array, Array]:
    start = start // STRIP_MULTIPLE * STRIP_MULTIPLE
    return start, np.minimum(-(-stop // STRIP_MULTIPLE) * STRIP_MULTIPLE, length)


def _columns(problem: Problem, query: Run, keys: Keys, at: tuple[Array, ...], block: tuple[Array, ...]) -> Array:
    """Rows (N, 14) = step, run, then the columns of `Segment` with piece 0, k_start local to the chunk and no flags,
    for the rectangles block = (q0, q1, k0, k1), counted from the runs' first tokens, of queries and keys at (step,
    run)."""
    q0, q1, k0, k1 = block
    lower, upper = (band[at] for band in _bands(problem, query, keys))
    q_len, k_len = q1 - q0, k1 - k0
    lower = np.clip(lower + q0 - k0, -q_len, k_len)
    upper = np.clip(upper + q0 - k0, -q_len, k_len)
    stride = np.full_like(q_len, keys.stride)
    q_position = query.index + problem.offset + keys.stride * q0
    k_position = keys.index[at] + keys.stride * k0
    zero = np.zeros_like(q_len)
    columns = [query.start + q0, q_len, zero, keys.start[at] + k0, k_len, lower, upper, q_position, k_position, stride]
    return np.stack([*at, *columns, zero - 1, zero], axis=1)


STEP, RUN, _, _, PIECE, K_START = range(6)
FLAGS = 2 + COLUMNS.index("flags")


def query_major(problem: Problem, rank: int, keys: Keys) -> tuple[Array, Array]:
    """All segments of a rank by strip, then step: rows (N, 14) as in `_columns`, and the strip of each."""
    parts: list[Array] = []
    strips: list[Array] = []
    count = 0
    padded = local_runs(problem.layout, rank, problem.world_size, problem.q_length)
    for run, whole in zip(problem.query_runs(rank), padded, strict=True):
        lower, upper = _bands(problem, run, keys)
        first, stop = np.maximum(0, -upper), np.minimum(run.length, keys.length - lower)
        # An empty band is a window that falls between two tokens of a stripe.
        seen = (keys.length > 0) & (stop > first) & (lower <= upper)
        first, stop = _outward(np.where(seen, first, 0), np.where(seen, stop, 0), run.length)
        edges = _strips(run.length, np.concatenate([first[seen], stop[seen]]))
        if whole.length > run.length:  # padding rows: strips that see nothing
            edges = np.unique(np.append(edges, whole.length))
        for a, b in pairwise(edges.tolist()):
            at: tuple[Array, ...] = np.nonzero(seen & (first <= a) & (stop >= b))  # ordered by step, then run
            k0 = np.maximum(a + lower[at], 0)
            k1 = np.minimum(b + upper[at], keys.length[at])
            block: tuple[Array, ...] = (np.full_like(k0, a), np.full_like(k0, b), k0, np.maximum(k1, k0))
            if not len(k0):  # rows that see nothing are written all the same: out 0, lse -inf
                at = (np.zeros(1, np.int64), np.zeros(1, np.int64))
                block = tuple(np.array([x]) for x in (a, b, 0, 0))
            rows = _columns(problem, run, keys, at, block)
            rows[0, FLAGS] |= FIRST
            rows[-1, FLAGS] |= LAST
            parts.append(rows)
            strips.append(np.full(len(rows), count))
            count += 1
    if not parts:
        return np.zeros((0, 14), np.int64), np.zeros(0, np.int64)
    return np.concatenate(parts), np.concatenate(strips)


def key_major(problem: Problem, rank: int, keys: Keys) -> tuple[Array, Array]:
    """All segments of a rank by step, then strip of keys: rows (N, 14) as in `_columns`, and the strip of each."""
    queries = [run for run in problem.query_runs(rank) if run.length]
    bands = [_bands(problem, run, keys) for run in queries]
    visible = []
    for run, (lower, upper) in zip(queries, bands, strict=True):
        first, stop = np.maximum(0, lower), np.minimum(keys.length, run.length + upper)
        seen = (stop > first) & (lower <= upper)
        visible.append((seen, np.where(seen, first, 0), np.where(seen, stop, 0)))
    if not visible:
        return np.zeros((0, 14), np.int64), np.zeros(0, np.int64)
    # Boundaries of the strips of every run of keys: (sources, runs, 2 + 2 * queries), sorted; repeated ones make empty
    # strips.
    edges = [np.zeros_like(keys.length), keys.length]
    for _, first, stop in visible:
        edges += [first, stop]
    cuts = np.sort(np.stack(edges, -1), -1)
    begin, end = cuts[..., :-1], cuts[..., 1:]
    parts: list[Array] = []
    order: list[Array] = []
    for number, (run, (lower, upper), (seen, first, stop)) in enumerate(zip(queries, bands, visible, strict=True)):
        at = np.nonzero((end > begin) & seen[..., None] & (first[..., None] <= begin) & (stop[..., None] >= end))
        source = at[:2]
        k0, k1 = begin[at], end[at]
        q0 = np.maximum(k0 - upper[source], 0)
        q1 = np.minimum(k1 - lower[source], run.length)
        parts.append(_columns(problem, run, keys, source, (q0, np.maximum(q1, q0), k0, k1)))
        order.append(np.ravel_multi_index(at, end.shape) * len(queries) + number)
    rows, ranking = np.concatenate(parts), np.concatenate(order)
    sorting = np.argsort(ranking, kind="stable")
    return rows[sorting], ranking[sorting] // len(queries)


def table(rows: Array, strips: Array) -> Table:
    groups = np.flatnonzero(np.concatenate([[True], strips[1:] != strips[:-1], [True]])) if len(rows) else np.zeros(1)
    return Table(np.ascontiguousarray(rows[:, 2:], dtype=np.int32), groups.astype(np.int32))


def tables_by_step(rows: Array, strips: Array, steps: int) -> Iterator[Table]:
    """One table a step, segments in their order."""
    sorting = np.argsort(rows[:, STEP], kind="stable")
    rows, strips = rows[sorting], strips[sorting]
    step = rows[:, STEP]
    data = np.ascontiguousarray(rows[:, 2:], dtype=np.int32)
    begins = np.ones(len(rows), bool)
    begins[1:] = (strips[1:] != strips[:-1]) | (step[1:] != step[:-1])
    groups = np.append(np.flatnonzero(begins), len(rows)).astype(np.int32)
    edges = np.searchsorted(step, np.arange(steps + 1))
    first_group = np.searchsorted(groups, edges).tolist()
    edges = edges.tolist()
    for start, stop, low, high in zip(edges, edges[1:], first_group, first_group[1:], strict=False):
        yield Table(data[start:stop], groups[low : high + 1] - groups[low])
