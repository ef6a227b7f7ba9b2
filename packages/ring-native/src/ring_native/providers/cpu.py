"""torch's CPU flash kernel: what `torch.nn.functional.scaled_dot_product_attention` runs on CPU tensors.

It aligns causal masks top-left, says lse = 0 for rows that see nothing, returns a non-contiguous lse and dies of empty
queries; the last three never get here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.backend import Capabilities, HeadDims, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers.base import HALF, Gradients, unavailable


class Cpu:
    """`aten::_scaled_dot_product_flash_attention_for_cpu` and its backward."""

    name = "cpu"
    style = Style.ANY
    varlen = False
    beside = False

    def capabilities(self, device: torch.device) -> Capabilities:
        if device.type != "cpu":
            return unavailable(self.name, f"it is for CPU tensors, not {device.type}")
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=HALF | {torch.float32, torch.float64},
            head_dims=HeadDims(largest=1 << 16),
            features=frozenset({"deterministic", "gqa", "packed", "window"}),
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> tuple[Tensor, Tensor]:
        causal, bias = _mask(q, k, mask)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found, found_lse = op(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, attn_mask=bias, scale=params.scale)
        return found.transpose(1, 2), found_lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor | None,
        dkv: tuple[Tensor, Tensor] | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> Gradients:
        causal, bias = _mask(q, k, mask)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))  # (B, H, S, D)
        dq, dk, dv = op(dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=params.scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _mask(q: Tensor, k: Tensor, mask: Mask) -> tuple[bool, Tensor | None]:
    """is_causal (which it aligns top-left) and attn_mask (Sq, Sk)."""
    q_len, k_len = q.shape[1], k.shape[1]
    distance = k_len - q_len
    if mask.full:
        return False, None
    if mask.left < 0 and mask.right + distance == 0:
        return True, None
    rows, keys = (torch.arange(length, device=q.device) for length in (q_len, k_len))
    offset = keys - rows[:, None] - distance
    hidden = torch.zeros(q_len, k_len, dtype=torch.bool, device=q.device)
    if mask.left >= 0:
        hidden |= offset < -mask.left
    if mask.right >= 0:
        hidden |= offset > mask.right
    return False, torch.zeros(q_len, k_len, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
