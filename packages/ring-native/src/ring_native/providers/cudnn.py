"""cuDNN's attention, as torch calls it. It aligns causal masks top-left and is given squares alone, where that is the
same; there is no window and nothing for packed sequences: each is a call.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ring_core.backend import Capabilities, HeadDims, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers.base import HALF, Gradients, compute_capability, unavailable
from ring_native.providers.single_key import single_key, single_key_backward


class Cudnn:
    """`aten::_scaled_dot_product_cudnn_attention` and its backward."""

    name = "cudnn"
    style = Style.SQUARES
    varlen = False
    beside = False

    def capabilities(self, device: torch.device) -> Capabilities:
        capability = compute_capability(device)
        if capability is None or capability < (8, 0):
            return unavailable(self.name, f"it needs a CUDA device of compute capability 8.0 or newer, not {device}")
        if not torch.backends.cudnn.is_available():
            return unavailable(self.name, "this torch was built without cuDNN")
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=HALF,
            head_dims=HeadDims(8, 128, 8),
            features=frozenset({"gqa", "packed"}),
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
        if k.shape[1] == 1:
            return single_key(q, k, v, params.scale)
        found, found_lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), None, True, 0.0, mask.causal, False, scale=params.scale
        )
        return found.transpose(1, 2), found_lse.reshape(q.shape[0], q.shape[2], q.shape[1])

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
        if k.shape[1] == 1:
            return single_key_backward(q, k, v, out, dout, lse, params.scale)
        if _lse_dimensions(q.device) == 4:
            lse = lse[..., None]
        # The random state of a dropout that there is not.
        state = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = (None, None, q.shape[1], k.shape[1])
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))  # (B, H, S, D)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, state, state, None, *lengths, 0.0, mask.causal, scale=params.scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@cache
def _lse_dimensions(device: torch.device) -> int:
    """3 or 4, by torch's version: what forward returns is what backward wants."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, False, False)
    dimensions: int = found[1].dim()
    return dimensions
