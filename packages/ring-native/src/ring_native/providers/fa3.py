"""FlashAttention-3 (hopper/ of the flash-attention repository). All of its names that we use stand here."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ring_core.backend import Capabilities, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers.base import EIGHTS, HALF, Gradients, compute_capability, imported, library, unavailable

MODULE = "flash_attn_interface"
INSTALL = "it is built from hopper/ of github.com/Dao-AILab/flash-attention"
TAKEN = {"window_size_left", "window_size_right", "dq", "dk", "dv", "max_seqlen_q", "is_causal"}
"""Arguments of its backward; earlier versions had others."""


class FlashAttention3:
    """`flash_attn_interface._flash_attn_forward` and `_backward`."""

    name = "fa3"
    style = Style.BOTTOM_RIGHT
    varlen = True
    beside = False

    def capabilities(self, device: torch.device) -> Capabilities:
        if compute_capability(device) != (9, 0):
            return unavailable(self.name, f"it needs a CUDA device of compute capability 9.0, not {device}")
        module = imported(MODULE)
        if isinstance(module, str):
            return unavailable(self.name, f"{module}. {INSTALL}")
        backward = getattr(module, "_flash_attn_backward", None)
        backward = getattr(backward, "_init_fn", backward)  # under a custom operator
        if backward is None or not set(inspect.signature(backward).parameters) >= TAKEN:
            return unavailable(self.name, f"{MODULE} is of a version whose backward takes other arguments. {INSTALL}")
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=HALF,
            head_dims=EIGHTS,
            features=frozenset({"deterministic", "gqa", "packed", "softcap", "window"}),
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
        # As a custom operator it must not return what it was given, so it is not given `out`.
        found, found_lse, *_ = library(MODULE, INSTALL)._flash_attn_forward(
            q,
            k,
            v,
            **_lengths(q, sequences),
            softmax_scale=params.scale,
            causal=mask.causal,
            window_size_left=mask.left,
            window_size_right=mask.right,
            softcap=params.softcap,
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
        dq = torch.empty_like(q) if dq is None else dq
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)) if dkv is None else dkv
        library(MODULE, INSTALL)._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            **_lengths(q, sequences),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=params.scale,
            is_causal=mask.causal,
            window_size_left=mask.left,
            window_size_right=mask.right,
            softcap=params.softcap,
            deterministic=params.deterministic,
        )
        return dq, dk, dv


def _lengths(q: Tensor, sequences: Sequences | None) -> dict[str, Tensor | int]:
    if sequences is None:
        return {}
    cu_q, cu_k = sequences.on(q.device)
    longest = {"max_seqlen_q": sequences.max_q, "max_seqlen_k": sequences.max_k}
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **longest}
