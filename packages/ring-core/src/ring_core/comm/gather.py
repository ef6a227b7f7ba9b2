"""Gather over torch.distributed: every rank takes the keys it will see in one exchange, and sends their gradients back
in another.

Owners add the contributions to their own keys in fp32 and in rank order, so the result does not depend on who was
first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core.backend import accumulation_dtype
from ring_core.comm.channel import channel
from ring_core.comm.transport import Gradients, Keys, add_tokens, pack, whole, zeros_for_gradients
from ring_core.plan import GatherPlan
from ring_core.ranges import Ranges, count, overlaps


class GatherTransport:
    """Moves what a `GatherPlan` says between the ranks of a group."""

    def __init__(self, plan: GatherPlan, group: ProcessGroup) -> None:
        self.plan = plan
        self.group = group

    def keys(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        plan, link = self.plan, channel(self.group, k.device, "keys")
        mine = whole(k.shape[1])
        sends = [(peer, pack((k, v), mine, wanted)) for peer, wanted in plan.send.items()]
        parcels = {
            source: k.new_empty(2, k.shape[0], count(taken), *k.shape[2:]) for source, taken in plan.receive.items()
        }
        link.after_compute()
        link.post(sends, list(parcels.items())).wait()
        pieces = k.new_empty(2, len(plan.pieces), k.shape[0], piece_length(plan), *k.shape[2:])
        for source, parcel in parcels.items():
            place(pieces, plan, source, parcel, plan.receive[source])
        place(pieces, plan, plan.rank, (k, v), mine)
        yield Keys(pieces[0], pieces[1])

    def gradients(self, k: Tensor) -> Gradients:
        return GatherGradients(self.plan, self.group, k)


class GatherGradients:
    """Contributions to the keys of all ranks, and those of all ranks to own keys."""

    def __init__(self, plan: GatherPlan, group: ProcessGroup, k: Tensor) -> None:
        self._plan = plan
        self._group = group
        self._k = k
        self._parts = zeros_for_pieces(plan, k)

    def buffers(self, step: int) -> tuple[Tensor, Tensor]:
        return self._parts[0], self._parts[1]

    def depart(self, step: int) -> None:
        plan, k = self._plan, self._k
        self._sends = [(source, take(self._parts, plan, source, taken)) for source, taken in plan.receive.items()]
        self._arriving = {
            peer: self._parts.new_empty(2, k.shape[0], count(given), *k.shape[2:]) for peer, given in plan.send.items()
        }
        link = channel(self._group, k.device, "gradients")
        link.after_compute()
        self._pending = link.post(self._sends, list(self._arriving.items()))

    def collect(self) -> tuple[Tensor, Tensor]:
        self._pending.wait()
        return sum_in_rank_order(self._plan, self._k, self._parts, self._arriving)


def piece_length(plan: GatherPlan) -> int:
    """Tokens of a piece; all have the same."""
    return plan.pieces[0].length if plan.pieces else 0


def zeros_for_pieces(plan: GatherPlan, k: Tensor) -> Tensor:
    """(2, C, B, S_piece, Hkv, D) in the accumulation dtype."""
    shape = (2, len(plan.pieces), k.shape[0], piece_length(plan), *k.shape[2:])
    return torch.zeros(shape, dtype=accumulation_dtype(k.dtype), device=k.device)


def place(
    pieces: Tensor, plan: GatherPlan, source: int, parcel: Tensor | tuple[Tensor, Tensor], ranges: Ranges
) -> None:
    """Copies a packed parcel (k, v) of `source`'s tokens to where its pieces (2, C, B, S_piece, Hkv, D) want them."""
    for number, piece in enumerate(plan.pieces):
        if piece.source == source:
            for low, high in piece.needed:
                for at, into, n in overlaps(ranges, ((low, high),)):
                    target = low - piece.start + into
                    for side in (0, 1):
                        pieces[side, number, :, target : target + n].copy_(parcel[side][:, at : at + n])


def take(parts: Tensor, plan: GatherPlan, source: int, taken: Ranges) -> Tensor:
    """(2, B, n, Hkv, D), packed: the contributions in pieces (2, C, B, S_piece, Hkv, D) to the tokens taken from
    `source`."""
    found = []
    for number, piece in enumerate(plan.pieces):
        if piece.source == source:
            found += [parts[:, number, :, low - piece.start : high - piece.start] for low, high in piece.needed]
    return torch.cat(found, dim=2)


def sum_in_rank_order(plan: GatherPlan, k: Tensor, parts: Tensor, arrived: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """dk, dv (B, S, Hkv, D) of own keys: contributions of rank 0, 1, … in turn."""
    total = zeros_for_gradients(k, k.shape[1])
    for rank in range(plan.problem.world_size):
        if rank == plan.rank:
            for number, piece in enumerate(plan.pieces):
                if piece.source == rank:
                    total[:, :, piece.start : piece.start + piece.length].add_(parts[:, number])
        elif rank in arrived:
            add_tokens(total, whole(k.shape[1]), arrived[rank], plan.send[rank])
    return total[0], total[1]
