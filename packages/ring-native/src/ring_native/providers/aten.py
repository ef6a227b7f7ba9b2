"""The flash-attn 2 inside torch, which `scaled_dot_product_attention` runs on CUDA. Private names of torch stand here
and in `cudnn`, `cpu`.

It allocates what it returns, makes out and dout contiguous for itself, and has no softcap. It is deterministic only
where `torch.use_deterministic_algorithms(True)` says so for the whole process, which is not ours to say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.backend import Capabilities, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers.base import EIGHTS, HALF, Gradients, compute_capability, unavailable


class Aten:
    """`aten::_flash_attention_forward` and `_backward`."""

    name = "aten"
    style = Style.BOTTOM_RIGHT
    varlen = True
    beside = False

    def capabilities(self, device: torch.device) -> Capabilities:
        capability = compute_capability(device)
        if capability is None or capability < (8, 0):
            return unavailable(self.name, f"it needs a CUDA device of compute capability 8.0 or newer, not {device}")
        if not torch.backends.cuda.is_flash_attention_available():
            return unavailable(self.name, "this torch was built without flash attention")
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=HALF,
            head_dims=EIGHTS,
            features=frozenset({"gqa", "packed", "window"}),
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
        found, found_lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(q, k, sequences, shortest=2), 0.0, mask.causal, False, **_band(mask, params)
        )
        return found, found_lse

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
        # The random state is that of a dropout that there is not: tensors of the right kind that nobody reads.
        state = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *_lengths(q, k, sequences), 0.0, mask.causal, *state, **_band(mask, params)
        )
        return dq, dk, dv


def _lengths(
    q: Tensor, k: Tensor, sequences: Sequences | None, shortest: int = 1
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cum_seq_q, cum_seq_k, max_q, max_k. With max_q = 1 the forward takes another path, of another layout."""
    if sequences is None:
        return None, None, q.shape[1], k.shape[1]
    return *sequences.on(q.device), max(sequences.max_q, shortest), sequences.max_k


def _band(mask: Mask, params: Params) -> dict[str, float | int | None]:
    left, right = (None if bound < 0 else bound for bound in mask)
    return {"scale": params.scale, "window_size_left": left, "window_size_right": right}
