"""Two partial results of the same rows into one, by their log-sum-exp, in fp32.

For backends that cannot continue from a running state: with w = sigmoid(lse_new - lse), out += w (out_new - out) and
lse = log(exp(lse) + exp(lse_new)); neither overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges a block into running results, in place.

    Args:
        out: (B, S, H, D) fp32, lse: (B, H, S) fp32: running; lse -inf is a row that has seen nothing (its `out` is not
            read).
        block_out: (B, S, H, D) any dtype, block_lse: (B, H, S): the block's; lse -inf is a row that saw nothing there.
    """
    unseen, nothing_new = lse == -torch.inf, block_lse == -torch.inf
    weight = torch.sigmoid(block_lse - lse).masked_fill(unseen, 1.0).masked_fill(nothing_new, 0.0)
    weight = weight.transpose(1, 2)[..., None]  # (B, S, H, 1)
    before = out.masked_fill(unseen.transpose(1, 2)[..., None], 0.0)
    block = block_out.to(out.dtype).masked_fill(nothing_new.transpose(1, 2)[..., None], 0.0)
    out.copy_(before + weight * (block - before))
    lse.copy_(torch.logaddexp(lse, block_lse))
