"""Peer memory between the GPUs of one NVLink host: symmetric memory, copied by copy engines, with signals that streams
write and wait for. No kernel runs and none spins for it, so it takes no multiprocessors from the computation.

A signal is written to every peer's own memory, so that waiting looks at local words only. Streams wait, never the host;
publishing and signalling is always enqueued before waiting, so no order in which ranks enqueue other work can make them
wait for each other in a circle. A watchdog ends waits that last longer than RING_TIMEOUT: it writes a word that
satisfies all of them, and the next call raises, naming the ranks that did not answer.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core._torch import (
    current_stream_handle,
    lasting,
    ranks_may_share_gpus,
    symmetric_buffer,
    symmetric_rendezvous,
)
from ring_core.backend import POISON, Flags
from ring_core.comm.channel import RingCommError, timeout
from ring_core.comm.lane import Lane, mark_on
from ring_core.comm.peer import COUNTERS, GENERATIONS, MOST_PIECES, PUBLISHED, READ, Leg, Pull, View
from ring_core.comm.stream_memory import Signals, Wait, Write, copy_all, enqueue, tolerate_captures

_ALIGNMENT = 512  # bytes; slots begin at multiples of it
_PATIENCE = 600.0  # seconds, without RING_TIMEOUT
_RELEASE = 0x7FFFFFFF  # satisfies every wait of a stream: epochs stay below it
_PULLS = 512  # that are remembered
_EPOCHS = 8
"""Device words with the epochs of the last calls, one each: a kernel reads its own as long as it runs, beside others on
other streams."""


class SymmetricMemory:
    """`PeerMemory` for one purpose ("keys" or "gradients") of one group of GPUs on one host.

    An arena begins with int32 words: COUNTERS x W that the peers write, then, of this GPU's own, EPOCHS epochs and the
    arrival flags of all pieces; then come the slots.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, name: str) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = weakref.ref(group)  # whose end is this memory's
        self._device = device
        self._name = name
        self._epoch = 0
        self._size = 0
        self._arenas: list[Tensor] = []
        self.views: dict[View, Tensor] = {}
        self._addresses: list[int] = []
        self._failure = ""
        self._signals = COUNTERS * self.world_size
        words = self._signals + _EPOCHS + MOST_PIECES * self.world_size
        self._header = -(-words * 4 // _ALIGNMENT) * _ALIGNMENT
        self._flags: dict[tuple[int, int], Flags] = {}  # views of the arena, made once
        self._departures: dict[int, Tensor] = {}  # of the last epochs, by generation
        self._made: dict[tuple[int | None, int | None, tuple[int, ...]], Signals] = {}
        self._copies: dict[tuple[Pull, int], list[tuple[int, int, int]]] = {}

    @property
    def nbytes(self) -> int:
        """What the arena takes of this GPU."""
        return self._header + GENERATIONS * self._size if self._arenas else 0

    def reserve(self, nbytes: int) -> None:
        self._check()
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if nbytes > self._size:
            self._grow(nbytes)

    @lasting()
    def _grow(self, nbytes: int) -> None:
        group = self._group()
        assert group is not None, "whoever calls holds the group"
        torch.cuda.synchronize(self._device)  # the slots of the last epochs are still being read,
        dist.barrier(group=group)  # until every rank has come here
        self._arenas = []
        own = symmetric_buffer(self._header + GENERATIONS * nbytes, self._device)
        own[: self._header].view(torch.int32).fill_(self._epoch)
        self._arenas = symmetric_rendezvous(own, group)
        self._addresses = [arena.data_ptr() for arena in self._arenas]
        self._flags, self._departures, self._made, self._copies = {}, {}, {}, {}
        self.views.clear()
        self._size = nbytes
        torch.cuda.synchronize(self._device)
        dist.barrier(group=group)  # nobody signals before all have set their counters

    def slot(self, rank: int, generation: int) -> Tensor:
        start = self._header + generation * self._size
        return self._arenas[rank][start : start + self._size]

    def next_epoch(self) -> int:
        self._check()
        self._epoch += 1
        return self._epoch

    def signal(self, counter: int, epoch: int) -> None:
        self._batch(counter, None, ()).enqueue(current_stream_handle(self._device), epoch)

    def wait(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        self._batch(None, counter, ranks).enqueue(current_stream_handle(self._device), epoch)

    def exchange(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        self._batch(counter, counter, ranks).enqueue(current_stream_handle(self._device), epoch)

    def flags(self, pieces: int, epoch: int) -> Flags:
        key = pieces, epoch % _EPOCHS
        if key not in self._flags:
            words, place, first = self._words(), self._signals + epoch % _EPOCHS, self._signals + _EPOCHS
            self._flags[key] = Flags(words[first : first + pieces], words[place : place + 1])
        return self._flags[key]

    def arrive(self, pieces: tuple[int, ...], epoch: int) -> None:
        first = self._addresses[self.rank] + 4 * self._signals
        raised = [Write(first + 4 * (_EPOCHS + piece), epoch) for piece in pieces]
        self._enqueue([Write(first + 4 * (epoch % _EPOCHS), epoch), *raised])

    def depart(self, departures: Tensor, legs: list[Leg], counter: int, epoch: int) -> None:
        self._departures[epoch % GENERATIONS] = departures
        first = departures.data_ptr()
        operations: list[Write | Wait] = []
        for rank, full in legs:
            operations += [Wait(first + 4 * piece, number) for piece, number in full]
            operations.append(Write(self._word(rank, counter, self.rank), epoch))
        self._enqueue(operations)

    def pull(self, target: Tensor, generation: int, pull: Pull) -> None:
        copies = self._copies.get((pull, generation)) or self._add(pull, generation)
        copy_all(current_stream_handle(self._device), target.data_ptr(), copies)

    def _add(self, pull: Pull, generation: int) -> list[tuple[int, int, int]]:
        """(place in the target, address, bytes) of the copies, kept until the arena grows."""
        if len(self._copies) >= _PULLS:
            self._copies.clear()
        offset = self._header + generation * self._size
        found = self._copies[pull, generation] = [
            (place, self._addresses[rank] + offset + source, nbytes) for rank, source, place, nbytes in pull.copies
        ]
        return found

    def watch(self, epoch: int) -> None:
        _watchdog().guard(_Wait(self, epoch, mark_on(self._device.index), _deadline()))

    def poison(self) -> None:
        """Others learn of it when their waits run out of time: a failed rank may not have a working stream left."""

    def release(self, epoch: int) -> None:
        """Ends every wait of this rank, and makes its next call raise. Called by the watchdog, beside all streams, and
        by copies only: a kernel that waits may hold all multiprocessors."""
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            words = self._words()
            seen = words[: self._signals].view(COUNTERS, self.world_size).tolist()
            late = [
                str(rank)
                for rank in range(self.world_size)
                if rank != self.rank and (seen[PUBLISHED][rank] < epoch or seen[READ][rank] < epoch - GENERATIONS)
            ]
            self._failure = (
                f"rank {self.rank} of {self.world_size}: rank {', '.join(late) or '?'} did not answer in time "
                f"({self._name}, epoch {epoch}), and what was computed since is void. RING_TIMEOUT sets how many "
                f"seconds to wait."
            )
            released = torch.full(words.shape, _RELEASE, dtype=torch.int32, device="cpu")
            released[self._signals :] = POISON - (1 << 32)  # as int32: kernels read these words
            words.copy_(released.pin_memory(), non_blocking=True)
            for departures in self._departures.values():
                full = torch.full(departures.shape, _RELEASE, dtype=torch.int32, device="cpu")
                departures.copy_(full.pin_memory(), non_blocking=True)
            torch.cuda.current_stream().synchronize()

    def _enqueue(self, operations: Sequence[Write | Wait]) -> None:
        enqueue(current_stream_handle(self._device), operations)

    def _batch(self, own: int | None, theirs: int | None, ranks: tuple[int, ...]) -> Signals:
        """Writes this rank's counter where the peers look for it, waits for that of ranks where this rank looks."""
        key = own, theirs, ranks
        if key not in self._made:
            peers = (peer for peer in range(self.world_size) if peer != self.rank)
            written = [] if own is None else [self._word(peer, own, self.rank) for peer in peers]
            self._made[key] = Signals(written, [self._word(self.rank, theirs or 0, rank) for rank in ranks])
        return self._made[key]

    def _words(self) -> Tensor:
        """int32: the beginning of this rank's arena."""
        return self._arenas[self.rank][: self._header].view(torch.int32)

    def _word(self, owner: int, counter: int, writer: int) -> int:
        return self._addresses[owner] + 4 * (counter * self.world_size + writer)

    def _check(self) -> None:
        if self._failure:
            raise RingCommError(self._failure)


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    memory: SymmetricMemory
    epoch: int
    passed: torch.Event
    deadline: float


def _deadline() -> float:
    limit = timeout()
    return time.monotonic() + (limit.total_seconds() if limit else _PATIENCE)


class _Watchdog:
    """One thread that looks at waits in the order they were enqueued."""

    def __init__(self) -> None:
        self._waits: deque[_Wait] = deque()  # to whose end others append while this thread takes from its head
        threading.Thread(target=self._run, name="ring_core watchdog", daemon=True).start()

    def guard(self, wait: _Wait) -> None:
        self._waits.append(wait)

    def _run(self) -> None:
        tolerate_captures()
        while True:
            time.sleep(0.2)
            late = []
            for _ in range(len(self._waits)):
                wait = self._waits.popleft()
                if wait.passed.query():
                    continue
                if time.monotonic() > wait.deadline:
                    wait.memory.release(wait.epoch)
                else:
                    late.append(wait)
            self._waits.extendleft(reversed(late))


@cache
def _watchdog() -> _Watchdog:
    return _Watchdog()


class Peers:
    """The arenas and lanes of one group on one device."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        # Of high priority: their few small kernels, which others wait for, go before the tiles of large ones.
        self.lanes = Lane(torch.cuda.Stream(device, priority=-1)), Lane(torch.cuda.Stream(device, priority=-1))
        self._memories = {name: SymmetricMemory(group, device, name) for name in ("keys", "gradients")}

    def memory(self, name: str) -> SymmetricMemory:
        return self._memories[name]

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memories.values())


_peers: weakref.WeakKeyDictionary[ProcessGroup, dict[torch.device, Peers | None]] = weakref.WeakKeyDictionary()


def peers(group: ProcessGroup, device: torch.device) -> Peers | None:
    """The group's peer memory; None where its ranks cannot read each other's. The first call is collective."""
    found = _peers.setdefault(group, {})
    if device not in found:
        found[device] = Peers(group, device) if _can_read_each_other(group, device) else None
    return found[device]


def arena_bytes() -> int:
    """Bytes of this process's GPUs in peer arenas, which torch's allocator does not count."""
    return sum(peers.nbytes for found in _peers.values() for peers in found.values() if peers is not None)


def _can_read_each_other(group: ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks are processes of one host, see all of their GPUs, and may map each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    mine = (boot.read_text().strip() if boot.exists() else "", device.index, torch.cuda.device_count())
    places: list[tuple[str, int, int]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(places, mine, group=group)
    hosts, devices, counts = zip(*places, strict=True)
    if not hosts[0] or len(set(hosts)) > 1 or max(devices) >= min(counts):
        return False
    if len(set(devices)) < len(devices) and not ranks_may_share_gpus():
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for a, b in combinations(sorted(set(devices)), 2))
