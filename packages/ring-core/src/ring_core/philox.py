"""Which elements dropout keeps: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

key = seed (low word, high word); counter = (key position, query position, head, batch), each as uint32; the element is
kept iff word 0 of the output >= floor(p * 2**32). Positions are global, so the mask does not depend on how a sequence
is dealt out, and any backend can draw any part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def keep_mask(
    probability: float, seed: Tensor, heads: Tensor, batch: Tensor, q_positions: Tensor, k_positions: Tensor
) -> Tensor:
    """bool, of the shape that int64 `heads`, `batch`, `q_positions` and `k_positions` broadcast to; seed int64 (1,)."""
    counter = tuple(x & _WORD for x in (k_positions, q_positions, heads, batch))
    return philox(counter, (seed & _WORD, (seed >> 32) & _WORD))[0] >= int(probability * 2**32)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of output for four words of counter, all in int64 tensors that hold uint32 values."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product: in two halves, as int64 has no room for the sign-free 64 bits."""
    by_low, by_high = a * (b & 0xFFFF), a * (b >> 16)
    middle = by_high + (by_low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)
