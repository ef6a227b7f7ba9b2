"""Gather for a backend that watches pieces come and go (`ring_core.backend.StagedBackend`): one launch over everything,
which waits inside for what is still arriving, and whose finished gradients leave while it computes the others.

    lane       publish │ peers have published │ own pieces, flags ║ pull │ flag │ pull │ flag │ …
    compute                                                       ║ kernel: waits for the flag of a piece it reads,
                                                                  ║         adds to the counter of one it completes
    lane       wait for the counters of rank p's pieces │ tell p │ …           (║ and these are behind the launch)
    home lane  wait until p has told this rank │ pull p's contributions │ …

A kernel that waits holds multiprocessors. So it is launched once the peers have published, and everything that raises
its flags is enqueued before: it waits for its own GPU's copy engines, and for nobody's host or kernel. Pieces are
visited in the plan's order, own ones first in the forward and last in the backward, whichever came first: the result is
that of `ring_core.comm.gather`, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ring_core.backend import Flags, departures_of
from ring_core.comm.contributions import sum_in_rank_order
from ring_core.comm.gather import Courier, by_piece, pieces_shape
from ring_core.comm.lane import Lane, compute_after
from ring_core.comm.transport import Buffers, Gradients, Keys
from ring_core.plan import GatherPlan


class StagedCourier(Courier, Protocol):
    """A courier that says piece by piece what has come, and takes piece by piece what is ready. Calls as there;
    `staged_parts` on the compute stream."""

    pieces: dict[int, tuple[int, ...]] | None
    """Which pieces each rank's keys are; None where the plan does not have them apart."""

    def stage(self, pieces: Tensor) -> Flags:
        """Behind it own keys are in pieces (B, C * S_piece, 2, h, D), and the peers have published theirs."""
        ...

    def follow(self, pieces: Tensor) -> None:
        """Brings the others' keys, raising flags."""
        ...

    def staged_parts(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """As `parts`, and departure counters (C,) int32 at zero."""
        ...

    def ship_staged(self, parts: Tensor, departures: Tensor, full: tuple[int, ...]) -> Callable[[], Tensor]:
        """As `ship`, while a kernel is adding into parts: a piece is ready once its counter is full."""
        ...


class StagedGather:
    """Moves what a `GatherPlan` says, all heads at once."""

    head_groups = 1
    side_by_side = False
    urgent: Lane | None = None
    gathered: Tensor | None = None
    final_gradients = False

    def __init__(self, plan: GatherPlan, courier: StagedCourier) -> None:
        self.plan = plan
        self.courier = courier

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        courier, lane = self.courier, self.courier.lane
        heads = slice(0, k.shape[2])
        pieces = k.new_empty(pieces_shape(self.plan, k, heads))
        lane.after_compute()
        with lane.on():
            courier.offer(k, v, (heads,))
            flags = courier.stage(pieces)
            ready = lane.now()
            courier.follow(pieces)
            courier.fetched()
            landed = lane.now()
        yield Keys(0, heads, *by_piece(pieces, self.plan), arrived=ready, flags=flags)
        compute_after(landed)  # which it is, if the kernel has waited: the memory is free for others behind this

    def gradients(self, k: Tensor, *, zeroed: bool) -> Gradients:
        assert zeroed, "what counts departures adds"
        return StagedGradients(self.plan, self.courier, k)


class StagedGradients:
    """Contributions to the keys of all ranks, leaving as they are completed, and those of all ranks to own keys."""

    def __init__(self, plan: GatherPlan, courier: StagedCourier, k: Tensor) -> None:
        self._plan = plan
        self._courier = courier
        self._shape = pieces_shape(plan, k, slice(0, k.shape[2]))
        self._full = departures_of(plan.steps[0].backward, plan.piece_count, k.shape[0], k.shape[2])
        self._dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        self._dv = torch.empty_like(self._dk)
        self._parts = self._departures = self._dk.new_empty(0)
        self._homecoming: Callable[[], Tensor] | None = None
        self._home: torch.Event | None = None

    def buffers(self, keys: Keys) -> Buffers:
        self._parts, self._departures = self._courier.staged_parts(self._shape)
        return Buffers(*by_piece(self._parts, self._plan), self._departures)

    def depart(self, keys: Keys) -> None:
        lane = self._courier.home_lane
        with lane.on():
            self._homecoming = self._courier.ship_staged(self._parts, self._departures, self._full)
        if lane.stream is not None:  # nothing blocks the host there
            self._settle()

    def collect(self) -> tuple[Tensor, Tensor]:
        self._settle()
        compute_after(self._home)
        return self._dk, self._dv

    def _settle(self) -> None:
        """Waits for the contributions of all ranks and adds them up, once."""
        homecoming, self._homecoming = self._homecoming, None
        if homecoming is None:
            return
        lane = self._courier.home_lane
        with lane.on():
            arrived = homecoming()
        lane.after_compute()  # own contributions are complete
        with lane.on():
            sum_in_rank_order(self._plan, self._parts, None, arrived, self._dk, self._dv)
        self._home = lane.now()
