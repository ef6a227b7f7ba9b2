"""Forward, portable: one program owns a tile of queries and walks its strip's segments in plan order.

            keys of segment 0        segment 1 (cut by the band)
            ┌─────┬─────┬─────┐     ┌─────┬─────┐
  query ──▶ │whole│whole│mask │ ──▶ │whole│mask░│ ──▶  out, lse   (the strip ends here: LAST)
   tile     └─────┴─────┴─────┘     └─────┴─────┘      state, lse (it goes on in another call)
  (ROWS, D)   m, l (ROWS,), acc (ROWS, D) in registers

It starts from nothing (FIRST), from the sinks, or from what an earlier call has left: m = lse, l = 1, acc = state. In
every segment it visits only the tiles of KEYS keys that the band touches: first those that need no mask, then those on
the band's edges and at the ragged end. grid = (work list, query heads, batch entries).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ring_triton.portable.common import (
    COLUMNS,
    WORK_COLUMNS,
    accumulate,
    distance_penalty,
    kept,
    load_tile,
    logarithm,
    operand,
    power,
    product,
    rounded,
    tanh,
    walk,
)

FIRST = tl.constexpr(1)
LAST = tl.constexpr(2)


@triton.jit
def _attend(
    acc, total, top, q, k_base, v_base, k_stride, v_stride, i, j, k_len, lower, upper, q_positions, k_position, step,
    slope, seed, keep_from, keep_scale, head, batch, score_scale, cap_scale,
    KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, FUSED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from key j of the segment."""
    columns = j + tl.arange(0, KEYS)
    there = columns < k_len
    dtype: tl.constexpr = k_base.dtype.element_ty
    k = operand(load_tile(k_base, j, k_stride, there, KEYS, D, WIDTH, LONG, MASKED), dtype, UPCAST)
    s = product(q, tl.trans(k), ACC, UPCAST, PRECISION)  # (ROWS, KEYS)
    if SOFTCAP:
        s = tanh(s * score_scale) * cap_scale
    elif not FUSED:
        s = s * score_scale
    if ALIBI:
        s -= distance_penalty(slope, q_positions[:, None], (k_position + step * columns)[None, :], ACC)
    if MASKED:
        far = columns[None, :] - i[:, None]
        s = tl.where((far >= lower) & (far <= upper) & there[None, :], s, float("-inf"))
    if FUSED:  # the scale is positive: the largest product is the largest score
        new_top = tl.maximum(top, tl.max(s, 1) * score_scale)
    else:
        new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
    if FUSED:
        p = power(s * score_scale - base[:, None], UNIT)
    else:
        p = power(s - base[:, None], UNIT)
    decay = power(top - base, UNIT)
    total = total * decay + tl.sum(p, 1)
    if DROPOUT:
        keep = kept(seed, keep_from, q_positions[:, None], (k_position + step * columns)[None, :], head, batch)
        p = tl.where(keep, p * keep_scale, 0.0)
    v = operand(load_tile(v_base, j, v_stride, there, KEYS, D, WIDTH, LONG, MASKED), dtype, UPCAST)
    acc = acc * decay[:, None]
    acc = accumulate(operand(p, dtype, UPCAST), v, acc, ACC, UPCAST, PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["first_head", "keep_from"])
