"""Gather: every rank takes the keys it will see, and sends their gradients home to their owners.

Both ways in *head groups* (the `heads_k_stride` of Llama 3's context parallelism): while the keys of one group of heads
are computed on, those of the next arrive and the gradients of the last go home, so that only the first arrival and the
last way home are waited for, and only two groups' worth of foreign keys is in memory. Heads are independent: nothing
is merged.

    lane      keys 0 │ keys 1 ─────── │ keys 2 (buffer of 0) … gradients 0 home │ …
    compute          │ group 0 ────── │ group 1 ──────────── …

Queries that see own keys only (`GatherPlan.home`) wait for nothing and are waited for by nobody: they are computed
while the keys of the others arrive and their gradients go home, on whatever the others leave of the GPU. Beside them, a
group that is the only one is a chain, in which everything waits for what comes before. So it is computed on the lane
that brings its keys, or takes its gradients home, and no mark is needed in between:

    lane      publish │ keys │ group 0 ────────               home lane │ group 0 ──────── │ gradients home │ sum
    compute           │ queries that wait for nothing         compute   │ queries that wait for nothing

Owners add the contributions to their own keys in fp32 and in rank order, so the result does not depend on who was
first. How the bytes travel is a `Courier`'s business: torch.distributed (`ring_core.comm.collectives`) or memory that
all ranks can read (`ring_core.comm.peer`). Keys and values of a token travel side by side, as (2, heads, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ring_core.backend import accumulation_dtype
from ring_core.comm.contributions import sum_in_rank_order
from ring_core.comm.lane import URGENT, Lane, compute_after, compute_now
from ring_core.comm.transport import Buffers, Gradients, Keys, nothing
from ring_core.plan import GatherPlan

BUFFERS = 2
Heads = tuple[slice, ...]
"""Groups of key heads, in order."""
HOME = 1
"""The step of queries that see own keys only."""


class Courier(Protocol):
    """Carries what a `GatherPlan` says. Calls about keys are made inside `lane`, `ship` and its result inside
    `home_lane`, `parts` on the compute stream. Where lanes are streams the callables returned only enqueue, elsewhere
    they wait."""

    lane: Lane
    home_lane: Lane
    offered: torch.Event | None
    """Behind it nothing that others wait for needs this GPU's multiprocessors any more; marked where the plan has a
    home step."""

    def offer(self, k: Tensor, v: Tensor, groups: Heads) -> None:
        """k, v (B, S, Hkv, D) of this rank are what the others will fetch."""
        ...

    def recall(self, k: Tensor, groups: Heads) -> None:
        """Instead of `offer`, on all ranks: nobody will fetch anything, but contributions will be shipped."""
        ...

    def fetch(self, number: int, pieces: Tensor) -> Callable[[], None]:
        """Starts filling pieces (B, C * S_piece, 2, h, D) with the group's keys; calling the result ends it."""
        ...

    def fetched(self) -> None:
        """This rank has taken all it will take of what was offered."""
        ...

    def parts(self, shape: torch.Size, zeroed: bool) -> Tensor:
        """(B, C * S_piece, 2, h, D) in the accumulation dtype for a group's contributions; at most BUFFERS of them are
        in use."""
        ...

    def ship(self, parts: Tensor) -> Callable[[], Tensor]:
        """Starts bringing contributions home; calling the result gives those of others to this rank's keys, one after
        the other by rank: (B, m, 2, h, D)."""
        ...


