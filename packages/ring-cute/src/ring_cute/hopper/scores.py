"""Scores that are more than products times a scale: softcap and ALiBi, in base 2, on registers.

A kernel whose kind asks for neither has nothing of this. A score is cap tanh(product scale / cap), where there is a
cap, less slope |distance|, where there are slopes.

Softcap: tanh(x) = 1 - 2 r(x), r(x) = 1 / (1 + exp(2 x)), of one exponential and one reciprocal: an absolute error of
some 2e-7, so that a cap of 50 costs a score 1e-5. `tanh.approx.f32` is a single instruction, but its relative error of
2^-11 would cost it 0.02. The derivative, 1 - tanh², is 4 r (1 - r).

ALiBi: the distance of a thread's first pair of a block comes from integers, that of its n-th pair by a multiply-add;
both are exact up to 2^24 tokens. Walks say how far a tile's first pair is apart, and how far neighbours are (a stripe's
are as many tokens as there are ranks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute

from ring_cute.hopper import ptx
from ring_cute.hopper.views import flat

HIDDEN = 1e15
"""An r for pairs that take no part: their score is so low that its exponential is 0, and the derivative is finite."""


@dataclass(frozen=True)
class Terms:
    """What shaped scores are made of beside products: a kernel's last numbers, in this order."""

    cap: Any  # softcap times log2(e), Float32
    slopes_b: Any  # stride of batch entries, Int64
    slopes: Any  # fp32, of heads; an address, Int64, until the kernel has it as memory


@dataclass(frozen=True)
class Place:
    """Of a walk's row in the forward, of a block in the backward, for ALiBi; None without."""

    slope: Any  # the head's, times -log2(e)
    distance: Any  # of the tile's first row and the segment's first key, Int32; None in the backward
    stride: Any  # of positions: Int32, in the backward Float32


def no_terms() -> tuple[Float32, Int64, Int64]:
    """Those of a kernel that is compiled."""
    return Float32(0.0), Int64(0), Int64(0)


@cute.jit
def slope_of(terms, batch, head):
    """The head's slope, times -log2(e)."""
    slopes = flat(terms.slopes, Float32)
    return slopes[Int64(batch) * terms.slopes_b + head] * -ptx.LOG2_E


@cute.jit
def below(s, scale):
    """r of each product: scale is 2 log2(e) times the softmax's over the softcap."""
    for e in cutlass.range_constexpr(0, cute.size(s), 4):
        for c in cutlass.range_constexpr(e, e + 4):
            s[c] = ptx.rcp(ptx.exp2(s[c] * scale) + Float32(1.0))


@cute.jit
def cap_scores(s, scale, cap):
    """Products become scores, cap tanh."""
    below(s, scale)
    for e in cutlass.range_constexpr(0, cute.size(s), 4):
        for c in cutlass.range_constexpr(e, e + 4):
            s[c] = ptx.fma(s[c], cap * -2.0, cap)


def apart(start: Any, step: Any, number: int) -> Any:
    """The distance of a thread's pair that many rows or keys from its first one."""
    return ptx.magnitude(ptx.fma(float(number), step, start))


@cute.jit
def add_slopes(s, scale, place, row, column, j):
    """Products times scale, less slope |distance|, of a block of the forward that begins at key j."""
    step = -Float32(place.stride)
    for half in cutlass.range_constexpr(2):
        start = Float32(place.distance + place.stride * (row + 8 * half - j - column))
        for e in cutlass.range_constexpr(0, cute.size(s), 4):
            for c in cutlass.range_constexpr(2):
                n = e + 2 * half + c
                s[n] = ptx.fma(s[n], scale, apart(start, step, 2 * e + c) * place.slope)


def starts(bound: Any, place: Place, row: Any, column: Any) -> list[Any]:
    """The distances of a thread's two keys and its first query, of a block of the backward; bound: of the block's first
    query and the tile's first key."""
    return [Float32(bound) + place.stride * Float32(column - row - 8 * half) for half in range(2)]


@cute.jit
def capped_probabilities(lse, s, p16, cap, place, bound, row, column):
    """From r of a block of the backward, hidden ones included: P, rounded, and in s P times the cap's derivative."""
    words = cute.recast_tensor(p16, Int32)
    start = starts(bound, place, row, column) if cutlass.const_expr(place is not None) else []
    for j in cutlass.range_constexpr(cute.size(s) // 4):
        for half in cutlass.range_constexpr(2):
            pair = []
            for c in cutlass.range_constexpr(2):
                e = 4 * j + 2 * half + c
                rest = cap - lse[2 * j + c]
                if cutlass.const_expr(place is not None):
                    rest = ptx.fma(apart(start[half], place.stride, 8 * j + c), place.slope, rest)
                p = ptx.exp2(ptx.fma(s[e], cap * -2.0, rest))
                s[e] = p * (s[e] * ptx.fma(s[e], -4.0, 4.0))
                pair.append(p)
            words[2 * j + half] = ptx.pack(*pair, p16.element_type)


@cute.jit
def sloped_probabilities(lse, s, scale, place, bound, row, column):
    """exp2(s scale - slope |distance| - lse) of a block of the backward."""
    start = starts(bound, place, row, column)
    for j in cutlass.range_constexpr(cute.size(s) // 4):
        for c in cutlass.range_constexpr(2):
            for half in cutlass.range_constexpr(2):
                e = 4 * j + 2 * half + c
                rest = ptx.fma(apart(start[half], place.stride, 8 * j + c), place.slope, -lse[2 * j + c])
                s[e] = ptx.exp2(ptx.fma(s[e], scale, rest))
