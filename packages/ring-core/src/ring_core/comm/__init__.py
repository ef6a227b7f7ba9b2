"""Moving keys to queries and gradients home."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.distributed import ProcessGroup

from ring_core.comm.channel import RingCommError
from ring_core.comm.gather import GatherTransport
from ring_core.comm.peer import PeerGatherTransport
from ring_core.comm.ring import RingTransport
from ring_core.comm.shared_memory import shared_memory
from ring_core.comm.traffic import Traffic, record_traffic
from ring_core.comm.transport import Gradients, Keys, LocalTransport, Transport
from ring_core.plan import Plan, RingPlan

__all__ = [
    "Gradients",
    "Keys",
    "RingCommError",
    "Traffic",
    "Transport",
    "gather_through",
    "record_traffic",
    "transport",
]

GATHER_TRANSPORTS = ("collectives", "shared_memory")
_gather_transport = "collectives"


@contextmanager
def gather_through(name: str) -> Iterator[None]:
    """Takes another way for the schedule "gather" while it lasts; all ranks of a group must enter and leave alike.

    "collectives": torch.distributed, anywhere (the default). "shared_memory": the double of peer memory, on the CPUs
    of one host.
    """
    global _gather_transport
    if name not in GATHER_TRANSPORTS:
        raise ValueError(f"unknown transport {name!r}; there are {', '.join(map(repr, GATHER_TRANSPORTS))}")
    before, _gather_transport = _gather_transport, name
    try:
        yield
    finally:
        _gather_transport = before


def transport(plan: Plan, group: ProcessGroup | None) -> Transport:
    """What moves keys and gradients for a plan."""
    if group is None or plan.problem.world_size == 1:
        return LocalTransport()
    if isinstance(plan, RingPlan):
        return RingTransport(plan, group)
    if _gather_transport == "shared_memory":
        return PeerGatherTransport(plan, partial(shared_memory, group))
    return GatherTransport(plan, group)
