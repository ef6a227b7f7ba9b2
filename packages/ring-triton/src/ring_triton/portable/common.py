"""What the portable kernels share: the bounds of a tile's walk, loads, scores, and dropout.

Scores and lse are in units of 1 / UNIT. For 16-bit inputs UNIT = log2(e), base 2: softmax is then exp2 of what a
product and one multiplication give. For fp32 UNIT = 1: a constant that has to be rounded, times a large score, would be
most of the error. lse = +inf marks rows that have seen nothing (or lie outside): their probabilities are exp(s - inf) =
0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Columns of a segment table, as in `ring_core.segment.Segment`, and of a work list, as in `ring_triton.portable.work`.
COLUMNS = tl.constexpr(12)
WORK_COLUMNS = tl.constexpr(4)


@triton.jit
def walk(first, last, length, lower, upper, BLOCK: tl.constexpr):
    """Which tiles of the other side own elements first..last see, for `lower <= other - own <= upper`, other <
    length.

    Returns (begin, before, whole, total): tiles of BLOCK from element `begin`; the first `before` of them and those
    from before + whole to total need the mask, the `whole` between do not.
    """
    begin = tl.maximum(first + lower, 0)
    stop = tl.maximum(tl.minimum(last + upper + 1, length), begin)
    whole_begin = tl.maximum(last + lower, 0)
    whole_stop = tl.minimum(first + upper + 1, length)
    total = (stop - begin + BLOCK - 1) // BLOCK
    before = tl.minimum((tl.maximum(whole_begin - begin, 0) + BLOCK - 1) // BLOCK, total)
    whole = tl.maximum(whole_stop - begin - before * BLOCK, 0) // BLOCK
    return begin, before, whole, total


@triton.jit
def load_tile(
    base, start, stride, there,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LONG: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows start.. of (S, D) at `base`: (ROWS, WIDTH), zeros beyond D and, with CHECK, where not `there` (ROWS,). LONG:
    offsets inside a tile need 64 bits, which cost registers."""
    d = tl.arange(0, WIDTH)
    rows = tl.arange(0, ROWS)
    if LONG:
        rows = rows.to(tl.int64)
    at = base + start.to(tl.int64) * stride + (rows[:, None] * stride + d[None, :])
    if CHECK:
        tile = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)
    elif D < WIDTH:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """x to nearest in dtype. The interpreter cuts off what bf16 has no room for (UPCAST: it runs): there
    the number is rounded first."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        half = tl.full([], 0x7FFF, tl.uint32) + ((bits >> 16) & 1)
        x = ((bits + half) & tl.full([], 0xFFFF0000, tl.uint32)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def operand(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """x as one side of a product, rounded to the inputs' dtype."""
    x = rounded(x, dtype, UPCAST)
    if UPCAST:
        x = x.to(tl.float64)
    return x


@triton.jit
def product(a, b, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a b, of operands. The interpreter (UPCAST) multiplies the bits of bf16 as integers, and sums fp32 in an order
    that depends on the shape, so that forward and backward disagree about a score: there it is fp64, then rounded."""
    if UPCAST:
        c = tl.dot(a, b, out_dtype=tl.float64).to(ACC)
    else:
        c = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return c


@triton.jit
def accumulate(a, b, c, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a b + c; see `product`."""
    if UPCAST:
        c += tl.dot(a, b, out_dtype=tl.float64).to(ACC)
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION, out_dtype=ACC)
    return c


@triton.jit
def power(x, UNIT: tl.constexpr):
    """exp of x / UNIT, where scores and lse are kept in units of 1 / UNIT."""
    if UNIT == 1.0:
        y = tl.exp(x)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def logarithm(x, UNIT: tl.constexpr):
    """The inverse of `power`."""
    if UNIT == 1.0:
        y = tl.log(x)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def tanh(x):
    """By exp2, which every target and the interpreter have; absolute error of a rounding."""
    e = tl.exp2(tl.abs(x) * -2.0 * LOG2E)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def distance_penalty(slope, q_positions, k_positions, ACC: tl.constexpr):
    """ALiBi, of the shape that the positions broadcast to."""
    return slope * tl.abs(q_positions - k_positions).to(ACC)


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    return tl.umulhi(b, c2) ^ c1 ^ k0, b * c2, tl.umulhi(a, c0) ^ c3 ^ k1, a * c0


@triton.jit
def kept(seed, keep_from, q_positions, k_positions, head, batch):
    """Which elements dropout keeps, of the shape that the positions broadcast to: word 0 of Philox4x32-10, as in
    `ring_core.philox`. Words keep the shape that they depend on: the first rounds are of rows, columns and scalars."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0, c1 = k_positions.to(tl.uint32), q_positions.to(tl.uint32)
    c2, c3 = head.to(tl.uint32), batch.to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0 >= keep_from.to(tl.uint32)
