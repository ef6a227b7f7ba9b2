"""Gradient of the sinks, portable: one program a head walks all of its rows, in a fixed order.

dsinks[h] = - sum over rows of exp(sink - lse) * delta      rows that have seen nothing have lse = +inf: no share
"""

from __future__ import annotations

import triton
import triton.language as tl

from ring_triton.portable.common import power


@triton.jit(do_not_specialize=["length", "num_batches"])
def gradient_sinks_kernel(
    dsinks, sinks, scaled_lse, delta, length, num_batches, BLOCK: tl.constexpr, ACC: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    sink = tl.load(sinks + head).to(ACC) * UNIT
    total = tl.zeros([BLOCK], ACC)
    for batch in tl.range(0, num_batches):
        at = (batch * tl.num_programs(0) + head).to(tl.int64) * length
        for start in tl.range(0, length, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            there = rows < length
            row_lse = tl.load(scaled_lse + at + rows, mask=there, other=float("inf"))
            row_delta = tl.load(delta + at + rows, mask=there & (row_lse < float("inf")), other=0.0)
            total += power(sink - row_lse, UNIT) * row_delta
    tl.store(dsinks + head, (-tl.sum(total, 0)).to(dsinks.dtype.element_ty))
