"""The plans of the two schedules: what they compute in each step and what they send in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ring_core import ranges
from ring_core.layout import local_runs
from ring_core.plan.needs import Keys, needed, needed_by
from ring_core.plan.packed import PackedProblem
from ring_core.plan.problem import Problem
from ring_core.plan.tiling import K_START, PIECE, RUN, STEP, key_major, query_major, table, tables_by_step
from ring_core.ranges import Ranges
from ring_core.segment import Array, Table


@dataclass(frozen=True, slots=True)
class Hop:
    """Round h of the ring: keys and values of rank (r - h) come from r - 1, those of (r - h + 1) go to r + 1. Ranges of
    the owner's chunk; empty ones are not sent."""

    send: Ranges
    receive: Ranges


@dataclass(frozen=True, slots=True)
class GradientHop:
    """What becomes of the dk, dv of rank (r - h) once step h has computed this rank's part of them.

    arriving: what earlier visitors have summed, from rank r - 1; own: what this rank adds; holding: the union, which
    goes to `target` (the next visitor, or the owner from the last; None: nothing to send).
    """

    arriving: Ranges
    own: Ranges
    holding: Ranges
    target: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the backend: segments over the pieces present."""

    forward: Table
    backward: Table


@dataclass(frozen=True, eq=False)
class RingPlan:
    """Neighbour to neighbour: step h computes on the keys of rank (r - h) mod W, which arrived by hop h. One piece a
    step: the ranges of that rank's chunk that this rank or one behind it needs."""

    problem: Problem | PackedProblem
    rank: int
    steps: tuple[Step, ...]
    hops: tuple[Hop, ...]  # hops[0] is empty: own keys are here
    gradient_hops: tuple[GradientHop, ...]
    home: tuple[int, int, Ranges] | None  # (source rank, after its step, ranges of own chunk): own dk, dv coming home
    spans_steps: bool  # some strip begins in one step and ends in another

    def source(self, step: int) -> int:
        """Whose keys step `step` computes on."""
        return (self.rank - step) % self.problem.world_size

    @property
    def key_tokens(self) -> dict[int, int]:
        """Tokens of keys and values sent, by target rank (each pass, forward or backward)."""
        total = sum(ranges.count(hop.send) for hop in self.hops)
        return {(self.rank + 1) % self.problem.world_size: total} if total else {}

    @property
    def gradient_tokens(self) -> dict[int, int]:
        """Tokens of dk and dv sent, by target rank."""
        sent: dict[int, int] = {}
        for hop in self.gradient_hops:
            if hop.target is not None:
                sent[hop.target] = sent.get(hop.target, 0) + ranges.count(hop.holding)
        return sent

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs that this rank computes."""
        return sum(step.forward.pairs for step in self.steps)


class Placement(NamedTuple):
    """Keys [start, start + length) of rank `source`'s chunk lie in piece `piece` from `offset` on."""

    source: int
    start: int
    length: int
    piece: int
    offset: int


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """Every rank takes what it will see, and only that, and computes on all of it in one step.

    Pieces of `piece_length` tokens each, in global order (contiguous and stripe: chunks; zigzag: half-chunks), hold the
    keys; placements: which keys lie where, own ones included, by piece and offset; order: the ranks to take them from,
    own first, then by ring distance, so that no two ranks pull from one peer at the same time; receive, send: ranges
    of the peer's and of the own chunk, by peer, peers without any left out.

    Where some queries see keys of their own rank alone (documents that end where chunks do), there is a second step for
    them, which waits for nothing: its one piece is tokens [home[0], home[1]) of the own chunk.
    """

    problem: Problem | PackedProblem
    rank: int
    steps: tuple[Step, ...]
    piece_count: int
    piece_length: int
    placements: tuple[Placement, ...]
    order: tuple[int, ...]
    receive: dict[int, Ranges]
    send: dict[int, Ranges]
    spans_steps: bool = False
    home: tuple[int, int] | None = None

    @property
    def key_tokens(self) -> dict[int, int]:
        """Tokens of keys and values sent, by target rank (forward; backward too where they are not kept)."""
        return {peer: ranges.count(wanted) for peer, wanted in self.send.items()}

    @property
    def gradient_tokens(self) -> dict[int, int]:
        """Tokens of dk and dv sent, by target rank."""
        return {peer: ranges.count(taken) for peer, taken in self.receive.items()}

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs that this rank computes."""
        return sum(step.forward.pairs for step in self.steps)


Plan = RingPlan | GatherPlan


def ring_plan(problem: Problem, rank: int) -> RingPlan:
    """The ring for one sequence."""
    world_size = problem.world_size
    distance = np.arange(world_size)
    keys = Keys.of(problem, (rank - distance) % world_size)
    here, there = np.full(world_size, rank), keys.source + 1  # the ranks that a chunk has yet to see, and has seen
    incoming = needed_by(problem, keys, here, world_size - distance)
    incoming[0] = ()
    own = needed_by(problem, keys, here, np.ones_like(distance))
    onward = needed_by(problem, keys, here + 1, world_size - 1 - distance)
    arrived = needed_by(problem, keys, there, np.maximum(distance - 1, 0))
    holding = needed_by(problem, keys, there, distance)

    gradient_hops = [GradientHop((), own[0], (), None)]
    for h in range(1, world_size):
        target = (rank + 1) % world_size if onward[h] else int(keys.source[h])
        if not incoming[h]:  # nobody from here on needs this chunk: it did not come, its gradients went home before
            gradient_hops.append(GradientHop((), (), (), None))
        else:
            gradient_hops.append(GradientHop(arrived[h], own[h], holding[h], target))
    hops = [Hop((), ())] + [Hop(onward[h - 1], incoming[h]) for h in range(1, world_size)]

    query_rows, query_strips = query_major(problem, rank, keys)
    key_rows, key_strips = key_major(problem, rank, keys)
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
    return RingPlan(problem, rank, steps, tuple(hops), tuple(gradient_hops), _way_home(problem, rank), spans)


def into_parcels(rows: Array, parcels: list[Ranges]) -> None:
    """Turns k_start, local to the owner's chunk, into the place in the packed parcel that arrived; own keys are read in
    place."""
    shift = [0 if not parcel else -parcel[0][0] for parcel in parcels]
    rows[:, K_START] += np.array(shift)[rows[:, STEP]]
    for step, parcel in enumerate(parcels):
        if len(parcel) > 1:
            at = np.flatnonzero(rows[:, STEP] == step)
            starts = np.array([start for start, _ in parcel])
            offsets = np.cumsum([0] + [stop - start for start, stop in parcel[:-1]])
            local = rows[at, K_START] + parcel[0][0]
            which = np.searchsorted(starts, local, side="right") - 1
            rows[at, K_START] = offsets[which] + local - starts[which]


def _way_home(problem: Problem, rank: int) -> tuple[int, int, Ranges] | None:
    """Who brings the finished dk, dv of `rank` home: the last on the ring to need its keys, after its step of that
    distance."""
    world_size = problem.world_size
    if world_size == 1:
        return None
    others = (rank + np.arange(1, world_size)) % world_size
    keys = Keys.of(problem, np.full(world_size - 1, rank))
    visits = [h for h, need in enumerate(needed_by(problem, keys, others, np.ones_like(others)), start=1) if need]
    if not visits:
        return None
    own = Keys.of(problem, np.array([rank]))
    everyone = needed_by(problem, own, np.array([rank + 1]), np.array([world_size - 1]))[0]
    return (rank + visits[-1]) % world_size, visits[-1], everyone


def gather_plan(problem: Problem, rank: int) -> GatherPlan:
    """The gather for one sequence."""
    world_size = problem.world_size
    distance = np.arange(world_size)
    keys = Keys.of(problem, (rank - distance) % world_size)
    need = needed_by(problem, keys, np.full(world_size, rank), np.ones_like(distance))
    own = Keys.of(problem, np.full(world_size, rank))
    wanted = needed_by(problem, own, distance, np.ones_like(distance))

    whole = local_runs(problem.layout, rank, world_size, problem.k_length)
    here = np.full(world_size, rank)
    low, high = needed(problem, keys, here, here)
    read = np.argwhere((high > low).any(axis=-1))
    read = read[np.argsort(keys.index[tuple(read.T)], kind="stable")]
    number = np.zeros(keys.index.shape, np.int64)
    placements = []
    for place, (distant, run) in enumerate(read.tolist()):
        number[distant, run] = place
        first, end = whole[run].start, whole[run].start + whole[run].length
        for a, b in need[distant]:
            start, stop = max(a, first), min(b, end)
            if start < stop:
                placements.append(Placement(int(keys.source[distant]), start, stop - start, place, start - first))

    query_rows, query_strips = query_major(problem, rank, keys)
    key_rows, key_strips = key_major(problem, rank, keys)
    starts = np.array([run.start for run in whole])
    for rows in (query_rows, key_rows):
        rows[:, PIECE] = number[rows[:, STEP], rows[:, RUN]]
        rows[:, K_START] -= starts[rows[:, RUN]]
    remote_first = np.argsort(key_rows[:, STEP] == 0, kind="stable")
    step = Step(table(query_rows, query_strips), table(key_rows[remote_first], key_strips[remote_first]))
    sources = keys.source.tolist()
    return GatherPlan(
        problem,
        rank,
        (step,),
        len(read),
        whole[0].length if len(read) else 0,
        tuple(placements),
        tuple(source for source, taken in zip(sources, need, strict=True) if taken),
        {source: taken for source, taken in zip(sources, need, strict=True) if taken and source != rank},
        {peer: given for peer, given in enumerate(wanted) if given and peer != rank},
    )
