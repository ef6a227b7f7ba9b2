"""Keys and values side by side, (2, heads, D) a token: how they travel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ring_core.merge import triton_is_importable

Places = tuple[tuple[int, int, int], ...]
"""(first token, first token in the target, length) of each stretch."""


def side_by_side(k: Tensor, v: Tensor, target: Tensor, places: Places) -> None:
    """Copies stretches of k, v (B, S, h, D) to their places in target (B, T, 2, h, D)."""
    if not places:
        return
    heads, head_dim = k.shape[2:]
    token = (2 * heads * head_dim, heads * head_dim, head_dim, 1)  # strides of a dense one
    dense = k.stride()[2:] == v.stride()[2:] == token[2:] and target.stride()[1:] == token
    if k.is_cuda and dense and triton_is_importable():
        from ring_core.comm.pack_triton import pack

        pack(k, v, target, *_on_device(places, k.device))
        return
    for start, at, length in places:
        for side, x in enumerate((k, v)):
            target[:, at : at + length, side].copy_(x[:, start : start + length])


@lru_cache(maxsize=1024)
def _on_device(places: Places, device: torch.device) -> tuple[Tensor, int]:
    """The places as int32 (N, 3), and the longest length."""
    return torch.tensor(places, dtype=torch.int32, device=device), max(length for _, _, length in places)
