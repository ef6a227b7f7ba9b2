"""Before the backward, portable: one program takes a tile of rows of one head.

  out, dout (ROWS, D) ──▶ delta = rowsum(dout * out) - dlse
  lse       (ROWS,)   ──▶ scaled_lse = lse * UNIT, +inf where a row has seen nothing: its probabilities are then 0

Both (B, Hq, Sq), dense, as the other kernels read them. grid = (row tiles, query heads, batch entries).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ring_triton.portable.common import load_tile


@triton.jit(do_not_specialize=["length"])
def prepare_kernel(
    out, dout, lse, dlse, delta, scaled_lse,
    out_b, out_s, out_h, dout_b, dout_s, dout_h, lse_b, lse_h, dlse_b, dlse_h, dlse_s, length,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr,
    ACC: tl.constexpr, UNIT: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = start + tl.arange(0, ROWS)
    there = rows < length
    a = load_tile(out + batch * out_b + head * out_h, start, out_s, there, ROWS, D, WIDTH, LONG, True)
    b = load_tile(dout + batch * dout_b + head * dout_h, start, dout_s, there, ROWS, D, WIDTH, LONG, True)
    total = tl.sum(a.to(ACC) * b.to(ACC), 1)
    if DLSE:
        dlse_at = dlse + batch * dlse_b + head * dlse_h + rows.to(tl.int64) * dlse_s
        total -= tl.load(dlse_at, mask=there, other=0.0).to(ACC)
    at = (batch * tl.num_programs(1) + head) * length + rows
    tl.store(delta + at, total, mask=there)
    row_lse = tl.load(lse + batch * lse_b + head * lse_h + rows, mask=there, other=0.0)
    tl.store(scaled_lse + at, tl.where(row_lse == float("-inf"), float("inf"), row_lse * UNIT), mask=there)
