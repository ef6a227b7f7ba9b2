"""The merge of `ring_core.merge` as one kernel.

One program takes ROWS (sequence, head) rows of one batch entry and all of their D numbers. Per row it reads lse and
block_lse, then out and block_out, and writes the merged row and lse: 12 bytes an element for fp32 running and 16-bit
block results, so it runs at the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_core.direct import Launches, addresses, aligned, shaped

_launches = Launches()


@triton.jit
def _merge(
    out,
    lse,
    block_out,
    block_lse,
    result,
    num_rows,
    num_heads,
    head_dim,
    out_b,
    out_s,
    out_h,
    lse_b,
    lse_h,
    lse_s,
    block_b,
    block_s,
    block_h,
    block_lse_b,
    block_lse_h,
    block_lse_s,
    result_b,
    result_s,
    result_h,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    s, h = (
        row // num_heads,
        row % num_heads,
    )  # heads of a token lie side by side
    d = tl.arange(0, D)
    lse_at = lse + batch * lse_b + h * lse_h + s * lse_s
    old = tl.load(lse_at, mask=there, other=float("-inf"))
    new = tl.load(block_lse + batch * block_lse_b + h * block_lse_h + s * block_lse_s, mask=there, other=float("-inf"))
    top = tl.maximum(old, new)
    base = tl.where(top == float("-inf"), 0.0, top)
    old_share, new_share = tl.exp(old - base), tl.exp(new - base)
    total = old_share + new_share
    weight = tl.where(total > 0, new_share / total, 0.0)

    inside = there[:, None] & (d < head_dim)[None, :]
    seen = inside & (old > float("-inf"))[:, None]
    fresh = inside & (new > float("-inf"))[:, None]
    a = tl.load(out + (batch * out_b + s * out_s + h * out_h)[:, None] + d[None, :], mask=seen, other=0.0)
    b = tl.load(block_out + (batch * block_b + s * block_s + h * block_h)[:, None] + d[None, :], mask=fresh, other=0.0)
    a, b = a.to(tl.float32), b.to(tl.float32)
    merged = a + weight[:, None] * (b - a)
    target = result + (batch * result_b + s * result_s + h * result_h)[:, None] + d[None, :]
    tl.debug_barrier()  # several threads read the same lse, each for itself: all must have, before one overwrites it
    tl.store(lse_at, base + tl.log(total), mask=there)
    tl.store(target, merged.to(result.dtype.element_ty), mask=inside)


def merge_kernel_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, result: Tensor) -> None:
    """See `ring_core.merge.merge_`; `result` may be `out`. Last dimensions of (B, S, H, D) tensors must be dense."""
    batch, length, num_heads, head_dim = out.shape
    if not out.numel():
        return
    tensors = out, lse, block_out, block_lse, result
    key = shaped(*tensors), out.get_device()
    with torch.cuda.device(out.device):
        if _launches.again(key, out.get_device(), addresses(*tensors), ()):
            return
        width = max(16, triton.next_power_of_2(head_dim))
        rows = max(1, 4096 // width)
        grid = (triton.cdiv(length * num_heads, rows), batch)
        arguments = (
            *tensors,
            length * num_heads,
            num_heads,
            head_dim,
            *out.stride()[:3],
            *lse.stride(),
            *block_out.stride()[:3],
            *block_lse.stride(),
            *result.stride()[:3],
        )
        kernel = _merge[grid](*arguments, ROWS=rows, D=width, num_warps=4)
        if aligned(*addresses(*tensors)):
            _launches.add(key, kernel, grid, arguments)
