"""What the ranks have contributed to the gradients of one rank's keys, and their sum: in rank order, so that it does
not depend on who was first."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ring_core.comm.packing import Places
from ring_core.merge import triton_is_importable
from ring_core.plan import GatherPlan
from ring_core.ranges import count, merge


def stretches(plan: GatherPlan, source: int) -> tuple[tuple[int, int, int], ...]:
    """(start in the chunk of `source`, place in the flat pieces, length) of all that lies there, by start."""
    return _stretches(plan)[source]


@lru_cache(maxsize=1024)
def _stretches(plan: GatherPlan) -> dict[int, tuple[tuple[int, int, int], ...]]:
    found: dict[int, list[tuple[int, int, int]]] = {source: [] for source in range(plan.problem.world_size)}
    for source, start, length, piece, offset in plan.placements:
        found[source].append((start, piece * plan.piece_length + offset, length))
    return {source: tuple(sorted(places)) for source, places in found.items()}


@lru_cache(maxsize=256)
def pieces_of(plan: GatherPlan) -> dict[int, tuple[int, ...]] | None:
    """Which pieces each rank's keys are, in a plan whose pieces have one owner each; None where one has several, as
    that of packed documents, or there is one piece only: then there is nothing to compute on before all is there."""
    owners = {(placement.piece, placement.source) for placement in plan.placements}
    if plan.piece_count < 2 or len(owners) > plan.piece_count or plan.home is not None:
        return None
    return {source: tuple(sorted(piece for piece, owner in owners if owner == source)) for source in plan.order}


@lru_cache(maxsize=256)
def arrival_places(plan: GatherPlan) -> dict[int, int]:
    """Where each peer's contributions begin in the buffer (B, m, 2, h, D) that takes all of them, in tokens."""
    places, begin = {}, 0
    for peer in sorted(plan.send):
        places[peer] = begin
        begin += count(plan.send[peer])
    return places


@lru_cache(maxsize=256)
def arrivals(plan: GatherPlan) -> int:
    """m: tokens of all contributions of others to this rank's keys."""
    return sum(count(given) for given in plan.send.values())


@lru_cache(maxsize=1024)
def published(plan: GatherPlan) -> Places:
    """What of this rank's chunk some rank takes, itself included; it lies in a slot as in the chunk."""
    own = [(start, start + length) for start, _, length in stretches(plan, plan.rank)]
    taken = merge([*own, *(some for wanted in plan.send.values() for some in wanted)])
    return tuple((start, start, stop - start) for start, stop in taken)


def sum_in_rank_order(
    plan: GatherPlan,
    parts: Tensor,
    at_home: Tensor | None,
    arrived: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    home_in_place: bool = False,
) -> None:
    """Writes the sums of all contributions to this rank's keys.

    Args:
        parts: (B, C * S_piece, 2, h, D): this rank's contributions to all that it gathered.
        at_home: (B, home[1] - home[0], 2, h, D): those of its home step to own keys, if the plan has one.
        arrived: (B, m, 2, h, D): those of others to its keys, one after the other by rank.
        dk, dv: (B, S, h, D), any dtype.
        home_in_place: dk and dv hold the contributions of the home step; at_home is None.
    """
    if parts.is_cuda and parts.dtype == torch.float32 and dk.stride(2) == dk.shape[3] and triton_is_importable():
        from ring_core.comm.sum_triton import sum_contributions

        table, longest = _on_device(plan, home_in_place, parts.device)
        if longest:
            world = plan.rank, plan.problem.world_size
            sum_contributions(parts, at_home, arrived, table, longest, *world, dk, dv, home_in_place=home_in_place)
        return
    total = parts.new_zeros(dk.shape[0], dk.shape[1], *parts.shape[2:])
    begins = arrival_places(plan)
    for rank in range(plan.problem.world_size):
        if rank == plan.rank:
            for start, at, length in stretches(plan, rank):
                total[:, start : start + length].add_(parts[:, at : at + length])
            if plan.home is not None:
                own = slice(*plan.home)
                if home_in_place:
                    total[:, own, 0].add_(dk[:, own])
                    total[:, own, 1].add_(dv[:, own])
                elif at_home is not None:
                    total[:, own].add_(at_home)
        elif rank in plan.send:
            offset = begins[rank]
            for start, stop in plan.send[rank]:
                total[:, start:stop].add_(arrived[:, offset : offset + stop - start])
                offset += stop - start
    dk.copy_(total[:, :, 0])
    dv.copy_(total[:, :, 1])


@lru_cache(maxsize=256)
def _cells(plan: GatherPlan, home_in_place: bool) -> NDArray[np.int32]:
    """int32 (cells, 3 + W): the chunk cut where contributors change. Start, length, then for each rank the token in its
    buffer (for others: in that of all arrivals) at which the cell lies, or -1; last in that of the home step. Without
    cells that are the home step's alone where it writes in place."""
    rank, tokens = plan.rank, plan.problem.key_chunk(plan.rank)
    given: dict[int, list[tuple[int, int, int]]] = {rank: list(stretches(plan, rank))}
    for peer, ranges in plan.send.items():
        offset = arrival_places(plan)[peer]
        given[peer] = []
        for start, stop in ranges:
            given[peer].append((start, offset, stop - start))
            offset += stop - start
    if plan.home is not None:
        given[plan.problem.world_size] = [(plan.home[0], 0, plan.home[1] - plan.home[0])]
    edges = {0, tokens}
    for places in given.values():
        edges |= {edge for start, _, length in places for edge in (start, start + length)}
    rows = []
    for start, stop in pairwise(sorted(edges)):
        row = [start, stop - start] + [-1] * (plan.problem.world_size + 1)
        for contributor, places in given.items():
            for first, at, length in places:
                if first <= start < first + length:
                    row[2 + contributor] = at + start - first
        if not (home_in_place and row[-1] >= 0 and max(row[2:-1]) < 0):
            rows.append(row)
    return np.array(rows, np.int32).reshape(-1, 3 + plan.problem.world_size)


def _on_device(plan: GatherPlan, home_in_place: bool, device: torch.device) -> tuple[Tensor, int]:
    """The cells, and the length of the longest: kept with the plan."""
    cache, key = plan.steps[0].backward.cache, ("cells", home_in_place, device)
    if key not in cache:
        cells = _cells(plan, home_in_place)
        cache[key] = torch.from_numpy(cells).to(device), int(cells[:, 1].max(initial=0))
    found: tuple[Tensor, int] = cache[key]
    return found
