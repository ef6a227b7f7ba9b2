"""The ring: keys go from neighbour to neighbour, their gradients follow one step behind and then go home.

Two buffers for keys: hop s+1 is posted as soon as hop s has landed, and writes what step s-1 has read. K and V are one
message. Gradients are summed in fp32 on a channel of their own: a rank adds its part when the travelling sum lands, and
passes it on while the next step computes (the schedule of Liu et al., "Ring attention with blockwise transformers",
arXiv:2310.01889, with only those tokens on the wire that somebody further on needs).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core.backend import accumulation_dtype
from ring_core.comm.channel import Channel, Pending, channel
from ring_core.comm.lane import Lane
from ring_core.comm.transport import Buffers, Gradients, Keys, add_tokens, for_gradients, in_dtype, pack, whole
from ring_core.plan import RingPlan
from ring_core.ranges import Ranges, count


class RingTransport:
    """Moves what a `RingPlan` says between the ranks of a group."""

    head_groups = 1
    side_by_side = False
    urgent: Lane | None = None
    gathered: Tensor | None = None
    final_gradients = False

    def __init__(self, plan: RingPlan, group: ProcessGroup) -> None:
        self.plan = plan
        self.group = group

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        plan, link = self.plan, channel(self.group, k.device, "keys")
        after, before = (plan.rank + 1) % link.world_size, (plan.rank - 1) % link.world_size
        pair: Tensor | tuple[Tensor, Tensor] = (k, v)
        held = whole(k.shape[1])
        buffer_free: list[torch.cuda.Event | None] = [None, None]
        link.after_compute()  # k and v are ready, and the calls before this one have read their buffers
        for step in range(len(plan.steps)):
            pending = None
            landing = held
            if step + 1 < len(plan.steps):
                hop = plan.hops[step + 1]
                landing = hop.receive
                shape = (2, k.shape[0], count(landing), *k.shape[2:])
                received = link.slot(f"hop{(step + 1) % 2}", shape, k.dtype)
                free = buffer_free[(step + 1) % 2]
                if free is not None and link.stream is not None:
                    link.stream.wait_event(free)
                with link.on_stream():
                    sends = [(after, _message(pair, held, hop.send))] if hop.send else []
                pending = link.post(sends, [(before, received)] if landing else [])

            def read(buffer: int = step % 2) -> None:
                if link.stream is not None:
                    buffer_free[buffer] = torch.cuda.current_stream().record_event()

            yield Keys(step, slice(0, k.shape[2]), pair[0][None], pair[1][None], read=read)
            if pending is not None:
                pending.wait()
                pair, held = received, landing

    def gradients(self, k: Tensor, *, zeroed: bool) -> Gradients:
        return RingGradients(self.plan, channel(self.group, k.device, "gradients"), k, zeroed)


class RingGradients:
    """dk and dv of the chunks that pass by."""

    def __init__(self, plan: RingPlan, link: Channel, k: Tensor, zeroed: bool) -> None:
        self._plan = plan
        self._link = link
        self._k = k
        self._zeroed = zeroed
        self._own = for_gradients(k, k.shape[1], zeroed)
        self._part = self._own
        self._arriving: Tensor | None = None
        self._home: Tensor | None = None
        self._pending: list[Pending] = []

    def buffers(self, keys: Keys) -> Buffers:
        if step := keys.step:
            self._part = for_gradients(self._k, count(self._plan.hops[step].receive), self._zeroed)
        return Buffers(self._part[0][None], self._part[1][None])

    def depart(self, keys: Keys) -> None:
        plan, link, step = self._plan, self._link, keys.step
        link.after_compute()
        with link.on_stream():
            self._settle()
            target = plan.gradient_hops[step].target
            sends = [] if target is None else [(target, self._sum(step))]
            receives = []
            if step + 1 < len(plan.steps) and (arriving := plan.gradient_hops[step + 1].arriving):
                self._arriving = self._receive(f"sum{step % 2}", arriving)
                receives.append(((plan.rank - 1) % link.world_size, self._arriving))
            if plan.home is not None and plan.home[1] == step:
                self._home = self._receive("home", plan.home[2])
                receives.append((plan.home[0], self._home))
            self._pending = [link.post(sends, receives)]
        if link.stream is not None:
            self._part.record_stream(link.stream)  # read there; may be freed here before

    def collect(self) -> tuple[Tensor, Tensor]:
        self._settle()
        if self._link.stream is not None:
            torch.cuda.current_stream().wait_stream(self._link.stream)
        if self._home is not None and self._plan.home is not None:
            add_tokens(self._own, whole(self._k.shape[1]), self._home, self._plan.home[2])
        return in_dtype(self._own, self._k.dtype)

    def _settle(self) -> None:
        while self._pending:
            self._pending.pop().wait()

    def _sum(self, step: int) -> Tensor:
        """What earlier visitors have summed and this rank's own part, as it travels on."""
        hop, parcel = self._plan.gradient_hops[step], self._plan.hops[step].receive
        arrived, self._arriving = self._arriving, None
        if arrived is not None and hop.arriving == hop.holding:
            total = arrived
        elif arrived is None and hop.own == hop.holding == parcel:
            return self._part
        else:
            total = for_gradients(self._k, count(hop.holding), True)
            if arrived is not None:
                add_tokens(total, hop.holding, arrived, hop.arriving)
        add_tokens(total, hop.holding, self._part, parcel, only=hop.own)
        return total

    def _receive(self, name: str, ranges: Ranges) -> Tensor:
        shape = (2, self._k.shape[0], count(ranges), *self._k.shape[2:])
        return self._link.slot(name, shape, accumulation_dtype(self._k.dtype))


def _message(pair: Tensor | tuple[Tensor, Tensor], held: Ranges, wanted: Ranges) -> Tensor:
    """What is sent on: the buffer itself where it holds just that."""
    if isinstance(pair, Tensor) and held == wanted:
        return pair
    return pack(pair, held, wanted)
