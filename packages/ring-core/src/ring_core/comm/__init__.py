"""Moving keys to queries and gradients home."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core.backend import has_wider_sums
from ring_core.comm.channel import RingCommError
from ring_core.comm.collectives import CollectiveCourier
from ring_core.comm.gather import Courier, GatherTransport
from ring_core.comm.heads import Direction, head_groups
from ring_core.comm.keeping import keeps
from ring_core.comm.lane import Lane, Turns, compute_after, follow_calls
from ring_core.comm.peer import PeerCourier
from ring_core.comm.ring import RingTransport
from ring_core.comm.shared_memory import shared_memory
from ring_core.comm.staged import StagedGather
from ring_core.comm.symmetric_memory import arena_bytes, peers
from ring_core.comm.traffic import Traffic, record_traffic
from ring_core.comm.transport import Gradients, Keys, LocalTransport, Transport
from ring_core.plan import GatherPlan, Plan, Problem, RingPlan

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
    *,
    staged: bool = False,
    final_gradients: bool = False,
    rounds_gradients: bool = False,
    gathered: Tensor | None = None,
) -> Transport:
    """What moves keys and gradients for a plan.

    Args:
        num_heads: Hq.
        k: (B, S, Hkv, D): local keys, for their shape, dtype and device.
        direction: of the pass.
        heads_at_once: key heads in a group of the gather schedule; 0: all where pieces are staged, else as
            `ring_core.comm.heads` has it.
        staged: the backend takes arrival flags and departure counters, where the transport has them.
        final_gradients: it gives dk and dv in k's dtype where nobody adds to them: where nothing travels.
        rounds_gradients: with them, also where others add to them: those of a gather's home step.
        gathered: `Transport.gathered` of the forward, for its backward.
    """
    if group is None or not plan.problem.travels:
        return LocalTransport(final_gradients and has_wider_sums(k.dtype))
    follow_calls(group, k.device)
    if isinstance(plan, RingPlan):
        return RingTransport(plan, group)
    courier = _courier(plan, group, k)
    if staged and not heads_at_once and isinstance(courier, PeerCourier) and isinstance(plan.problem, Problem):
        heads_at_once = k.shape[2]  # on every rank, also on one that sees a single piece: slots are laid out by group
    groups = head_groups(plan.problem, num_heads, k, direction, heads_at_once)
    if staged and len(groups) == 1 and isinstance(courier, PeerCourier) and courier.pieces is not None:
        return StagedGather(plan, courier)
    urgent = None
    if len(groups) == 1 and plan.home is not None and isinstance(courier, PeerCourier):
        urgent = courier.lane if direction == "forward" else courier.home_lane
    in_place = final_gradients and rounds_gradients and has_wider_sums(k.dtype)
    keep = direction == "forward" and not heads_at_once and keeps(plan.problem, num_heads, k.shape[2], len(groups))
    return GatherTransport(plan, courier, groups, urgent=urgent, home_in_place=in_place, keep=keep, gathered=gathered)


def _courier(plan: GatherPlan, group: ProcessGroup, k: Tensor) -> Courier:
    way = _gather_transport
    if way == "shared_memory":
        here = Lane(None)
        return PeerCourier(plan, partial(shared_memory, group), (here, here))
    captured = k.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured and way == "peer_memory":
        raise RingCommError("peer memory counts calls on the host, so a CUDA graph cannot replay it: take another way")
    if way == "peer_memory" or (way == "auto" and k.is_cuda and not captured):
        found = peers(group, k.device)
        if found is not None:
            return PeerCourier(plan, found.memory, found.lanes)
        if way == "peer_memory":
            raise RingCommError(
                "peer memory needs the ranks of the group to be processes of one host, each of which sees all of their "
                "GPUs, and every pair of these GPUs to have peer access"
            )
    return CollectiveCourier(plan, group, k)
