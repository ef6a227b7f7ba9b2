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

from ring_core.comm.channel import RingCommError, timeout
from ring_core.comm.peer import GENERATIONS, Copy

_POISON = 2
_COUNTERS = 3
_HEADER = 64  # bytes: the counters, then the slots


class SharedMemory:
    """`PeerMemory` for one purpose ("keys" or "gradients") of one group on one host."""

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._name = name
        self._epoch = 0
        self._size = 0
        self._arenas: list[Tensor] = []
        self.reserve(1)

    def reserve(self, nbytes: int) -> None:
        nbytes = -(-nbytes // _HEADER) * _HEADER  # slots begin where any dtype may
        if nbytes <= self._size:
            return
        if self._arenas:  # the slots of the last epochs are still being read, until every rank has come here
            dist.barrier(group=self._group)
        size = _HEADER + GENERATIONS * nbytes
        path = Path(tempfile.gettempdir()) / f"ring-{os.getpid()}-{id(self)}-{self._name}"
        own = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        own[:_HEADER].zero_()
        own[: 8 * 2].view(torch.int64).fill_(self._epoch)
        paths: list[str] = [""] * self.world_size
        dist.all_gather_object(paths, str(path), group=self._group)
        self._arenas = [
            own if rank == self.rank else torch.from_file(other, shared=True, size=size, dtype=torch.uint8)
            for rank, other in enumerate(paths)
        ]
        dist.barrier(group=self._group)  # all have mapped it: the name is no longer needed, and nothing stays behind
        path.unlink()
        self._size = nbytes

    def slot(self, rank: int, generation: int) -> Tensor:
        start = _HEADER + generation * self._size
        return self._arenas[rank][start : start + self._size]

    def next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def signal(self, counter: int, epoch: int) -> None:
        self._counters(self.rank)[counter] = epoch

    def wait(self, counter: int, epoch: int, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self._wait_for(rank, counter, epoch)

    def _wait_for(self, rank: int, counter: int, epoch: int) -> None:
        counters = self._counters(rank)
        limit = timeout()
        deadline = time.monotonic() + (limit.total_seconds() if limit else 600.0)
        while counters[counter] < epoch:
            if counters[_POISON]:
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

    def pull(self, target: Tensor, generation: int, copies: list[Copy]) -> None:
        flat = target.view(-1).view(torch.uint8)
        for rank, source, into, nbytes in copies:
            flat[into : into + nbytes].copy_(self.slot(rank, generation)[source : source + nbytes])

    def watch(self, epoch: int) -> None:
        """Waiting is over when `wait` returns."""

    def poison(self) -> None:
        self._counters(self.rank)[_POISON] = 1

    def _counters(self, rank: int) -> Tensor:
        return self._arenas[rank][: 8 * _COUNTERS].view(torch.int64)


_memories: dict[tuple[str, str], tuple[ProcessGroup, SharedMemory]] = {}


def shared_memory(group: ProcessGroup, name: str) -> SharedMemory:
    """The group's arena of that name; the first call is collective."""
    key = (group.group_name, name)
    if key not in _memories or _memories[key][0] is not group:
        _memories[key] = (group, SharedMemory(group, name))
    return _memories[key][1]
