"""The gather's courier through peer memory: every rank publishes its keys in an arena that all others can read, and
takes what it needs itself; contributions to gradients are published by those who made them and taken by the owners.

    rank r                                             rank p
    wait until all have read what the slot held
    copy k, v into slot (epoch mod 2)
    PUBLISHED := epoch   ───────────────────────────►  wait for it, pull the ranges it needs
    wait for all to have READ epoch - 2 next time  ◄─  READ := epoch

Two generations: while a rank still reads epoch e, its peers may already publish e + 1, but not e + 2. Every rank makes
the same calls in the same order, so the epochs agree without being sent. Each counter has one writer. A rank that fails
poisons its arena, and every wait is bounded, so nobody waits for the dead. `PeerMemory` is what such an arena must
offer: `ring_core.comm.symmetric_memory` between the GPUs of one host, `ring_core.comm.shared_memory` between processes
of one host, without GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_core._torch import lasting
from ring_core.backend import Flags, accumulation_dtype
from ring_core.comm.contributions import arrival_places, arrivals, pieces_of, published, stretches
from ring_core.comm.gather import Heads, of_heads
from ring_core.comm.lane import Lane, compute_now
from ring_core.comm.packing import side_by_side
from ring_core.comm.traffic import count_sent, counting
from ring_core.comm.transport import nothing
from ring_core.plan import GatherPlan, make_plan
from ring_core.ranges import count

PUBLISHED, READ = 0, 1
COUNTERS = 2
GENERATIONS = 2
MOST_PIECES = 2  # of a rank: a zigzag chunk's halves


class Copy(NamedTuple):
    """Bytes of a rank's slot, and where they go in the target."""

    rank: int
    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Pull:
    """Copies that are made together; one object for all times, by which a memory may remember what they come to."""

    copies: tuple[Copy, ...]


class Leg(NamedTuple):
    """What a rank waits for: pieces, and what their departure counters come to."""

    rank: int
    full: tuple[tuple[int, int], ...]


View = tuple[int, int, torch.dtype, torch.Size]
"""Generation, first byte, dtype, shape."""
MOST_VIEWS = 256