class GatherTransport:
    """Moves what a `GatherPlan` says, head group by head group.

    home_in_place: the gradients of the home step are in the keys' dtype anyway (`ring_core.backend.Capabilities.
    rounds_gradients`): they are put where the result will be, and only keys that others contribute to are summed.
    urgent: of the only group beside a home step: the lane of the courier on which all the rest is a chain, that of keys
    in a forward, of their way home in a backward (the signals of either are in order, whoever calls, on its own lane).
    keep: what is gathered stays, as `gathered`; gathered: what was so kept, and is not gathered again.
    """

    final_gradients = False

    def __init__(
        self,
        plan: GatherPlan,
        courier: Courier,
        groups: Heads,
        *,
        urgent: Lane | None = None,
        home_in_place: bool = False,
        keep: bool = False,
        gathered: Tensor | None = None,
    ) -> None:
        assert not keep or len(groups) == 1, "several groups take turns in their buffers"
        self.plan = plan
        self.courier = courier
        self.groups = groups
        self.head_groups = len(groups)
        self.side_by_side = len(groups) > 1 or plan.home is not None
        self.urgent = urgent
        self._home_in_place = home_in_place and plan.home is not None
        self._keep = keep
        self.gathered = gathered

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        if self.gathered is not None:
            yield from self._kept(k, v, self.gathered)
            return
        plan, courier, lane = self.plan, self.courier, self.courier.lane
        # Allocated here and freed here, on the compute stream, which by then has waited for all that the lane did.
        buffers = _buffers([pieces_shape(plan, k, heads) for heads in self.groups], k)
        marks: list[torch.Event | None] = []  # behind the reading of each group
        if self._keep:
            self.gathered = buffers[0]
        lane.after_compute()  # and what fills new memory, where torch is told to
        with lane.on():
            courier.offer(k, v, self.groups)
            arrival = courier.fetch(0, buffers[0])
            if self.urgent is not None:
                arrival()
                courier.fetched()
        if self.urgent is not None and self.urgent is not lane:
            self.urgent.after(lane.now())
        for number, heads in enumerate(self.groups):
            if plan.home is not None:
                # Not before what the others wait for is on offer: a kernel of this size would be in the way for long.
                yield self._own(k, v, heads, courier.offered)
            if self.urgent is not None:
                yield Keys(0, heads, *by_piece(buffers[0], plan), URGENT)
                return
            with lane.on():
                arrival()
                landed = lane.now()
                if lane.stream is None:  # the host is about to compute: post before
                    arrival = self._next(number, buffers, marks)
            read = nothing
            if number + BUFFERS < len(self.groups):  # there is a group that will lie where this one does
                read = lambda: marks.append(compute_now(lane))  # noqa: E731
            yield Keys(0, heads, *by_piece(buffers[number], plan), *self._turn(number), landed, read)
            if lane.stream is not None:  # the GPU is about to compute, and its host should first tell it so
                with lane.on():
                    arrival = self._next(number, buffers, marks)

    def _own(self, k: Tensor, v: Tensor, heads: slice, after: torch.Event | None = None) -> Keys:
        """Those of the home step."""
        assert self.plan.home is not None
        start, stop = self.plan.home
        return Keys(HOME, heads, own_part(k, start, stop, heads), own_part(v, start, stop, heads), arrived=after)

    def _turn(self, number: int) -> tuple[int, bool]:
        """Which turn a group's gathered keys are computed on, and whether nothing else is about these heads."""
        alone = self.plan.home is None
        return number % 2 if alone else URGENT, alone

    def _kept(self, k: Tensor, v: Tensor, pieces: Tensor) -> Iterator[Keys]:
        self.courier.recall(k, self.groups)
        if self.urgent is not None:
            self.urgent.after_compute()
        for number, heads in enumerate(self.groups):
            if self.plan.home is not None:
                yield self._own(k, v, heads)
            some = pieces if len(self.groups) == 1 else pieces[:, :, :, heads]
            yield Keys(0, heads, *by_piece(some, self.plan), *self._turn(number))

    def _next(self, number: int, buffers: list[Tensor], marks: list[torch.Event | None]) -> Callable[[], None]:
        """Starts fetching the group after the number-th."""
        following = number + 1
        if following == len(self.groups):
            self.courier.fetched()
            return nothing
        if number:
            self.courier.lane.after(marks[number - 1])
        return self.courier.fetch(following, buffers[following])

    def gradients(self, k: Tensor, *, zeroed: bool) -> Gradients:
        return GatherGradients(
            self.plan, self.courier, self.groups, k, zeroed, self._home_in_place, chain=self.urgent is not None
        )


