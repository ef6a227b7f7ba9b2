"""Attention to one key, which cuDNN's kernels do not take: out = v, lse = the score."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.backend import accumulation_dtype


def single_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, D), lse (B, Hq, Sq) for k, v (B, 1, Hkv, D)."""
    group = q.shape[2] // k.shape[2]
    return v.repeat_interleave(group, dim=2).expand(q.shape), _scores(q, k, scale)


def single_key_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from out (B, Sq, Hq, D) and lse (B, Hq, Sq) of whole rows."""
    sums = accumulation_dtype(q.dtype)
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    wide_q, wide_dout, wide_k, wide_v = (x.to(sums) for x in (q, dout, k, v))
    wide_k, wide_v = (x.repeat_interleave(group, dim=2) for x in (wide_k, wide_v))  # (B, 1, Hq, D)
    p = torch.exp(_scores(q, k, scale) - lse).transpose(1, 2)[..., None]  # (B, Sq, Hq, 1)
    dv = (p * wide_dout).sum(dim=1, keepdim=True)
    ds = scale * p * (wide_dout * (wide_v - out.to(sums))).sum(dim=-1, keepdim=True)
    dk = (ds * wide_q).sum(dim=1, keepdim=True)
    dk, dv = (x.unflatten(2, (heads, group)).sum(dim=3) for x in (dk, dv))
    return (ds * wide_k).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, Hq, Sq)"""
    sums = accumulation_dtype(q.dtype)
    keys = k.to(sums).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return scale * (q.to(sums) * keys).sum(dim=-1).transpose(1, 2)
