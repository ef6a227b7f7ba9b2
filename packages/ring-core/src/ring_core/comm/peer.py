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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ring_core.backend import accumulation_dtype
from ring_core.comm.gather import Heads, stretches
from ring_core.comm.lane import Lane
from ring_core.comm.traffic import count_sent
from ring_core.plan import GatherPlan, make_plan
from ring_core.ranges import count

PUBLISHED, READ = 0, 1
COUNTERS = 2
GENERATIONS = 2


class PeerMemory(Protocol):
    """One symmetric arena of a group: a slot of equal size per generation and a few counters, readable by all, written
    by its owner. On CUDA everything but `reserve` and `poison` is enqueued on the current stream."""

    rank: int
    world_size: int

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

    def poison(self) -> None:
        """Tells all who wait for this rank that it has failed."""
        ...


class PeerCourier:
    """One arena for keys, one for contributions. A slot of keys holds them by head group, (G, B, S, 2, h, D), so that
    what a peer pulls is contiguous; a slot of contributions is what the backend adds into, (B, C * S_piece, 2, h, D),
    and their owners know from their maker's plan what lies where."""

    def __init__(self, plan: GatherPlan, memories: Callable[[str], PeerMemory], lanes: tuple[Lane, Lane]) -> None:
        self._plan = plan
        self._keys, self._gradients = memories("keys"), memories("gradients")
        self._others = tuple(rank for rank in range(plan.problem.world_size) if rank != plan.rank)
        self._epoch = self._parts_epoch = 0
        self._shape = torch.Size()
        self._dtype = torch.float32
        self.lane, self.home_lane = lanes

    def offer(self, k: Tensor, v: Tensor, groups: Heads) -> None:
        memory = self._keys
        heads = groups[0].stop
        self._shape = torch.Size((len(groups), k.shape[0], k.shape[1], 2, heads, k.shape[3]))
        self._dtype = k.dtype
        with _poisoning(memory):
            longest = self._plan.problem.longest_key_chunk
            memory.reserve(2 * k.shape[0] * k.shape[2:].numel() * longest * k.element_size())
            self._epoch = self._begin(memory)
            mine = self._slot_of(memory.rank)
            for side, x in enumerate((k, v)):
                mine[:, :, :, side].copy_(x.unflatten(2, (len(groups), heads)).movedim(2, 0))
            memory.signal(PUBLISHED, self._epoch)
        for peer, wanted in self._plan.send.items():
            count_sent("keys", peer, mine[:, :, : count(wanted)].nbytes)

    def fetch(self, number: int, pieces: Tensor) -> Callable[[], None]:
        plan, memory = self._plan, self._keys
        with _poisoning(memory):
            for source in plan.order:  # own first; no two ranks pull from one peer at the same time
                if number == 0 and source != plan.rank:
                    memory.wait(PUBLISHED, self._epoch, (source,))
                theirs = self._slot_of(source)[number]
                for start, at, length in stretches(plan, source):
                    _pull(pieces[:, at : at + length], theirs[:, start : start + length])
        return _done

    def fetched(self) -> None:
        self._keys.signal(READ, self._epoch)

    def parts(self, shape: torch.Size) -> Tensor:
        memory = self._gradients
        dtype = accumulation_dtype(self._dtype)
        with _poisoning(memory):
            per_token = shape[0] * shape[2:].numel()
            memory.reserve(self._plan.problem.k_length * per_token * dtype.itemsize)
            self._parts_epoch = self._begin(memory)
            slot = memory.slot(memory.rank, self._parts_epoch % GENERATIONS)
            return _typed(slot, dtype, shape).zero_()

    def ship(self, parts: Tensor) -> Callable[[], dict[int, Tensor]]:
        plan, memory, epoch = self._plan, self._gradients, self._parts_epoch
        with _poisoning(memory):
            memory.signal(PUBLISHED, epoch)
        for owner, taken in plan.receive.items():
            count_sent("gradients", owner, parts[:, : count(taken)].nbytes)
        return lambda: self._arrived(parts, epoch)

    def _arrived(self, parts: Tensor, epoch: int) -> dict[int, Tensor]:
        plan, memory = self._plan, self._gradients
        arrived = {}
        with _poisoning(memory):
            nearest_first = sorted(plan.send, key=lambda peer: (peer - plan.rank) % plan.problem.world_size)
            for peer in nearest_first:
                memory.wait(PUBLISHED, epoch, (peer,))
                tokens, places = _place_at(plan, peer)
                shape = torch.Size((parts.shape[0], tokens, *parts.shape[2:]))
                theirs = _typed(memory.slot(peer, epoch % GENERATIONS), parts.dtype, shape)
                mine = arrived[peer] = parts.new_empty(parts.shape[0], count(plan.send[peer]), *parts.shape[2:])
                offset = 0
                for _, at, length in places:
                    _pull(mine[:, offset : offset + length], theirs[:, at : at + length])
                    offset += length
            memory.signal(READ, epoch)
        return arrived

    def _begin(self, memory: PeerMemory) -> int:
        """A new epoch whose slot nobody reads any more."""
        epoch = memory.next_epoch()
        memory.wait(READ, epoch - GENERATIONS, self._others)
        return epoch

    def _slot_of(self, rank: int) -> Tensor:
        """The keys that a rank has published, (G, B, S, 2, h, D)."""
        groups, batch, _, *rest = self._shape
        shape = torch.Size((groups, batch, self._plan.problem.key_chunk(rank), *rest))
        return _typed(self._keys.slot(rank, self._epoch % GENERATIONS), self._dtype, shape)


@lru_cache(maxsize=1024)  # plans of packed documents come and go
def _place_at(plan: GatherPlan, peer: int) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """How many tokens a peer's contributions span, and the stretches of this rank's keys among them."""
    theirs = make_plan(plan.problem, peer, "gather")
    assert isinstance(theirs, GatherPlan)
    return theirs.piece_count * theirs.piece_length, tuple(stretches(theirs, plan.rank))


def _pull(target: Tensor, source: Tensor) -> None:
    """Copies (B, n, …), entry by entry: each is contiguous on both sides, so a copy engine can do it."""
    for into, out_of in zip(target, source, strict=True):
        into.copy_(out_of)


def _typed(slot: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return slot[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _done() -> None:
    pass


@contextmanager
def _poisoning(memory: PeerMemory) -> Iterator[None]:
    try:
        yield
    except BaseException:  # whatever stops this rank, the others must not wait for it
        memory.poison()
        raise
