"""Gradients of keys and values, portable: one program owns a tile of keys of one key head.

          queries of segment 0    segment 1       for every query head of the group
          ┌─────┬─────┬─────┐    ┌─────┬─────┐
   key ──▶│░mask│whole│whole│──▶ │░mask│whole│    s^T = k q^T, p^T = exp(s^T - lse)      (KEYS, ROWS)
   tile   └─────┴─────┴─────┘    └─────┴─────┘    dv += p^T dout
  (KEYS, D)   dk, dv (KEYS, D) in registers       dk += p^T (v dout^T - delta) q

Scores are computed transposed, so that p and ds are the left sides of their products and never leave the registers.
The sum over a group's query heads is made here, and no other program writes these keys: there are no atomics, and the
result is the same bit for bit from run to run. dk and dv are added to what the buffers hold; where these have the
inputs' dtype and not that of sums, they are rounded and written.
grid = (work list, key heads, batch entries).
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
    rounded,
    tanh,
    walk,
)


@triton.jit
def _collect(
    dk, dv, k, v, q_base, dout_base, scaled_lse_base, delta_base, q_stride, dout_stride, i, j, q_len, lower, upper,
    q_position, k_positions, step, slope, seed, keep_from, keep_scale, head, batch, score_scale, cap_scale,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries, from query i of the segment."""
    rows = i + tl.arange(0, ROWS)
    there = rows < q_len
    dtype: tl.constexpr = q_base.dtype.element_ty
    q = operand(load_tile(q_base, i, q_stride, there, ROWS, D, WIDTH, LONG, MASKED), dtype, UPCAST)
    if MASKED:
        scaled_lse = tl.load(scaled_lse_base + rows, mask=there, other=float("inf"))
        delta = tl.load(delta_base + rows, mask=there, other=0.0)
    else:
        scaled_lse = tl.load(scaled_lse_base + rows)
        delta = tl.load(delta_base + rows)
    s = product(k, tl.trans(q), ACC, UPCAST, PRECISION)  # (KEYS, ROWS)
    if SOFTCAP:
        t = tanh(s * score_scale)
        s = t * cap_scale
    else:
        s = s * score_scale
    q_positions = (q_position + step * rows)[None, :]
    if ALIBI:
        s -= distance_penalty(slope, q_positions, k_positions[:, None], ACC)
    p = power(s - scaled_lse[None, :], UNIT)
    if MASKED:
        far = j[:, None] - rows[None, :]
        p = tl.where((far >= lower) & (far <= upper), p, 0.0)
    dout = operand(load_tile(dout_base, i, dout_stride, there, ROWS, D, WIDTH, LONG, MASKED), dtype, UPCAST)
    dp = product(v, tl.trans(dout), ACC, UPCAST, PRECISION)  # (KEYS, ROWS)
    if DROPOUT:
        keep = kept(seed, keep_from, q_positions, k_positions[:, None], head, batch)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dropped = p
    dv = accumulate(operand(dropped, dtype, UPCAST), dout, dv, ACC, UPCAST, PRECISION)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * (1.0 - t * t)
    dk = accumulate(operand(ds, dtype, UPCAST), q, dk, ACC, UPCAST, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["first_head", "keep_from", "length", "num_heads"])
