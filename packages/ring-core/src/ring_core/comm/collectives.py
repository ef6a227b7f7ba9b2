"""The gather's courier over torch.distributed: batched sends and receives, on NCCL or gloo, any number of hosts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core.backend import accumulation_dtype
from ring_core.comm.channel import channel
from ring_core.comm.contributions import arrival_places, stretches
from ring_core.comm.gather import Heads
from ring_core.comm.lane import Lane
from ring_core.plan import GatherPlan
from ring_core.ranges import Ranges, count


class CollectiveCourier:
    """Packs what a peer wants into one message, and unpacks what comes. It cannot be a `StagedCourier`: NCCL's kernels
    need multiprocessors, which a kernel that waits for pieces would hold."""

    def __init__(self, plan: GatherPlan, group: ProcessGroup, k: Tensor) -> None:
        self._plan = plan
        self._keys = channel(group, k.device, "keys")
        self._gradients = channel(group, k.device, "gradients")
        self._dtype = accumulation_dtype(k.dtype)
        self._device = k.device
        self._offered: tuple[Tensor, Tensor, Heads] | None = None
        self.offered: torch.Event | None = None
        self.lane = Lane(self._keys.stream)
        self.home_lane = Lane(self._gradients.stream)

    def offer(self, k: Tensor, v: Tensor, groups: Heads) -> None:
        self._offered = k, v, groups

    def recall(self, k: Tensor, groups: Heads) -> None:
        pass

    def fetch(self, number: int, pieces: Tensor) -> Callable[[], None]:
        assert self._offered is not None
        plan, (k, v, groups) = self._plan, self._offered
        pair = torch.stack((k[:, :, groups[number]], v[:, :, groups[number]]), dim=2)  # (B, S, 2, h, D)
        sends = [(peer, _packed(pair, wanted)) for peer, wanted in plan.send.items()]
        parcels = {
            source: pair.new_empty(pair.shape[0], count(taken), *pair.shape[2:])
            for source, taken in plan.receive.items()
        }
        pending = self._keys.post(sends, list(parcels.items()))

        def land() -> None:
            pending.wait()
            for source in plan.order:
                offset = 0
                for start, at, length in stretches(plan, source):
                    if source == plan.rank:
                        pieces[:, at : at + length].copy_(pair[:, start : start + length])
                    else:
                        pieces[:, at : at + length].copy_(parcels[source][:, offset : offset + length])
                    offset += length

        return land

    def fetched(self) -> None:
        pass

    def parts(self, shape: torch.Size, zeroed: bool) -> Tensor:
        make = torch.zeros if zeroed else torch.empty
        return make(shape, dtype=self._dtype, device=self._device)

    def ship(self, parts: Tensor) -> Callable[[], Tensor]:
        plan = self._plan
        sends = [
            (source, torch.cat([parts[:, at : at + n] for _, at, n in stretches(plan, source)], dim=1))
            for source in plan.receive
        ]
        arriving = {
            peer: parts.new_empty(parts.shape[0], count(plan.send[peer]), *parts.shape[2:]) for peer in plan.send
        }
        pending = self._gradients.post(sends, list(arriving.items()))

        def home() -> Tensor:
            pending.wait()
            found = [arriving[peer] for peer in arrival_places(plan)]
            return torch.cat(found, dim=1) if found else parts[:, :0]

        return home


def _packed(pair: Tensor, wanted: Ranges) -> Tensor:
    """The wanted tokens of (B, S, 2, h, D), contiguous."""
    if len(wanted) == 1:
        start, stop = wanted[0]
        return pair[:, start:stop].contiguous()
    return torch.cat([pair[:, start:stop] for start, stop in wanted], dim=1)
