"""The sum of all ranks' contributions to one rank's dk and dv, as one kernel: what `ring_core.comm.contributions` does
with an operation a rank and stretch.

One program takes TOKENS tokens of one batch entry in one cell (a stretch of the chunk to which the same ranks
contributed), all their heads, keys and values, and adds the ranks' numbers in rank order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_core.direct import Launches, addresses, aligned

_launches = Launches()


@triton.jit
def _sum(
    own,
    at_home,
    arrived,
    cells,
    dk,
    dv,
    own_b,
    at_home_b,
    arrived_b,
    target_b,
    target_s,
    row,
    WORLD: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROW: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    cell = cells + tl.program_id(1) * (3 + WORLD)
    start, length = tl.load(cell), tl.load(cell + 1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, ROW)
    inside = (tokens < length)[:, None] & (column < row)[None, :]
    target = batch * target_b + (start + tokens).to(tl.int64)[:, None] * target_s
    target += column[None, :]
    for side in tl.static_range(2):
        out = dk if side == 0 else dv
        total = tl.zeros([TOKENS, ROW], tl.float32)
        for rank in tl.static_range(WORLD):
            place = tl.load(cell + 2 + rank)  # token in the rank's buffer, -1: it did not contribute here
            if place >= 0:
                at = ((place + tokens).to(tl.int64) * 2 + side)[:, None] * row + column[None, :]
                if rank == RANK:
                    total += tl.load(own + batch * own_b + at, mask=inside, other=0.0)
                else:
                    total += tl.load(arrived + batch * arrived_b + at, mask=inside, other=0.0)
            if rank == RANK:
                place = tl.load(cell + 2 + WORLD)
                if place >= 0:
                    if IN_PLACE:
                        total += tl.load(out + target, mask=inside, other=0.0).to(tl.float32)
                    else:
                        at = ((place + tokens).to(tl.int64) * 2 + side)[:, None] * row + column[None, :]
                        total += tl.load(at_home + batch * at_home_b + at, mask=inside, other=0.0)
        tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


def sum_contributions(
    own: Tensor,
    at_home: Tensor | None,
    arrived: Tensor,
    cells: Tensor,
    longest: int,
    rank: int,
    world_size: int,
    dk: Tensor,
    dv: Tensor,
    *,
    home_in_place: bool,
) -> None:
    """own (B, n, 2, h, D), at_home (B, l, 2, h, D), arrived (B, m, 2, h, D): contiguous, fp32; cells: int32
    (cells, 3 + W): start, length, and for each rank, then for the home step, the token in its buffer at which the cell
    lies; dk, dv (B, S, h, D): alike in strides, heads dense; home_in_place: they hold what the home step gave. All on
    the current device."""
    at_home = own if at_home is None else at_home  # which is not read then
    tensors = own, at_home, arrived, cells, dk, dv
    device, gradients = own.get_device(), (dk.dtype, dk.shape, dk.stride())
    key = own.shape, at_home.shape, arrived.shape, cells.shape, gradients, longest, rank, home_in_place, device
    if _launches.again(key, device, addresses(*tensors), ()):
        return
    batch, _, _, heads, head_dim = own.shape
    row = heads * head_dim
    width = triton.next_power_of_2(row)
    tokens = max(1, 4096 // width)
    grid = (triton.cdiv(longest, tokens), cells.shape[0], batch)
    strides = own.stride(0), at_home.stride(0), arrived.stride(0), dk.stride(0), dk.stride(1)
    arguments = (*tensors, *strides, row)
    kernel = _sum[grid](*arguments, WORLD=world_size, RANK=rank, TOKENS=tokens, ROW=width, IN_PLACE=home_in_place)
    if aligned(*addresses(*tensors)):
        _launches.add(key, kernel, grid, arguments)
