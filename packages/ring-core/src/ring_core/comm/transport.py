"""What orchestration asks of a transport: the pieces of each step, and a way home for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ring_core.backend import Flags, accumulation_dtype
from ring_core.comm.lane import Lane
from ring_core.ranges import Ranges, count, overlaps


def nothing() -> None:
    """What there is to call where there is nothing to do."""


class Keys(NamedTuple):
    """Pieces of one step of the plan, of some heads."""

    step: int
    heads: slice  # of the key heads
    k: Tensor  # (C, B, S_piece, h, D)
    v: Tensor  # (C, B, S_piece, h, D)
    turn: int = 0
    """Which of the streams of `ring_core.comm.lane.Turns` computes on them."""
    alone: bool = False
    """Whether nothing else is about these heads."""
    arrived: torch.Event | None = None
    """What the current stream must wait for before it reads them."""
    read: Callable[[], None] = nothing
    """To be called when all reading of them is enqueued on the current stream."""
    flags: Flags | None = None


class Buffers(NamedTuple):
    """What a backward adds into, or writes."""

    dk: Tensor  # (C, B, S_piece, h, D), in the accumulation dtype, or the keys' where they are final
    dv: Tensor  # (C, B, S_piece, h, D)
    departures: Tensor | None = None
    """Zeros (C,) int32, where pieces leave as they are completed: `ring_core.backend.departures_of`."""


class Gradients(Protocol):
    """dk and dv on their way to the ranks that hold the keys."""

    def buffers(self, keys: Keys) -> Buffers:
        """For what `Transport.keys` has just yielded: zeros, or whatever there is if they were not asked for."""
        ...

    def depart(self, keys: Keys) -> None:
        """All that computes its contributions is enqueued (on the current stream)."""
        ...

    def collect(self) -> tuple[Tensor, Tensor]:
        """dk, dv (B, S, Hkv, D) of this rank's own keys, summed over all ranks, in the keys' dtype: fresh tensors."""
        ...


class Transport(Protocol):
    """Moves keys out and gradients home as one plan says."""

    head_groups: int
    """How many groups of heads it yields, one after the other."""
    side_by_side: bool
    """Whether what it yields is about different heads or rows each time, so that nothing of it waits for the others."""
    urgent: Lane | None
    """Where the turn URGENT is computed, if it is on the lane that brings its keys: nothing then waits for them. It
    follows what the current stream holds when `keys` begins."""
    final_gradients: bool
    """Whether dk and dv, as the one call about these keys gives them, are the result, in the keys' dtype."""
    gathered: Tensor | None
    """Once all keys have come: what a backward may be given instead of gathering them again."""

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        """The pieces of each step in turn, or of each group of heads, from this rank's k, v (B, S, Hkv, D)."""
        ...

    def gradients(self, k: Tensor, *, zeroed: bool) -> Gradients:
        """k: (B, S, Hkv, D), for shape, dtype and device."""
        ...


class LocalTransport:
    """Nothing travels: one rank, or several of which each sees only its own keys.

    final_gradients: the backend gives dk and dv in the keys' dtype (`ring_core.backend.Capabilities`).
    """

    head_groups = 1
    side_by_side = False
    urgent: Lane | None = None
    gathered: Tensor | None = None

    def __init__(self, final_gradients: bool = False) -> None:
        self.final_gradients = final_gradients

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        yield Keys(0, slice(0, k.shape[2]), k[None], v[None])

    def gradients(self, k: Tensor, *, zeroed: bool) -> Gradients:
        return LocalGradients(k, k.dtype if self.final_gradients else accumulation_dtype(k.dtype), zeroed)


class LocalGradients:
    """The buffers are the result, but for their dtype, where the backend adds in a wider one."""

    def __init__(self, k: Tensor, dtype: torch.dtype, zeroed: bool) -> None:
        make = torch.zeros if zeroed else torch.empty
        self._final = k.dtype
        # tensors of their own: whoever keeps one does not keep the other's memory
        self._dk, self._dv = (make(k.shape, dtype=dtype, device=k.device) for _ in range(2))

    def buffers(self, keys: Keys) -> Buffers:
        return Buffers(self._dk[None], self._dv[None])

    def depart(self, keys: Keys) -> None:
        pass

    def collect(self) -> tuple[Tensor, Tensor]:
        return self._dk.to(self._final), self._dv.to(self._final)


def for_gradients(k: Tensor, tokens: int, zeroed: bool) -> Tensor:
    """(2, B, tokens, Hkv, D) in the accumulation dtype: dk and dv of so many tokens."""
    shape = (2, k.shape[0], tokens, *k.shape[2:])
    make = torch.zeros if zeroed else torch.empty
    return make(shape, dtype=accumulation_dtype(k.dtype), device=k.device)


def in_dtype(sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dk, dv from (2, B, S, Hkv, D), as tensors of their own."""
    return sums[0].to(dtype, copy=True), sums[1].to(dtype, copy=True)


def pack(pair: Tensor | tuple[Tensor, Tensor], held: Ranges, wanted: Ranges) -> Tensor:
    """(2, B, n, Hkv, D), contiguous: the wanted tokens of a pair (k, v) that holds the tokens `held`."""
    k, v = pair
    message = k.new_empty(2, k.shape[0], count(wanted), *k.shape[2:])
    for at, into, n in overlaps(held, wanted):
        for side, x in enumerate((k, v)):
            message[side, :, into : into + n].copy_(x[:, at : at + n])
    return message


def add_tokens(
    total: Tensor, total_ranges: Ranges, part: Tensor, part_ranges: Ranges, only: Ranges | None = None
) -> None:
    """Adds to the packed (2, B, n, Hkv, D) `total` the tokens (of `only`, where given) that `part` holds."""
    if total_ranges == part_ranges and only in (None, part_ranges):
        total.add_(part)
        return
    for start, stop in part_ranges if only is None else only:
        inside = ((start, stop),)
        for (at_total, _, n), (at_part, _, _) in zip(
            overlaps(total_ranges, inside), overlaps(part_ranges, inside), strict=True
        ):
            total[:, :, at_total : at_total + n].add_(part[:, :, at_part : at_part + n])


def whole(tokens: int) -> Ranges:
    """The ranges of a whole chunk."""
    return ((0, tokens),) if tokens else ()
