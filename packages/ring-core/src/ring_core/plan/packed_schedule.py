"""The plans of both schedules for packed documents.

A part (queries of one run in one document) is a strip: no strip crosses a document, so none is rounded to whole tiles.
Its keys lie in the stream in one piece. In the gather, whose pieces hold keys in stream order, it is one segment; in
the ring one a run of keys.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ring_core.plan.dealing import waits
from ring_core.plan.packed import PackedProblem, Parts
from ring_core.plan.schedule import GatherPlan, GradientHop, Hop, Placement, RingPlan, Step, into_parcels
from ring_core.plan.tiling import FLAGS, K_START, STEP, table, tables_by_step
from ring_core.segment import FIRST, LAST, Array


def packed_ring_plan(problem: PackedProblem, rank: int) -> RingPlan:
    """The ring for packed documents: messages follow from who needs which stretch of keys how far from its owner."""
    world_size, needs = problem.world_size, problem.needed_at_distance
    distance = (rank - problem.stretches.owner) % world_size
    column = np.arange(len(distance))
    nobody = np.zeros((1, len(column)), bool)
    from_here = np.concatenate([np.logical_or.accumulate(needs[::-1])[::-1], nobody])  # at distance h or further
    up_to_here = np.logical_or.accumulate(np.concatenate([nobody, needs[1:]]))  # at distance 1, …, h

    def by_distance(chosen: Array) -> list[tuple[tuple[int, int], ...]]:
        by_owner = problem.by_owner(chosen)
        return [by_owner[(rank - h) % world_size] for h in range(world_size)]

    incoming = by_distance(from_here[distance, column] & (distance > 0))
    onward = by_distance(from_here[distance + 1, column])
    own = by_distance(needs[distance, column])
    arrived = by_distance(up_to_here[np.maximum(distance - 1, 0), column])
    holding = by_distance(up_to_here[distance, column])
    gradient_hops = [GradientHop((), own[0], (), None)]
    for h in range(1, world_size):
        target = (rank + 1) % world_size if onward[h] else (rank - h) % world_size
        if not incoming[h]:
            gradient_hops.append(GradientHop((), (), (), None))
        else:
            gradient_hops.append(GradientHop(arrived[h], own[h], holding[h], target))
    hops = [Hop((), ())] + [Hop(onward[h - 1], incoming[h]) for h in range(1, world_size)]

    home = None
    mine = problem.stretches.owner == rank
    visits = np.flatnonzero((needs & mine).any(axis=1)[1:]) + 1
    if len(visits):
        home = ((rank + int(visits[-1])) % world_size, int(visits[-1]), problem.by_owner(up_to_here[-1] & mine)[rank])

    query_rows, query_strips = _by_run_of_keys(problem, rank)
    key_rows, key_strips = _key_major(problem, _of_rank(problem.parts, rank), rank)
    for rows in (query_rows, key_rows):
        into_parcels(rows, incoming)
    steps = tuple(
        Step(forward, backward)
        for forward, backward in zip(
            tables_by_step(query_rows, query_strips, world_size),
            tables_by_step(key_rows, key_strips, world_size),
            strict=True,
        )
    )
    spans = bool(((query_strips[1:] == query_strips[:-1]) & (query_rows[1:, STEP] != query_rows[:-1, STEP])).any())
    return RingPlan(problem, rank, steps, tuple(hops), tuple(gradient_hops), home, spans)


def packed_gather_plan(problem: PackedProblem, rank: int) -> GatherPlan:
    """The gather for packed documents: one piece with all the keys of queries that see some of other ranks, in stream
    order; a step of their own for all other queries."""
    world_size, stretches = problem.world_size, problem.stretches
    here, there = (_of_rank(parts, rank) for parts in _by_wait(problem))
    needed = problem.needed_by(there, rank)
    taken = problem.by_owner(needed)
    order = [(rank - h) % world_size for h in range(world_size)]
    mine = stretches.owner == rank
    given = [problem.by_owner(problem.needed[peer] & mine)[rank] for peer in range(world_size)]

    start, stop, owner, local = (x[needed] for x in stretches)
    begins = np.ones(len(start), bool)
    begins[1:] = (start[1:] != stop[:-1]) | (owner[1:] != owner[:-1]) | (local[1:] != (local + stop - start)[:-1])
    ends = np.ones(len(start), bool)
    ends[:-1] = begins[1:]
    start, stop, owner, local = start[begins], stop[ends], owner[begins], local[begins]
    offset = np.cumsum(stop - start) - (stop - start)
    placements = zip(*(x.tolist() for x in (owner, local, stop - start, np.zeros_like(owner), offset)), strict=True)

    steps, home = [_step(problem, there, start, offset - start)], None
    if len(here.start):
        own, seen = problem.keys, here.high > here.low
        cell = own.of_token(here.low[seen])
        low = own.local[cell] + here.low[seen] - own.start[cell]
        home = (int(low.min()), int((low + here.high[seen] - here.low[seen]).max())) if seen.any() else (0, 0)
        steps.append(_step(problem, here, own.start, own.local - own.start - home[0]))
    return GatherPlan(
        problem,
        rank,
        tuple(steps),
        1,
        int((stop - start).sum()),
        tuple(Placement(*placement) for placement in placements),
        tuple(source for source in order if taken[source]),
        {source: taken[source] for source in order if taken[source] and source != rank},
        {peer: ranges for peer, ranges in enumerate(given) if ranges and peer != rank},
        home=home,
    )


@lru_cache(maxsize=256)
def most_gathered(problem: PackedProblem) -> int:
    """Tokens of the largest piece that a rank gathers: all the keys of queries that see some of other ranks."""
    return int(problem.lengths_needed_by(_by_wait(problem)[1]).max(initial=0))


def _by_wait(problem: PackedProblem) -> tuple[Parts, Parts]:
    """Parts whose queries see keys of their own rank only, and those that see others'."""
    parts = problem.parts
    waiting = waits(problem.documents, problem.keys, parts.start, parts.stop, parts.owner)
    return Parts(*(column[~waiting] for column in parts)), Parts(*(column[waiting] for column in parts))


