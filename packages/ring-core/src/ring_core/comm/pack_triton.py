"""Keys and values of some stretches of a sequence, copied side by side by one kernel: what `ring_core.comm.packing`
does with two operations a stretch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ring_core.direct import Launches, addresses, aligned

_launches = Launches()


@triton.jit
def _pack(
    k, v, target, places, k_b, k_s, v_b, v_s, target_b, row, TOKENS: tl.constexpr, ROW: tl.constexpr
):  # fmt: skip
    place = places + tl.program_id(1) * 3
    start, at, length = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    batch = (tl.program_id(2) // 2).to(tl.int64)
    side = tl.program_id(2) % 2
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, ROW)
    inside = (tokens < length)[:, None] & (column < row)[None, :]
    source = (start + tokens).to(tl.int64)[:, None]
    to = target + batch * target_b + ((at + tokens).to(tl.int64) * 2 + side)[:, None] * row + column[None, :]
    if side == 0:
        tl.store(to, tl.load(k + batch * k_b + source * k_s + column[None, :], mask=inside), mask=inside)
    else:
        tl.store(to, tl.load(v + batch * v_b + source * v_s + column[None, :], mask=inside), mask=inside)


def pack(k: Tensor, v: Tensor, target: Tensor, places: Tensor, longest: int) -> None:
    """k, v (B, S, h, D) of one shape with dense heads into target (B, T, 2, h, D), whose tokens are dense. All on the
    current device. places: int32 (N, 3): first token, first token in the target, length; `longest`: the largest
    length."""
    batch, _, heads, head_dim = k.shape
    tensors = k, v, target, places
    device = k.get_device()
    key = k.dtype, k.shape, k.stride(), v.stride(), target.stride(0), places.shape, longest, device
    if _launches.again(key, device, addresses(*tensors), ()):
        return
    row = heads * head_dim
    width = triton.next_power_of_2(row)
    tokens = max(1, 4096 // width)
    arguments = (*tensors, *k.stride()[:2], *v.stride()[:2], target.stride(0), row)
    grid = (triton.cdiv(longest, tokens), places.shape[0], 2 * batch)
    kernel = _pack[grid](*arguments, TOKENS=tokens, ROW=width)
    if aligned(*addresses(*tensors)):
        _launches.add(key, kernel, grid, arguments)
