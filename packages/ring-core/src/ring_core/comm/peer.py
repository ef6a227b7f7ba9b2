"""Gather through peer memory: every rank publishes its keys in an arena that all others can read, and takes what it
needs itself.

    rank r                                             rank p
    wait until all have read what the slot held
    copy k, v into slot (epoch mod 2)
    PUBLISHED := epoch   ───────────────────────────►  wait for it, pull the ranges it needs, flag each piece
    wait for all to have READ epoch - 1 next time  ◄─  READ := epoch

Two generations: while a rank still reads epoch e, its peers may already publish e + 1, but not e + 2. Every rank makes
the same calls in the same order, so the epochs agree without being sent. Each counter has one writer. A rank that fails
poisons its arena, and every wait is bounded, so nobody waits for the dead. `PeerMemory` is what such an arena must
offer; `ring_core.comm.shared_memory` is one for processes of one host, without GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ring_core.backend import Flags, accumulation_dtype
from ring_core.comm.gather import piece_length, place, sum_in_rank_order, zeros_for_pieces
from ring_core.comm.traffic import count_sent
from ring_core.comm.transport import Gradients, Keys
from ring_core.plan import GatherPlan

PUBLISHED, READ = 0, 1
GENERATIONS = 2


class PeerMemory(Protocol):
    """One symmetric arena of a group: a slot of equal size per generation and a few counters, readable by all, written
    by its owner."""

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

    def wait(self, rank: int, counter: int, epoch: int) -> None:
        """Until a rank's counter is at least `epoch`. Raises RingCommError, naming the rank, on poison or when time is
        up."""
        ...

    def poison(self) -> None:
        """Tells all who wait for this rank that it has failed."""
        ...


class PeerGatherTransport:
    """Moves what a `GatherPlan` says through peer memory; one arena for keys, one for gradients."""

    def __init__(self, plan: GatherPlan, memories: Callable[[str], PeerMemory]) -> None:
        self.plan = plan
        self._memories = memories

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        plan, memory = self.plan, self._memories("keys")
        shape = (2, *k.shape)
        with _poisoning(memory):
            epoch = _begin(memory, torch.Size(shape).numel() * k.element_size())
            mine = _typed(memory.slot(memory.rank, epoch % GENERATIONS), k.dtype, shape)
            mine[0].copy_(k)
            mine[1].copy_(v)
            memory.signal(PUBLISHED, epoch)

            pieces = k.new_empty(2, len(plan.pieces), k.shape[0], piece_length(plan), *k.shape[2:])
            arrived = torch.zeros(len(plan.pieces), dtype=torch.int32, device=k.device)
            for source in plan.order:  # own first; no two ranks pull from one peer at the same time
                memory.wait(source, PUBLISHED, epoch)
                theirs = _typed(memory.slot(source, epoch % GENERATIONS), k.dtype, shape)
                place(pieces, plan, source, theirs, ((0, k.shape[1]),))
                arrived[[number for number, piece in enumerate(plan.pieces) if piece.source == source]] = epoch
            memory.signal(READ, epoch)
        for peer, wanted in plan.send.items():
            count_sent("keys", peer, sum(mine[:, :, low:high].nbytes for low, high in wanted))
        yield Keys(pieces[0], pieces[1], Flags(arrived, torch.full((1,), epoch, dtype=torch.int32, device=k.device)))

    def gradients(self, k: Tensor) -> Gradients:
        return PeerGatherGradients(self.plan, self._memories("gradients"), k)


class PeerGatherGradients:
    """Each rank publishes its contributions to the keys of all, at the owner's place; owners pull theirs and sum in
    rank order."""

    def __init__(self, plan: GatherPlan, memory: PeerMemory, k: Tensor) -> None:
        self._plan = plan
        self._memory = memory
        self._k = k
        self._parts = zeros_for_pieces(plan, k)
        self._epoch = 0

    def buffers(self, step: int) -> tuple[Tensor, Tensor]:
        return self._parts[0], self._parts[1]

    def depart(self, step: int) -> None:
        plan, memory = self._plan, self._memory
        with _poisoning(memory):
            chunk = 2 * self._k.numel() * accumulation_dtype(self._k.dtype).itemsize
            self._epoch = _begin(memory, plan.problem.world_size * chunk)
            mine = self._slot(memory.rank)
            for number, piece in enumerate(plan.pieces):
                for low, high in piece.needed:
                    part = self._parts[:, number, :, low - piece.start : high - piece.start]
                    mine[piece.source, :, :, low:high].copy_(part)
                    if piece.source != plan.rank:
                        count_sent("gradients", piece.source, part.nbytes)
            memory.signal(PUBLISHED, self._epoch)

    def collect(self) -> tuple[Tensor, Tensor]:
        plan, memory = self._plan, self._memory
        with _poisoning(memory):
            arrived = {}
            for peer, given in plan.send.items():
                memory.wait(peer, PUBLISHED, self._epoch)
                own = self._slot(peer)[plan.rank]
                arrived[peer] = torch.cat([own[:, :, low:high] for low, high in given], dim=2)
            memory.signal(READ, self._epoch)
        return sum_in_rank_order(plan, self._k, self._parts, arrived)

    def _slot(self, rank: int) -> Tensor:
        """(W, 2, B, S, Hkv, D): a rank's contributions to the chunk of each."""
        shape = (self._plan.problem.world_size, 2, *self._k.shape)
        slot = self._memory.slot(rank, self._epoch % GENERATIONS)
        return _typed(slot, accumulation_dtype(self._k.dtype), shape)


def _begin(memory: PeerMemory, nbytes: int) -> int:
    """A new epoch whose slot nobody reads any more."""
    memory.reserve(nbytes)
    epoch = memory.next_epoch()
    for peer in range(memory.world_size):
        memory.wait(peer, READ, epoch - GENERATIONS)
    return epoch


def _typed(slot: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return slot[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)


@contextmanager
def _poisoning(memory: PeerMemory) -> Iterator[None]:
    try:
        yield
    except BaseException:  # whatever stops this rank, the others must not wait for it
        memory.poison()
        raise