def gradients_kv_kernel(
    q, k, v, dout, dk, dv, scaled_lse, delta, work, segments, slopes, seed,
    q_b, q_s, q_h, k_c, k_b, k_s, k_h, v_c, v_b, v_s, v_h, dout_b, dout_s, dout_h,
    dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h, slope_b,
    length, num_heads, group, scale, score_scale, cap_scale, keep_from, keep_scale, first_head,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    work += tl.program_id(0) * WORK_COLUMNS
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(work)  # of the tile, in its strip
    number = tl.load(work + 1)
    end = tl.load(work + 2)
    entry = tl.load(work + 3)
    batch = tl.where(entry < 0, tl.program_id(2), entry).to(tl.int64)
    row = segments + number * COLUMNS
    piece = tl.load(row + 2).to(tl.int64)
    k_start = tl.load(row + 3)
    k_len = tl.load(row + 4)

    j = start + tl.arange(0, KEYS)  # counted from the strip's first key
    there = j < k_len
    last = tl.minimum(start + KEYS, k_len) - 1
    dtype: tl.constexpr = q.dtype.element_ty
    first_key = k_start + start
    k_base = k + piece * k_c + batch * k_b + kv_head * k_h
    v_base = v + piece * v_c + batch * v_b + kv_head * v_h
    k_tile = operand(load_tile(k_base, first_key, k_s, there, KEYS, D, WIDTH, LONG, True), dtype, UPCAST)
    v_tile = operand(load_tile(v_base, first_key, v_s, there, KEYS, D, WIDTH, LONG, True), dtype, UPCAST)
    key = tl.zeros([], tl.int64)
    if DROPOUT:
        key = tl.load(seed)

    dk_sum = tl.zeros([KEYS, WIDTH], ACC)
    dv_sum = tl.zeros([KEYS, WIDTH], ACC)
    while number < end:
        row = segments + number * COLUMNS
        q_start = tl.load(row).to(tl.int64)
        q_len = tl.load(row + 1)
        lower = tl.load(row + 5)
        upper = tl.load(row + 6)
        q_position = tl.load(row + 7)
        step = tl.load(row + 9)
        k_positions = tl.load(row + 8) + step * j
        begin, before, whole, tiles = walk(start, last, q_len, -upper, -lower, ROWS)
        for member in tl.range(0, group):
            head = kv_head * group + member
            q_base = q + batch * q_b + head * q_h + q_start * q_s
            dout_base = dout + batch * dout_b + head * dout_h + q_start * dout_s
            of_row = (batch * num_heads + head) * length + q_start
            slope = 0.0
            if ALIBI:
                slope = tl.load(slopes + batch * slope_b + head).to(ACC) * UNIT
            for n in tl.range(0, whole):
                dk_sum, dv_sum = _collect(
                    dk_sum, dv_sum, k_tile, v_tile, q_base, dout_base, scaled_lse + of_row, delta + of_row, q_s, dout_s,
                    begin + (before + n) * ROWS, j, q_len, lower, upper, q_position, k_positions, step, slope, key,
                    keep_from, keep_scale, first_head + head, batch, score_scale, cap_scale,
                    ROWS, D, WIDTH, LONG, ACC, UNIT, UPCAST, PRECISION, SOFTCAP, ALIBI, DROPOUT, False,
                )  # fmt: skip
            for n in tl.range(0, tiles - whole):
                i = begin + tl.where(n < before, n, n + whole) * ROWS
                dk_sum, dv_sum = _collect(
                    dk_sum, dv_sum, k_tile, v_tile, q_base, dout_base, scaled_lse + of_row, delta + of_row, q_s, dout_s,
                    i, j, q_len, lower, upper, q_position, k_positions, step, slope, key,
                    keep_from, keep_scale, first_head + head, batch, score_scale, cap_scale,
                    ROWS, D, WIDTH, LONG, ACC, UNIT, UPCAST, PRECISION, SOFTCAP, ALIBI, DROPOUT, True,
                )  # fmt: skip
        number += 1

    final: tl.constexpr = dk.dtype.element_ty
    d = tl.arange(0, WIDTH)
    block = there[:, None] & (d < D)[None, :]
    tokens = (k_start + j).to(tl.int64)[:, None]
    dk_at = dk + piece * dk_c + batch * dk_b + kv_head * dk_h + tokens * dk_s + d[None, :]
    if final == ACC:
        tl.store(dk_at, tl.load(dk_at, mask=block, other=0.0) + dk_sum * scale, mask=block)
    else:
        tl.store(dk_at, rounded(dk_sum * scale, final, UPCAST), mask=block)
    dv_at = dv + piece * dv_c + batch * dv_b + kv_head * dv_h + tokens * dv_s + d[None, :]
    if final == ACC:
        tl.store(dv_at, tl.load(dv_at, mask=block, other=0.0) + dv_sum, mask=block)
    else:
        tl.store(dv_at, rounded(dv_sum, final, UPCAST), mask=block)
