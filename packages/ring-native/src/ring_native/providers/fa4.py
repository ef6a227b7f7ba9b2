"""FlashAttention-4 (the package flash-attn-4, in CuTe DSL). All of its names that we use stand here.

Its public functions compute a whole row's softmax; those beneath take the out and lse of the whole row, and write where
they are told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Capabilities, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers.base import (
    HALF,
    THIRTY_SECONDS,
    Gradients,
    compute_capability,
    imported,
    library,
    unavailable,
)

MODULE = "flash_attn.cute.interface"
INSTALL = "pip install 'ring-native[fa4]'"


class FlashAttention4:
    """`flash_attn.cute.interface._flash_attn_fwd` and `_bwd`."""

    name = "fa4"
    style = Style.BOTTOM_RIGHT
    varlen = True
    beside = False

    def capabilities(self, device: torch.device) -> Capabilities:
        # Newer architectures have kernels too, with limits of their own that nobody has tested here.
        if compute_capability(device) != (9, 0):
            return unavailable(self.name, f"it needs a CUDA device of compute capability 9.0, not {device}")
        module = imported(MODULE)
        if isinstance(module, str):
            return unavailable(self.name, f"{module}. {INSTALL}")
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=HALF,
            head_dims=THIRTY_SECONDS,  # of 16 and 40 its dq is wrong (4.0.0b36, on an H200)
            features=frozenset({"deterministic", "gqa", "lse_grad", "packed", "softcap", "window"}),
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
        found, found_lse, *_ = library(MODULE, INSTALL)._flash_attn_fwd(
            q, k, v, out=out, lse=lse, return_lse=True, softcap=params.softcap, **_options(q, mask, sequences, params)
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
        into = (None, None) if dkv is None else dkv
        dq, dk, dv = library(MODULE, INSTALL)._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softcap=params.softcap,
            deterministic=params.deterministic,
            dq=dq,
            dk=into[0],
            dv=into[1],
            dlse=dlse,
            **_options(q, mask, sequences, params),
        )
        return dq, dk, dv


def _options(q: Tensor, mask: Mask, sequences: Sequences | None, params: Params) -> dict[str, Any]:
    left, right = (None if bound < 0 else bound for bound in mask)
    options: dict[str, Any] = {
        "softmax_scale": params.scale,
        "causal": mask.causal,
        "window_size_left": left,
        "window_size_right": right,
    }
    if sequences is not None:
        cu_q, cu_k = sequences.on(q.device)
        options |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        options |= {"max_seqlen_q": sequences.max_q, "max_seqlen_k": sequences.max_k}
    return options
