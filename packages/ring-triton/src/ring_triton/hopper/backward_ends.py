"""Before and after the Hopper backward: what a row needs to know of itself, and dq in its own dtype.

  out, dout (ROWS, D) ──▶ delta = rowsum(dout * out) - dlse      0 where that is no number; four copies
  lse       (ROWS,)   ──▶ scaled_lse = lse * log2(e)             +inf where a row has seen nothing: P is then 0; four
                          sums (ROWS, D) fp32 = 0                while the loads above are on their way
  sums (ROWS, D) fp32 ──▶ dq = sums * scale

A block of the backward may begin in a segment and reach beyond its end, into rows that may hold anything; there P = 0,
and 0 x delta has to be 0 (dP of a real row tells of what was no number, whatever delta says).

Copy c lacks its first c rows: row r is at c pitch + r - c, so that a block beginning at row r lies 16-byte aligned, as
TMA asks, in copy r % 4. Between one copy's end and the next one's begin are zeros.
grid = (row tiles, query heads, batch entries).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_copies(copies, row, x, mask, count, pitch, ends, ROWS: tl.constexpr):
    """x (ROWS,) to its place in each copy; the program with `ends` also fills what is behind their last rows."""
    for c in tl.static_range(4):
        tl.store(copies + c * pitch + row - c, x, mask=mask & (row >= c))
        if ends:
            behind = count - c + tl.arange(0, ROWS)
            tl.store(copies + c * pitch + behind, tl.zeros([ROWS], tl.float32), mask=behind < pitch)


@triton.jit(do_not_specialize=["length", "count", "pitch"])
def prepare_kernel(
    out, dout, lse, dlse, delta, scaled_lse, sums,
    out_b, out_s, out_h, dout_b, dout_s, dout_h, lse_b, lse_h, dlse_b, dlse_h, dlse_s, length,
    count, pitch,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DLSE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    there = rows < length
    mask = there[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None]
    a = tl.load(out + batch * out_b + head * out_h + at * out_s + columns[None, :], mask=mask, other=0.0)
    b = tl.load(dout + batch * dout_b + head * dout_h + at * dout_s + columns[None, :], mask=mask, other=0.0)
    row = (batch * tl.num_programs(1) + head) * length + rows
    if SUMS:
        tl.store(sums + row[:, None] * D + columns[None, :], tl.zeros([ROWS, WIDTH], tl.float32), mask=mask)
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if DLSE:
        dlse_at = dlse + batch * dlse_b + head * dlse_h + rows.to(tl.int64) * dlse_s
        total -= tl.load(dlse_at, mask=there, other=0.0).to(tl.float32)
    ends = (tl.program_id(0) + tl.program_id(1) + tl.program_id(2)) == 0
    total = tl.where(tl.abs(total) < float("inf"), total, 0.0)
    _store_copies(delta, row, total, there, count, pitch, ends, ROWS)
    row_lse = tl.load(lse + batch * lse_b + head * lse_h + rows, mask=there, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * 1.4426950408889634)
    _store_copies(scaled_lse, row, row_lse, there, count, pitch, ends, ROWS)


@triton.jit(do_not_specialize=["length"])
def finish_kernel(
    sums, dq, scale, dq_b, dq_s, dq_h, length, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = (rows < length)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None]
    row = (batch * tl.num_programs(1) + head) * length + at
    x = tl.load(sums + row * D + columns[None, :], mask=mask, other=0.0) * scale
    tl.store(dq + batch * dq_b + head * dq_h + at * dq_s + columns[None, :], x.to(dq.dtype.element_ty), mask=mask)
