"""Two partial results of the same rows into one, by their log-sum-exp.

For backends that cannot continue from a running state: with w = sigmoid(lse_new - lse), out += w (out_new - out) and
lse = log(exp(lse) + exp(lse_new)); neither overflows. One Triton kernel for CUDA tensors where triton is importable
(it reads and writes each number once), torch operations elsewhere.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, result: Tensor | None = None) -> None:
    """Merges a block into running results, in place.

    Args:
        out: (B, S, H, D), lse: (B, H, S), both fp32 (fp64 for fp64): running; lse -inf is a row that has seen nothing
            (its `out` is not read). Any strides, the last of `out` dense. Where `result` is given, `out` may have any
            dtype.
        block_out: (B, S, H, D) any dtype, block_lse: (B, H, S): the block's; lse -inf is a row that saw nothing there
            (its `block_out` is not read).
        result: (B, S, H, D) any dtype: takes the merged rows in place of `out`, which then stays as it was.
    """
    if lse.is_cuda and lse.dtype == torch.float32 and lse.shape[0] < 1 << 16 and triton_is_importable():
        from ring_core.merge_triton import merge_kernel_

        return merge_kernel_(out, lse, block_out, block_lse, out if result is None else result)
    unseen, nothing_new = lse == -torch.inf, block_lse == -torch.inf
    weight = torch.sigmoid(block_lse - lse).masked_fill(unseen, 1.0).masked_fill(nothing_new, 0.0)
    weight = weight.transpose(1, 2)[..., None]  # (B, S, H, 1)
    before = out.to(lse.dtype).masked_fill(unseen.transpose(1, 2)[..., None], 0.0)
    block = block_out.to(lse.dtype).masked_fill(nothing_new.transpose(1, 2)[..., None], 0.0)
    (out if result is None else result).copy_(before + weight * (block - before))
    lse.copy_(torch.logaddexp(lse, block_lse))


@cache
def triton_is_importable() -> bool:
    """Whether kernels in Triton can stand in for torch operations on CUDA tensors."""
    return find_spec("triton") is not None