class GatherGradients:
    """Contributions to the keys of all ranks, and those of all ranks to own keys."""

    def __init__(
        self,
        plan: GatherPlan,
        courier: Courier,
        groups: Heads,
        k: Tensor,
        zeroed: bool,
        home_in_place: bool,
        *,
        chain: bool,
    ) -> None:
        self._plan = plan
        self._chain = chain
        self._home_in_place = home_in_place
        self._courier = courier
        self._groups = groups
        self._k = k
        self._zeroed = zeroed
        self._dk, self._dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        self._parts: list[Tensor] = []
        self._at_home: list[tuple[Tensor | None, torch.Event | None]] = []
        self._homecomings: dict[int, Callable[[], Tensor]] = {}
        self._home: list[torch.Event | None] = []

    def buffers(self, keys: Keys) -> Buffers:
        plan, k = self._plan, self._k
        if keys.step == HOME:
            assert plan.home is not None
            if self._home_in_place:
                self._at_home.append((None, None))
                start, stop = plan.home
                return Buffers(*[own_part(x, start, stop, keys.heads) for x in (self._dk, self._dv)])
            shape = (k.shape[0], plan.home[1] - plan.home[0], 2, keys.k.shape[3], k.shape[3])
            make = torch.zeros if self._zeroed else torch.empty
            own = make(shape, dtype=accumulation_dtype(k.dtype), device=k.device)
            self._at_home.append((own, None))
            return Buffers(own[None, :, :, 0], own[None, :, :, 1])
        number = len(self._parts)
        if number >= BUFFERS:  # whose buffer this is
            self._settle(number - BUFFERS)
            compute_after(self._home[number - BUFFERS])
        self._parts.append(self._courier.parts(pieces_shape(plan, k, keys.heads), self._zeroed))
        return Buffers(*by_piece(self._parts[number], plan))

    def depart(self, keys: Keys) -> None:
        lane = self._courier.home_lane
        if keys.step == HOME:
            self._at_home[-1] = self._at_home[-1][0], compute_now(lane)
            return
        number = len(self._home)
        lane.after_compute()
        with lane.on():
            self._homecomings[number] = self._courier.ship(self._parts[number])
            if lane.stream is not None:  # nothing blocks the host there
                self._settle(number)
        self._home.append(None if self._chain else lane.now())  # a chain's lane is waited for as a whole

    def collect(self) -> tuple[Tensor, Tensor]:
        for number in range(len(self._groups)):
            self._settle(number)
        for mark in self._home[-1:]:
            compute_after(mark)
        return self._dk, self._dv

    def _settle(self, number: int) -> None:
        """Waits for a group's contributions and adds them up, once."""
        homecoming = self._homecomings.pop(number, None)
        if homecoming is None:
            return
        parts, heads = self._parts[number], self._groups[number]
        arrived, at_home = homecoming(), None
        if self._at_home:
            at_home, mark = self._at_home[number]
            self._courier.home_lane.after(mark)
        to = of_heads(self._dk, heads), of_heads(self._dv, heads)
        sum_in_rank_order(self._plan, parts, at_home, arrived, *to, home_in_place=self._home_in_place)


def pieces_shape(plan: GatherPlan, k: Tensor, heads: slice) -> torch.Size:
    """(B, C * S_piece, 2, h, D): all pieces of one head group, keys and values of a token side by side."""
    return torch.Size((k.shape[0], plan.piece_count * plan.piece_length, 2, heads.stop - heads.start, k.shape[3]))


def _buffers(shapes: list[torch.Size], k: Tensor) -> list[Tensor]:
    """One of each shape, every other in the same memory."""
    if len(shapes) == 1:
        return [torch.empty(shapes[0], dtype=k.dtype, device=k.device)]
    largest = [max(shape.numel() for shape in shapes[at::BUFFERS]) for at in range(BUFFERS)]
    memory = [k.new_empty(numel) for numel in largest]
    return [memory[at % BUFFERS][: shape.numel()].view(shape) for at, shape in enumerate(shapes)]


def own_part(x: Tensor, start: int, stop: int, heads: slice) -> Tensor:
    """Tokens [start, stop) of some heads of x (B, S, Hkv, D), as one piece (1, B, n, h, D)."""
    stride = x.stride()
    shape = 1, x.shape[0], stop - start, heads.stop - heads.start, x.shape[3]
    first = x.storage_offset() + start * stride[1] + heads.start * stride[2]
    return x.as_strided(shape, (0, *stride), first)


def of_heads(x: Tensor, heads: slice) -> Tensor:
    """Some heads of x (B, S, Hkv, D)."""
    return x if heads.stop - heads.start == x.shape[2] else x[:, :, heads]


def by_piece(pieces: Tensor, plan: GatherPlan) -> tuple[Tensor, Tensor]:
    """Keys and values, or their gradients, as a backend wants them: two views (C, B, S_piece, h, D)."""
    batch, _, _, heads, head_dim = pieces.shape
    entry, token, side, *dense = pieces.stride()
    shape = plan.piece_count, batch, plan.piece_length, heads, head_dim
    strides = plan.piece_length * token, entry, token, *dense
    first = pieces.storage_offset()  # an operation for each view, where taking apart and turning would be four
    return pieces.as_strided(shape, strides, first), pieces.as_strided(shape, strides, first + side)
