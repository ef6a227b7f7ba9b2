"""Scores that are more than products times a scale: softcap, in base 2, on registers.

A kernel whose kind does not ask for it has nothing of this. Where it does, tanh(x) = 1 - 2 r(x), r(x) = 1 / (1 +
exp(2 x)), of one exponential and one reciprocal: an absolute error of some 2e-7, so that a cap of 50 costs a score
1e-5. `tanh.approx.f32` is a single instruction, but its relative error of 2^-11 would cost it 0.02. The derivative, 1 -
tanh², is 4 r (1 - r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_producer import EDGE, FIRST_OFFSET, LAST_OFFSET

HIDDEN = 1e15
"""An r for pairs that take no part: their score is so low that its exponential is 0, and the derivative is finite."""


@dataclass(frozen=True)
class Terms:
    """What shaped scores are made of beside products."""

    cap: Any  # softcap times log2(e); None without softcap


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


@cute.jit
def hide(shared, s, stage, row, column, count):
    """HIDDEN where a pair of a block of the backward takes no part."""
    if shared.bounds[EDGE, stage] != 0:
        for half in cutlass.range_constexpr(2):
            own = row + 8 * half
            first = own - shared.bounds[FIRST_OFFSET, stage] - column
            last = own - shared.bounds[LAST_OFFSET, stage] - column
            if own >= count:
                last = Int32(-8)
            for j in cutlass.range_constexpr(cute.size(s) // 4):
                for c in cutlass.range_constexpr(2):
                    here, e = 8 * j + c, 4 * j + 2 * half + c
                    s[e] = cutlass.select_((first <= here) & (last >= here), s[e], Float32(HIDDEN))


@cute.jit
def capped_probabilities(shared, s, p16, stage, cap, column):
    """From r of a block of the backward, hidden ones included: P, rounded, and in s P times the cap's derivative."""
    words = cute.recast_tensor(p16, Int32)
    for j in cutlass.range_constexpr(cute.size(s) // 4):
        lse = [shared.lse[8 * j + column + c, stage] for c in range(2)]
        for half in cutlass.range_constexpr(2):
            pair = []
            for c in cutlass.range_constexpr(2):
                e = 4 * j + 2 * half + c
                p = ptx.exp2(ptx.fma(s[e], cap * -2.0, cap - lse[c]))
                s[e] = p * (s[e] * ptx.fma(s[e], -4.0, 4.0))
                pair.append(p)
            words[2 * j + half] = ptx.pack(*pair, p16.element_type)
