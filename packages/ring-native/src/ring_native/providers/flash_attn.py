"""flash-attn 2 (https://github.com/Dao-AILab/flash-attention). All of its names that we use stand here.

Its public functions compute a whole row's softmax: forward could do with them, but backward must be given the lse and
out of the whole row, of which the keys of one call are a part, and only the functions beneath take those. Beneath, a
forward also writes where it is told.

ALiBi: to a score it adds -slope * |i + Sk - Sq - j|, in backward too, but under a causal mask slope * j (csrc/
flash_attn/src/mask.h and alibi.h), which is the same but for what a row has in common; that is then missing in lse,
and grows with the length until fp32 has no digits left for the score. So causal calls with slopes are made as windows
that reach every key to the left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Capabilities, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers.base import EIGHTS, HALF, Gradients, compute_capability, imported, library, unavailable

MODULE = "flash_attn.flash_attn_interface"
INSTALL = "pip install 'ring-native[flash-attn]' --no-build-isolation compiles it, or install a wheel for your torch"


class FlashAttention2:
    """`flash_attn_2_cuda`, as flash-attn 2.8 calls it."""

    name = "flash-attn"
    style = Style.BOTTOM_RIGHT
    varlen = True
    beside = True

    def capabilities(self, device: torch.device) -> Capabilities:
        capability = compute_capability(device)
        if capability is None or capability < (8, 0):
            return unavailable(self.name, f"it needs a CUDA device of compute capability 8.0 or newer, not {device}")
        module = imported(MODULE)
        if isinstance(module, str):
            return unavailable(self.name, f"{module}. {INSTALL}")
        if not hasattr(module, "flash_attn_gpu"):
            return unavailable(self.name, f"{MODULE} is not that of flash-attn 2.8 (no flash_attn_gpu). {INSTALL}")
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=HALF,
            head_dims=EIGHTS,
            features=frozenset({"alibi", "deterministic", "gqa", "packed", "softcap", "window"}),
        )

    def kernel(self) -> Any:
        """The module of compiled functions."""
        return library(MODULE, INSTALL).flash_attn_gpu

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
        kernel, slopes = self.kernel(), _slopes(params)
        tail = (*_band(mask, k, sequences, params), params.softcap, False, None)
        if sequences is None:
            found, found_lse, *_ = kernel.fwd(q, k, v, out, slopes, 0.0, params.scale, *tail)
            return (found if out is None else out), found_lse
        cu_q, cu_k = sequences.on(q.device)
        # At least 2: with 1 it takes another path, of another layout.
        longest = max(sequences.max_q, 2), sequences.max_k
        nothing = (None, None, None)  # seqused_k, leftpad_k, block_table
        found, found_lse, *_ = kernel.varlen_fwd(
            q, k, v, out, cu_q, cu_k, *nothing, slopes, *longest, 0.0, params.scale, False, *tail
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
        kernel, slopes = self.kernel(), _slopes(params)
        dq = torch.empty_like(q) if dq is None else dq
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)) if dkv is None else dkv
        head = (dout, q, k, v, out, lse, dq, dk, dv)
        tail = (*_band(mask, k, sequences, params), params.softcap, params.deterministic, None, None)
        if sequences is None:
            kernel.bwd(*head, slopes, 0.0, params.scale, *tail)
        else:
            cu_q, cu_k = sequences.on(q.device)
            longest = sequences.max_q, sequences.max_k
            kernel.varlen_bwd(*head, cu_q, cu_k, slopes, *longest, 0.0, params.scale, False, *tail)
        return dq, dk, dv


def _slopes(params: Params) -> Tensor | None:
    """As it wants them: fp32, the last dimension dense."""
    return None if params.alibi_slopes is None else params.alibi_slopes.float().contiguous()


def _band(mask: Mask, k: Tensor, sequences: Sequences | None, params: Params) -> tuple[bool, int, int]:
    """is_causal, window_size_left, window_size_right."""
    if params.alibi_slopes is None or not mask.causal:
        return mask.causal, *mask
    longest = k.shape[1] if sequences is None else sequences.max_k
    return False, longest - 1, mask.right  # one more to the left, and it is read as no bound: as causal