def _step(problem: PackedProblem, parts: Parts, start: Array, shift: Array) -> Step:
    """The tables of some of a rank's parts; keys from start[i] of the stream on lie shift[i] further in the piece."""
    query_rows, query_strips = _rows(problem, parts, np.arange(len(parts.start)), parts.low, parts.high)
    query_rows[:, FLAGS] = FIRST | LAST
    key_rows, key_strips = _key_major(problem, parts)
    for rows in (query_rows, key_rows):
        if len(start):
            run = np.clip(np.searchsorted(start, rows[:, K_START], side="right") - 1, 0, None)
            rows[:, K_START] += np.where(rows[:, K_START + 1] > 0, shift[run], -rows[:, K_START])
    return Step(table(query_rows, query_strips), table(key_rows, key_strips))


def _of_rank(parts: Parts, rank: int) -> Parts:
    mine = parts.owner == rank
    return Parts(*(column[mine] for column in parts))


def _rows(problem: PackedProblem, parts: Parts, strips: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Rows (N, 14) as in `tiling`, at step 0, of whole parts against keys [low, high) of the stream, which k_start
    counts; and their strips."""
    left, right = problem.documents.bounds
    empty = high <= low
    low, high = np.where(empty, 0, low), np.where(empty, 0, high)
    q_position = parts.start + problem.documents.offset(parts.document)
    q_len, k_len = parts.stop - parts.start, high - low
    lower = np.clip(q_position - low - left, -q_len, k_len)
    upper = np.clip(q_position - low + right, -q_len, k_len)
    zero = np.zeros_like(low)
    columns = [
        zero,
        zero,
        parts.local,
        q_len,
        zero,
        low,
        k_len,
        lower,
        upper,
        q_position,
        low,
        zero + 1,
        zero - 1,
        zero,
    ]
    return np.stack(columns, axis=1), strips


def _expand(first: Array, count: Array) -> tuple[Array, Array]:
    """(which, what): entry n repeated count[n] times, with first[n], first[n] + 1, …"""
    which = np.repeat(np.arange(len(first)), count)
    what = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + first[which]
    return which, what


def _by_run_of_keys(problem: PackedProblem, rank: int) -> tuple[Array, Array]:
    """Query-major: every part against each run of keys that it sees something of; by part, then step."""
    parts, cells = _of_rank(problem.parts, rank), problem.keys
    seen = parts.high > parts.low
    first = np.where(seen, cells.of_token(parts.low), 0)
    last = np.where(seen, cells.of_token(parts.high - 1), 0)
    which, cell = _expand(first, last - first + 1)
    parts, seen = Parts(*(column[which] for column in parts)), seen[which]
    if not len(cells.start):  # no keys anywhere
        rows, _ = _rows(problem, parts, which, parts.low, parts.low)
    else:
        low, high = np.maximum(parts.low, cells.start[cell]), np.minimum(parts.high, cells.stop[cell])
        rows, _ = _rows(problem, parts, which, low, np.where(seen, high, low))
        _from_runs(problem, rank, rows, cell, seen)
    order = np.lexsort([cell, rows[:, STEP], which])
    rows, strips = rows[order], which[order]
    begins = np.ones(len(rows), bool)
    begins[1:] = strips[1:] != strips[:-1]
    ends = np.ones(len(rows), bool)
    ends[:-1] = begins[1:]
    rows[:, FLAGS] = FIRST * begins + LAST * ends
    return rows, strips


def _key_major(problem: PackedProblem, parts: Parts, ring_rank: int | None = None) -> tuple[Array, Array]:
    """Keys cut where some part begins or ends to see them, and in the ring of a rank where a run ends: by step, then
    strip."""
    cells = problem.keys
    parts = Parts(*(column[parts.high > parts.low] for column in parts))
    edges = np.unique(np.concatenate([parts.low, parts.high, *([] if ring_rank is None else [cells.start])]))
    first, last = np.searchsorted(edges, parts.low), np.searchsorted(edges, parts.high)
    which, strip = _expand(first, last - first)
    parts = Parts(*(column[which] for column in parts))
    low, high = edges[strip], edges[strip + 1]
    # Only the rows that see some of these keys.
    left, right = problem.documents.bounds
    position = parts.start + problem.documents.offset(parts.document)
    begin = np.maximum(low - right - position, 0)
    end = np.minimum(high + left - position, parts.stop - parts.start)
    parts = parts._replace(start=parts.start + begin, stop=parts.start + end, local=parts.local + begin)
    rows, _ = _rows(problem, parts, strip, low, high)
    if ring_rank is not None and len(rows):
        _from_runs(problem, ring_rank, rows, cells.of_token(low), np.ones(len(rows), bool))
    order = np.lexsort([which, strip, rows[:, STEP]])
    return rows[order], strip[order]


def _from_runs(problem: PackedProblem, rank: int, rows: Array, cell: Array, seen: Array) -> None:
    """Fills in the step in which each row's run of keys is there, and counts k_start in its owner's tokens."""
    cells = problem.keys
    rows[:, STEP] = np.where(seen, (rank - cells.owner[cell]) % problem.world_size, 0)
    rows[:, K_START] += np.where(seen, cells.local[cell] - cells.start[cell], 0)
