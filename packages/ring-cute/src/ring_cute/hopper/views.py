"""Tensors in global memory as the kernels address them, made of addresses, sizes and strides."""

from __future__ import annotations

from typing import Any

from cutlass import Int64, cute

FAR = 1 << 30
"""Rows that a ragged view counts back from."""
BOUNDLESS = 0x7FFF0000
KEEP, DROP = 0x14F0000000000000, 0x12F0000000000000
"""L2 policies that a load or a store by TMA may be given: evict last, evict first."""


def ragged_view(address: Any, dtype: Any, head_dim: int, heads: Any, row: Any, head: Any) -> Any:
    """Keys or values, token after token, as (key, D, Hkv, end, far), all bounds wide open but that of the key.

    A box at (FAR - length + j, 0, h, end, FAR) begins at row end - length + j, and its rows from j = length on are past
    the bound FAR, so zeros. The last stride takes the address back by FAR rows, in 64-bit wraparound (the ragged view
    of `triton.tools.ragged_tma`).
    """
    row, head = cute.assume(row, divby=8), cute.assume(head, divby=8)
    back = cute.assume(Int64(1 << 34) - row, divby=8)
    layout = cute.make_layout((FAR, head_dim, heads, BOUNDLESS, BOUNDLESS), stride=(row, 1, head, row, back))
    return cute.make_tensor(cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=16), layout)


def rows_view(address: Any, dtype: Any, head_dim: int, sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> Any:
    """A tensor (B, S, H, D) of sizes (B, S, H) and such strides as (S, D, H, B)."""
    batch, rows, heads = sizes
    batch_stride, row, head = (cute.assume(stride, divby=16 // (dtype.width // 8)) for stride in strides)
    layout = cute.make_layout((rows, head_dim, heads, batch), stride=(row, 1, head, batch_stride))
    return cute.make_tensor(cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=16), layout)


def flat(address: Any, dtype: Any) -> Any:
    """Memory as numbers one after the other."""
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=dtype.width // 8)
    return cute.make_tensor(pointer, cute.make_layout(1 << 30))
