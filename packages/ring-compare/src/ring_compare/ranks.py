"""The few collectives that measuring needs; on one rank without a process group they do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ring_compare.places import put_together


@dataclass(frozen=True)
class Ranks:
    """This process among those that compute a cell together."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(reduced, op=op, group=self.group)
        return [float(x) for x in reduced.tolist()]

    def maximum(self, values: Sequence[float]) -> list[float]:
        """Elementwise maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def total(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def join(self, shard: torch.Tensor, positions: Sequence[torch.Tensor], *, dim: int) -> torch.Tensor:
        """The whole tensor on every rank, from each rank's shard along `dim`; positions: each rank's tokens."""
        shards = [shard]
        if self.world_size > 1:
            shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
            dist.all_gather(shards, shard.contiguous(), group=self.group)
        return put_together(shards, positions, dim)

    def barrier(self) -> None:
        """Line the ranks up: the host on CPU, the stream on a GPU (so that launches hide behind it)."""
        if self.world_size == 1:
            return
        if self.device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        else:
            dist.barrier(group=self.group)

    def synchronise(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
