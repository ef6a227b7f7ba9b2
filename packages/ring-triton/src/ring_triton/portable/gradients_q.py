"""Gradient of queries, portable: one program owns a tile of queries and visits every segment that has some of them.

            keys of segment 3        segment 8
            ┌─────┬─────┬─────┐     ┌─────┬─────┐     p = exp(q k^T - lse)         (ROWS, KEYS)
  query ──▶ │whole│whole│mask░│ ──▶ │whole│mask░│     dq += p (dout v^T - delta) k
   tile     └─────┴─────┴─────┘     └─────┴─────┘
  (ROWS, D)   dq (ROWS, D) in registers

The backward's table is sorted by keys; the work list names, for tiles of the whole sequence's rows, the segments by
number (`ring_triton.portable.work.query_work`). A segment may begin or end inside the tile: its other rows then have
p = 0. It computes s and dp a second time, which costs 7 products instead of 5, and needs no atomics.
FRESH: dq holds nothing yet, and the work list has every tile. Otherwise dq is added to.
grid = (work list, query heads, batch entries).
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
    operand,
    power,
    product,
    tanh,
    walk,
)


@triton.jit
def _collect(
    dq, q, dout, scaled_lse, delta, k_base, v_base, k_stride, v_stride, i, inside, j, k_len, lower, upper,
    q_positions, k_position, step, slope, seed, keep_from, keep_scale, head, batch, score_scale, cap_scale,
    KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from key j of the segment."""
    columns = j + tl.arange(0, KEYS)
    there = columns < k_len
    dtype: tl.constexpr = k_base.dtype.element_ty
    k = operand(load_tile(k_base, j, k_stride, there, KEYS, D, WIDTH, LONG, MASKED), dtype, UPCAST)
    s = product(q, tl.trans(k), ACC, UPCAST, PRECISION)  # (ROWS, KEYS)
    if SOFTCAP:
        t = tanh(s * score_scale)
        s = t * cap_scale
    else:
        s = s * score_scale
    k_positions = (k_position + step * columns)[None, :]
    if ALIBI:
        s -= distance_penalty(slope, q_positions[:, None], k_positions, ACC)
    p = power(s - scaled_lse[:, None], UNIT)
    v = operand(load_tile(v_base, j, v_stride, there, KEYS, D, WIDTH, LONG, MASKED), dtype, UPCAST)
    dp = product(dout, tl.trans(v), ACC, UPCAST, PRECISION)
    if DROPOUT:
        dp = tl.where(kept(seed, keep_from, q_positions[:, None], k_positions, head, batch), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * (1.0 - t * t)
    if MASKED:
        far = columns[None, :] - i[:, None]
        ds = tl.where((far >= lower) & (far <= upper) & there[None, :] & inside[:, None], ds, 0.0)
    return accumulate(operand(ds, dtype, UPCAST), k, dq, ACC, UPCAST, PRECISION)


@triton.jit(do_not_specialize=["first_head", "keep_from", "length"])
def gradients_q_kernel(
    q, k, v, dout, dq, scaled_lse, delta, work, numbers, segments, slopes, seed,
    q_b, q_s, q_h, k_c, k_b, k_s, k_h, v_c, v_b, v_s, v_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h, slope_b,
    length, group, scale, score_scale, cap_scale, keep_from, keep_scale, first_head,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    FRESH: tl.constexpr,
):  # fmt: skip
    work += tl.program_id(0) * WORK_COLUMNS
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(work)  # of the tile, in the sequence
    n = tl.load(work + 1)
    end = tl.load(work + 2)
    entry = tl.load(work + 3)
    batch = tl.where(entry < 0, tl.program_id(2), entry).to(tl.int64)
    rows = start + tl.arange(0, ROWS)
    inside = rows < length
    dtype: tl.constexpr = q.dtype.element_ty
    q_tile = load_tile(q + batch * q_b + head * q_h, start, q_s, inside, ROWS, D, WIDTH, LONG, True)
    dout_tile = load_tile(dout + batch * dout_b + head * dout_h, start, dout_s, inside, ROWS, D, WIDTH, LONG, True)
    q_tile, dout_tile = operand(q_tile, dtype, UPCAST), operand(dout_tile, dtype, UPCAST)
    of_row = (batch * tl.num_programs(1) + head) * length + rows
    scaled_lse_tile = tl.load(scaled_lse + of_row, mask=inside, other=float("inf"))
    delta_tile = tl.load(delta + of_row, mask=inside, other=0.0)
    kv_head = head // group
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slope_b + head).to(ACC) * UNIT
    key = tl.zeros([], tl.int64)
    if DROPOUT:
        key = tl.load(seed)

    dq_sum = tl.zeros([ROWS, WIDTH], ACC)
    while n < end:
        row = segments + tl.load(numbers + n) * COLUMNS
        q_start = tl.load(row)
        q_len = tl.load(row + 1)
        piece = tl.load(row + 2).to(tl.int64)
        k_start = tl.load(row + 3).to(tl.int64)
        k_len = tl.load(row + 4)
        lower = tl.load(row + 5)
        upper = tl.load(row + 6)
        step = tl.load(row + 9)
        i = rows - q_start
        mine = (i >= 0) & (i < q_len)
        q_positions = tl.load(row + 7) + step * i
        k_position = tl.load(row + 8)
        k_base = k + piece * k_c + batch * k_b + kv_head * k_h + k_start * k_s
        v_base = v + piece * v_c + batch * v_b + kv_head * v_h + k_start * v_s
        first = tl.maximum(start - q_start, 0)
        last = tl.minimum(start - q_start + ROWS, q_len) - 1
        begin, before, whole, tiles = walk(first, last, k_len, lower, upper, KEYS)
        whole = tl.where(last - first == ROWS - 1, whole, 0)  # a segment that has some of the rows: all masked
        for m in tl.range(0, whole):
            dq_sum = _collect(
                dq_sum, q_tile, dout_tile, scaled_lse_tile, delta_tile, k_base, v_base, k_s, v_s, i, mine,
                begin + (before + m) * KEYS, k_len, lower, upper, q_positions, k_position, step, slope, key,
                keep_from, keep_scale, first_head + head, batch, score_scale, cap_scale,
                KEYS, D, WIDTH, LONG, ACC, UNIT, UPCAST, PRECISION, SOFTCAP, ALIBI, DROPOUT, False,
            )  # fmt: skip
        for m in tl.range(0, tiles - whole):
            j = begin + tl.where(m < before, m, m + whole) * KEYS
            dq_sum = _collect(
                dq_sum, q_tile, dout_tile, scaled_lse_tile, delta_tile, k_base, v_base, k_s, v_s, i, mine,
                j, k_len, lower, upper, q_positions, k_position, step, slope, key,
                keep_from, keep_scale, first_head + head, batch, score_scale, cap_scale,
                KEYS, D, WIDTH, LONG, ACC, UNIT, UPCAST, PRECISION, SOFTCAP, ALIBI, DROPOUT, True,
            )  # fmt: skip
        n += 1

    d = tl.arange(0, WIDTH)
    block = inside[:, None] & (d < D)[None, :]
    dq_at = dq + batch * dq_b + head * dq_h + rows.to(tl.int64)[:, None] * dq_s + d[None, :]
    if FRESH:
        tl.store(dq_at, dq_sum * scale, mask=block)
    else:
        tl.store(dq_at, tl.load(dq_at, mask=block, other=0.0) + dq_sum * scale, mask=block)