def forward_kernel(
    q, k, v, out, lse, state, work, segments, slopes, sinks, seed,
    q_b, q_s, q_h, k_c, k_b, k_s, k_h, v_c, v_b, v_s, v_h, out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
    slope_b, group, score_scale, cap_scale, keep_from, keep_scale, first_head,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr, SINKS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    work += tl.program_id(0) * WORK_COLUMNS
    head = tl.program_id(1)
    start = tl.load(work)  # of the tile, in its strip
    number = tl.load(work + 1)
    end = tl.load(work + 2)
    entry = tl.load(work + 3)
    batch = tl.where(entry < 0, tl.program_id(2), entry).to(tl.int64)
    row = segments + number * COLUMNS
    q_start = tl.load(row)
    q_len = tl.load(row + 1)
    begins = (tl.load(row + 11) & FIRST) != 0
    ends = (tl.load(segments + (end - 1) * COLUMNS + 11) & LAST) != 0

    i = start + tl.arange(0, ROWS)  # counted from the strip's first query
    inside = i < q_len
    last = tl.minimum(start + ROWS, q_len) - 1
    d = tl.arange(0, WIDTH)
    block = inside[:, None] & (d < D)[None, :]
    tokens = (q_start + i).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    q_tile = load_tile(
        q + batch * q_b + head.to(tl.int64) * q_h, q_start + start, q_s, inside, ROWS, D, WIDTH, LONG, True
    )
    q_tile = operand(q_tile, dtype, UPCAST)
    kv_head = (head // group).to(tl.int64)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slope_b + head).to(ACC) * UNIT
    key = tl.zeros([], tl.int64)
    if DROPOUT:
        key = tl.load(seed)

    lse_at = lse + batch * lse_b + head.to(tl.int64) * lse_h + tokens
    top = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    acc = tl.zeros([ROWS, WIDTH], ACC)
    if SINKS:  # noqa: SIM102 - one is a constant, the other is not
        if begins:
            top = tl.zeros([ROWS], ACC) + tl.load(sinks + head).to(ACC) * UNIT
            total += 1.0
    if STATE:
        state_at = state + batch * state_b + head.to(tl.int64) * state_h + tokens[:, None] * state_s + d[None, :]
        if not begins:
            top = tl.load(lse_at, mask=inside, other=float("-inf")) * UNIT
            seen = top > float("-inf")
            total = tl.where(seen, 1.0, 0.0).to(ACC)
            acc = tl.load(state_at, mask=block & seen[:, None], other=0.0)

    while number < end:
        row = segments + number * COLUMNS
        piece = tl.load(row + 2).to(tl.int64)
        k_start = tl.load(row + 3).to(tl.int64)
        k_len = tl.load(row + 4)
        lower = tl.load(row + 5)
        upper = tl.load(row + 6)
        step = tl.load(row + 9)
        q_positions = tl.load(row + 7) + step * i
        k_position = tl.load(row + 8)
        k_base = k + piece * k_c + batch * k_b + kv_head * k_h + k_start * k_s
        v_base = v + piece * v_c + batch * v_b + kv_head * v_h + k_start * v_s
        begin, before, whole, tiles = walk(start, last, k_len, lower, upper, KEYS)
        for n in tl.range(0, whole):
            acc, total, top = _attend(
                acc, total, top, q_tile, k_base, v_base, k_s, v_s, i, begin + (before + n) * KEYS, k_len, lower, upper,
                q_positions, k_position, step, slope, key, keep_from, keep_scale, first_head + head, batch, score_scale,
                cap_scale, KEYS, D, WIDTH, LONG, ACC, UNIT, UPCAST, PRECISION, FUSED, SOFTCAP, ALIBI, DROPOUT, False,
            )  # fmt: skip
        for n in tl.range(0, tiles - whole):
            j = begin + tl.where(n < before, n, n + whole) * KEYS
            acc, total, top = _attend(
                acc, total, top, q_tile, k_base, v_base, k_s, v_s, i, j, k_len, lower, upper,
                q_positions, k_position, step, slope, key, keep_from, keep_scale, first_head + head, batch, score_scale,
                cap_scale, KEYS, D, WIDTH, LONG, ACC, UNIT, UPCAST, PRECISION, FUSED, SOFTCAP, ALIBI, DROPOUT, True,
            )  # fmt: skip
        number += 1

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    tl.debug_barrier()  # several threads read the same lse, each for itself: all must have, before one overwrites it
    tl.store(lse_at, tl.where(empty, float("-inf"), (top + logarithm(total, UNIT)) / UNIT), mask=inside)
    out_at = out + batch * out_b + head.to(tl.int64) * out_h + tokens[:, None] * out_s + d[None, :]
    if STATE:
        if ends:
            tl.store(out_at, rounded(acc, dtype, UPCAST), mask=block)
        else:
            tl.store(state_at, acc, mask=block)
    else:
        tl.store(out_at, rounded(acc, dtype, UPCAST), mask=block)
