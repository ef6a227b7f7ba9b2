"""Peer memory between processes of one host, in files that all map: the double of the GPU arena, for tests without a
GPU.

Everything is done by the host, in program order: x86 and Arm hosts show the stores of one process to another in the
order of the counters' release because every counter is written after an interpreter's worth of other work, which is
good enough for tests.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core._torch import lasting
from ring_core.backend import Flags
from ring_core.comm.channel import RingCommError, timeout
from ring_core.comm.peer import COUNTERS, GENERATIONS, MOST_PIECES, Leg, Pull, View

_ALIGNMENT = 64  # bytes: slots begin where any dtype may


class SharedMemory:
    """`PeerMemory` for one purpose ("keys" or "gradients") of one group on one host.

    An arena begins with int64 counters: for each of COUNTERS one for every reader, and one that is not 0 once its owner
    has failed; then come the slots.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._name = name
        self._epoch = 0
        self._size = 0
        self._arenas: list[Tensor] = []
        self.views: dict[View, Tensor] = {}
        self._poison = COUNTERS * self.world_size
        self._header = -(-8 * (self._poison + 1) // _ALIGNMENT) * _ALIGNMENT
        with lasting():
            self._arrivals = torch.zeros(MOST_PIECES * self.world_size, dtype=torch.int32, device="cpu")
        self.reserve(1)

    def reserve(self, nbytes: int) -> None:
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if nbytes > self._size:
            self._grow(nbytes)

    @lasting()
    def _grow(self, nbytes: int) -> None:
        if self._arenas:  # the slots of the last epochs are still being read, until every rank has come here
            dist.barrier(group=self._group)
        size = self._header + GENERATIONS * nbytes
        path = Path(tempfile.gettempdir()) / f"ring-{os.getpid()}-{id(self)}-{self._name}"
        own = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        own[: self._header].zero_()
        own[: 8 * self._poison].view(torch.int64).fill_(self._epoch)
        paths: list[str] = [""] * self.world_size
        dist.all_gather_object(paths, str(path), group=self._group)
        self._arenas = [
            own if rank == self.rank else torch.from_file(other, shared=True, size=size, dtype=torch.uint8)
            for rank, other in enumerate(paths)
        ]
        dist.barrier(group=self._group)  # all have mapped it: the name is no longer needed, and nothing stays behind
        path.unlink()
        self.views.clear()
        self._size = nbytes

    def slot(self, rank: int, generation: int) -> Tensor:
        start = self._header + generation * self._size
        return self._arenas[rank][start : start + self._size]

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def signal(self, counter: int, epoch: int) -> None:
        self._counters(self.rank)[counter * self.world_size : (counter + 1) * self.world_size] = epoch

    def wait(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self._wait_for(rank, counter, epoch)

    def _wait_for(self, rank: int, counter: int, epoch: int) -> None:
        counters = self._counters(rank)
        limit = timeout()
        deadline = time.monotonic() + (limit.total_seconds() if limit else 600.0)
        while counters[counter * self.world_size + self.rank] < epoch:
            if counters[self._poison]:
                raise RingCommError(f"rank {self.rank} of {self.world_size}: rank {rank} has failed ({self._name})")
            if time.monotonic() > deadline:
                raise RingCommError(
                    f"rank {self.rank} of {self.world_size}: rank {rank} did not answer in time ({self._name}, "
                    f"epoch {epoch}). RING_TIMEOUT sets how many seconds to wait for it."
                )
            time.sleep(20e-6)

    def exchange(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        self.signal(counter, epoch)
        self.wait(counter, epoch, ranks)

    def flags(self, pieces: int, epoch: int) -> Flags:
        return Flags(self._arrivals[:pieces], torch.tensor([epoch], dtype=torch.int32, device="cpu"))

    def arrive(self, pieces: tuple[int, ...], epoch: int) -> None:
        self._arrivals[list(pieces)] = epoch

    def depart(self, departures: Tensor, legs: list[Leg], counter: int, epoch: int) -> None:
        for rank, full in legs:
            for piece, number in full:
                if departures[piece] != number:  # whoever counts has done so: everything here is done by the host
                    raise RuntimeError(f"piece {piece} departs with {int(departures[piece])} of {number} keys")
            self._counters(self.rank)[counter * self.world_size + rank] = epoch

    def pull(self, target: Tensor, generation: int, pull: Pull) -> None:
        flat = target.view(-1).view(torch.uint8)
        for rank, source, into, nbytes in pull.copies:
            flat[into : into + nbytes].copy_(self.slot(rank, generation)[source : source + nbytes])

    def watch(self, epoch: int) -> None:
        """Waiting is over when `wait` returns."""

    def poison(self) -> None:
        self._counters(self.rank)[self._poison] = 1

    def _counters(self, rank: int) -> Tensor:
        return self._arenas[rank][: 8 * (self._poison + 1)].view(torch.int64)


_memories: dict[tuple[str, str], tuple[ProcessGroup, SharedMemory]] = {}


def shared_memory(group: ProcessGroup, name: str) -> SharedMemory:
    """The group's arena of that name; the first call is collective."""
    key = (group.group_name, name)
    if key not in _memories or _memories[key][0] is not group:
        _memories[key] = (group, SharedMemory(group, name))
    return _memories[key][1]