class PeerMemory(Protocol):
    """One symmetric arena of a group: a slot of equal size per generation and a few counters, readable by all, written
    by its owner. On CUDA everything but `reserve` and `poison` is enqueued on the current stream."""

    rank: int
    world_size: int
    views: dict[View, Tensor]
    """Of the own slots, as they were asked for; empty again once it has grown."""

    def reserve(self, nbytes: int) -> None:
        """At least so many bytes a slot. Collective: all ranks ask for the same, and it grows when no rank uses it."""
        ...

    def slot(self, rank: int, generation: int) -> Tensor:
        """uint8 (nbytes,): a rank's slot."""
        ...

    def next_epoch(self) -> int:
        """1, 2, 3, … in step on all ranks."""
        ...

    def signal(self, counter: int, epoch: int) -> None:
        """Sets an own counter, after all that was written before."""
        ...

    def wait(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        """Until the ranks' counters are at least `epoch`. Raises RingCommError, naming the rank, on poison or when time
        is up (on CUDA: at a later call)."""
        ...

    def exchange(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        """`signal`, then `wait`."""
        ...

    def flags(self, pieces: int, epoch: int) -> Flags:
        """Arrival flags of so many pieces, for this epoch: all of them down."""
        ...

    def arrive(self, pieces: tuple[int, ...], epoch: int) -> None:
        """Raises their flags, after all that was copied before. Called once before anybody looks at `Flags.epoch`,
        which it sets."""
        ...

    def depart(self, departures: Tensor, legs: list[Leg], counter: int, epoch: int) -> None:
        """For each leg in turn: once its pieces' counters are full, signals to its rank alone."""
        ...

    def pull(self, target: Tensor, generation: int, pull: Pull) -> None:
        """Copies bytes of ranks' slots into `target`, which is contiguous."""
        ...

    def watch(self, epoch: int) -> None:
        """All waiting for this epoch is enqueued: from now on it has so long as RING_TIMEOUT says."""
        ...

    def poison(self) -> None:
        """Tells all who wait for this rank that it has failed."""
        ...


class PeerCourier:
    """One arena for keys, one for contributions. A slot of keys holds them group after group of heads, (B, S, 2, h, D)
    each, so that what a peer pulls is contiguous; a slot of contributions is what the backend adds into,
    (B, C * S_piece, 2, h, D), and their owners know from their maker's plan what lies where."""

    def __init__(self, plan: GatherPlan, memories: Callable[[str], PeerMemory], lanes: tuple[Lane, Lane]) -> None:
        self._plan = plan
        self._keys, self._gradients = memories("keys"), memories("gradients")
        self._epoch = self._parts_epoch = 0
        self._what: _What  # once offered or recalled
        self.lane, self.home_lane = lanes
        self.offered: torch.Event | None = None
        self.pieces = pieces_of(plan)
        self._zeroed: torch.Event | None = None

    def offer(self, k: Tensor, v: Tensor, groups: Heads) -> None:
        memory, plan = self._keys, self._plan
        self.recall(k, groups)
        what = self._what
        with _Poisoning(memory):
            memory.reserve(what.keys_nbytes)
            self._epoch = self._begin(memory)
            for heads, (start, shape) in zip(groups, what.slot, strict=True):
                mine = _view(memory, self._epoch, start, k.dtype, shape)
                side_by_side(of_heads(k, heads), of_heads(v, heads), mine, published(plan))
            if plan.home is not None:
                self.offered = self.lane.now()
            memory.exchange(PUBLISHED, self._epoch, what.sources)
        if counting():
            for peer, wanted in plan.send.items():
                count_sent("keys", peer, k.shape[0] * count(wanted) * k.shape[2] * what.row)

    def recall(self, k: Tensor, groups: Heads) -> None:
        ends = tuple([heads.stop for heads in groups])
        self._what = _what(self._plan, k.shape[0], k.shape[3], k.dtype, ends)

    def fetch(self, number: int, pieces: Tensor) -> Callable[[], None]:
        with _Poisoning(self._keys):  # own first; no two ranks pull from one peer at the same time
            self._keys.pull(pieces, self._epoch % GENERATIONS, self._what.pulls[number])
        return nothing

    def fetched(self) -> None:
        self._keys.signal(READ, self._epoch)
        self._keys.watch(self._epoch)

    def parts(self, shape: torch.Size, zeroed: bool) -> Tensor:
        parts = self._slot_for(shape)
        return parts.zero_() if zeroed else parts

    def ship(self, parts: Tensor) -> Callable[[], Tensor]:
        memory, epoch = self._gradients, self._parts_epoch
        with _Poisoning(memory):
            memory.exchange(PUBLISHED, epoch, self._what.takers)
        self._count_shipped(parts)
        return lambda: self._arrived(parts, epoch)

    # --- of a StagedCourier

    def stage(self, pieces: Tensor) -> Flags:
        assert self.pieces is not None, "a plan whose pieces come one by one"
        memory, own = self._keys, self._plan.rank
        with _Poisoning(memory):
            flags = memory.flags(self._plan.piece_count, self._epoch)
            if own in self.pieces:
                self._pull(own, pieces)
            memory.arrive(self.pieces.get(own, ()), self._epoch)
        return flags

    def follow(self, pieces: Tensor) -> None:
        assert self.pieces is not None
        with _Poisoning(self._keys):
            for source in self._plan.order:
                if source != self._plan.rank:
                    self._pull(source, pieces)
                    self._keys.arrive(self.pieces[source], self._epoch)

    def _pull(self, source: int, pieces: Tensor) -> None:
        """A rank's keys, from its slot, into the pieces."""
        self._keys.pull(pieces, self._epoch % GENERATIONS, self._what.from_source[source])

    def staged_parts(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        parts = self._slot_for(shape)
        counted = torch.Size((self._plan.piece_count,))  # they follow the contributions in the slot
        counters = _view(self._gradients, self._parts_epoch, parts.nbytes, torch.int32, counted)
        found = parts.zero_(), counters.zero_()
        self._zeroed = compute_now(self.lane)
        return found

    def ship_staged(self, parts: Tensor, departures: Tensor, full: tuple[int, ...]) -> Callable[[], Tensor]:
        assert self.pieces is not None
        plan, memory, epoch = self._plan, self._gradients, self._parts_epoch
        legs = [
            Leg(owner, tuple((piece, full[piece]) for piece in self.pieces[owner]))
            for owner in plan.order
            if owner != plan.rank
        ]
        with _Poisoning(memory):
            self.lane.after(self._zeroed)
            with self.lane.on():
                memory.depart(departures, legs, PUBLISHED, epoch)
                memory.watch(epoch)
        self._count_shipped(parts)
        return lambda: self._arrived(parts, epoch, one_by_one=True)

    # ---

    def _slot_for(self, shape: torch.Size) -> Tensor:
        """Contributions of that shape, in a slot that nobody reads any more."""
        memory, what = self._gradients, self._what
        with _Poisoning(memory):
            memory.reserve(what.parts_nbytes)
            self._parts_epoch = self._begin(memory)
            return _view(memory, self._parts_epoch, 0, what.sums, shape)

    def _count_shipped(self, parts: Tensor) -> None:
        if not counting():
            return
        for owner, taken in self._plan.receive.items():
            count_sent("gradients", owner, parts[:, : count(taken)].nbytes)

    def _arrived(self, parts: Tensor, epoch: int, *, one_by_one: bool = False) -> Tensor:
        plan, memory = self._plan, self._gradients
        batch, _, *dense = parts.shape
        shape = (batch, arrivals(plan), *dense)
        arrived = torch.empty(shape, dtype=parts.dtype, device=parts.device)
        by_peer, together = _homecoming(plan, batch, prod(dense) * parts.element_size())
        with _Poisoning(memory):
            if one_by_one:
                for peer, pull in by_peer:
                    memory.wait(PUBLISHED, epoch, (peer,))
                    memory.pull(arrived, epoch % GENERATIONS, pull)
            else:
                memory.pull(arrived, epoch % GENERATIONS, together)
            memory.signal(READ, epoch)
            memory.watch(epoch)
        return arrived

    def _begin(self, memory: PeerMemory) -> int:
        """A new epoch whose slot nobody reads any more."""
        epoch = memory.next_epoch()
        memory.wait(READ, epoch - GENERATIONS, self._what.others)
        return epoch


@dataclass(frozen=True, eq=False)
class _What:
    """What of a plan's transfers stays the same from call to call."""

    row: int  # bytes of a token's keys and values of one head
    sums: torch.dtype  # of contributions
    keys_nbytes: int  # of a slot, on any rank
    parts_nbytes: int  # for the largest group at once: no arena grows while one of its slots is in use
    slot: tuple[tuple[int, torch.Size], ...]  # first byte and shape (B, S, 2, h, D) of each group's own keys
    pulls: tuple[Pull, ...]  # all of each group's keys
    from_source: dict[int, Pull]  # of the first group, those of each rank
    others: tuple[int, ...]
    sources: tuple[int, ...]  # ranks whose keys are taken here
    takers: tuple[int, ...]  # ranks that take keys from here


@lru_cache(maxsize=256)
def _what(plan: GatherPlan, batch: int, head_dim: int, dtype: torch.dtype, ends: tuple[int, ...]) -> _What:
    """For keys of that shape in groups of heads that end there."""
    problem, sums = plan.problem, accumulation_dtype(dtype)
    row, groups = 2 * head_dim * dtype.itemsize, list(pairwise((0, *ends)))
    tokens = batch * problem.key_chunk(plan.rank)
    slot = [
        (tokens * first * row, torch.Size((batch, problem.key_chunk(plan.rank), 2, last - first, head_dim)))
        for first, last in groups
    ]
    taken = [
        {source: _copies_from(plan, source, batch, first * row, last * row) for source in plan.order}
        for first, last in groups
    ]
    widest = max(last - first for first, last in groups)
    contributions = batch * problem.k_length * 2 * widest * head_dim * sums.itemsize
    return _What(
        row,
        sums,
        batch * problem.longest_key_chunk * ends[-1] * row,
        contributions + 4 * MOST_PIECES * problem.world_size,  # and counters
        tuple(slot),
        tuple(Pull(tuple(copy for copies in some.values() for copy in copies)) for some in taken),
        {source: Pull(copies) for source, copies in taken[0].items()},
        tuple(rank for rank in range(problem.world_size) if rank != plan.rank),
        tuple(plan.receive),
        tuple(plan.send),
    )


def _copies_from(plan: GatherPlan, source: int, batch: int, first: int, last: int) -> tuple[Copy, ...]:
    """From the slot of a rank into the pieces, for the heads at bytes [first, last) of a token's."""
    token = last - first
    chunk, span = plan.problem.key_chunk(source), plan.piece_count * plan.piece_length
    return tuple(
        Copy(source, batch * chunk * first + (b * chunk + start) * token, (b * span + at) * token, n * token)
        for b in range(batch)
        for start, at, n in stretches(plan, source)
    )


@lru_cache(maxsize=256)
def _homecoming(plan: GatherPlan, batch: int, token: int) -> tuple[tuple[tuple[int, Pull], ...], Pull]:
    """The contributions of all peers to this rank's keys, of so many bytes a token, by ring distance; and together."""
    found = []
    for peer in sorted(plan.send, key=lambda peer: (peer - plan.rank) % plan.problem.world_size):
        theirs = make_plan(plan.problem, peer, "gather")
        assert isinstance(theirs, GatherPlan)
        span, offset, copies = theirs.piece_count * theirs.piece_length, arrival_places(plan)[peer], []
        for _, at, n in stretches(theirs, plan.rank):
            for b in range(batch):
                into = (b * arrivals(plan) + offset) * token
                copies.append(Copy(peer, (b * span + at) * token, into, n * token))
            offset += n
        found.append((peer, Pull(tuple(copies))))
    return tuple(found), Pull(tuple(copy for _, pull in found for copy in pull.copies))


def _view(memory: PeerMemory, epoch: int, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Of this rank's slot of an epoch, from a byte on: one tensor for all times, as the host takes long to make one."""
    key = epoch % GENERATIONS, start, dtype, shape
    found = memory.views.get(key)
    if found is None:
        if len(memory.views) >= MOST_VIEWS:
            memory.views.clear()
        with lasting():
            slot = memory.slot(memory.rank, epoch % GENERATIONS)
            found = memory.views[key] = slot[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
    return found


class _Poisoning:
    """Whatever stops this rank while it lasts, the others must not wait for it."""

    __slots__ = ("_memory",)

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._memory.poison()
