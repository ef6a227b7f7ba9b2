"""Moving keys to queries and gradients home."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core.comm.channel import RingCommError
from ring_core.comm.collectives import CollectiveCourier
from ring_core.comm.gather import Courier, GatherTransport
from ring_core.comm.heads import Direction, head_groups
from ring_core.comm.lane import Lane, Turns, compute_after
from ring_core.comm.peer import PeerCourier
from ring_core.comm.ring import RingTransport
from ring_core.comm.shared_memory import shared_memory
from ring_core.comm.symmetric_memory import arena_bytes, peers
from ring_core.comm.traffic import Traffic, record_traffic
from ring_core.comm.transport import Gradients, Keys, LocalTransport, Transport
from ring_core.plan import GatherPlan, Plan, RingPlan

__all__ = [
    "Gradients",
    "Keys",
    "RingCommError",
    "Traffic",
    "Transport",
    "Turns",
    "arena_bytes",
    "compute_after",
    "gather_through",
    "record_traffic",
    "transport",
]

GATHER_TRANSPORTS = ("auto", "collectives", "peer_memory", "shared_memory")
_gather_transport = "auto"


@contextmanager
def gather_through(name: str) -> Iterator[None]:
    """Takes another way for the schedule "gather" while it lasts; all ranks of a group must enter and leave alike.

    "auto" (the default): peer memory where all ranks are GPUs of one host that can read each other, unless a CUDA graph
    is being captured; collectives elsewhere. "collectives": torch.distributed, anywhere. "peer_memory": copy engines
    and symmetric memory, or an error. "shared_memory": the double of peer memory, on the CPUs of one host.
    """
    global _gather_transport
    if name not in GATHER_TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}; there are {', '.join(map(repr, GATHER_TRANSPORTS))}")
    before, _gather_transport = _gather_transport, name
    try:
        yield
    finally:
        _gather_transport = before


def transport(
    plan: Plan,
    group: ProcessGroup | None,
    num_heads: int,
    k: Tensor,
    direction: Direction,
    heads_at_once: int = 0,
) -> Transport:
    """What moves keys and gradients for a plan.

    Args:
        num_heads: Hq.
        k: (B, S, Hkv, D): local keys, for their shape, dtype and device.
        direction: of the pass.
        heads_at_once: key heads in a group of the gather schedule; 0: as `ring_core.comm.heads` has it.
    """
    if group is None or not plan.problem.travels:
        return LocalTransport()
    if isinstance(plan, RingPlan):
        return RingTransport(plan, group)
    return GatherTransport(
        plan, _courier(plan, group, k), head_groups(plan.problem, num_heads, k, direction, heads_at_once)
    )


def _courier(plan: GatherPlan, group: ProcessGroup, k: Tensor) -> Courier:
    way = _gather_transport
    if way == "shared_memory":
        here = Lane(None)
        return PeerCourier(plan, partial(shared_memory, group), (here, here))
    if way == "peer_memory" or (way == "auto" and k.is_cuda and not torch.cuda.is_current_stream_capturing()):
        found = peers(group, k.device)
        if found is not None:
            return PeerCourier(plan, found.memory, found.lanes)
        if way == "peer_memory":
            raise RingCommError(
                "peer memory needs the ranks of the group to be processes of one host, each of which sees all of their "
                "GPUs, and every pair of these GPUs to have peer access"
            )
    return CollectiveCourier(plan, group, k)
