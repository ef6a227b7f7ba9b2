"""Stream memory operations of the CUDA driver: a stream writes 32-bit words, or waits for them, without a kernel.

torch offers the write but not the wait, so both are called in the driver that torch has loaded
(cuStreamBatchMemOp: CUDA driver API, "Stream Memory Operations").
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, …_WRITE_VALUE_32
_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(word - value) >= 0


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams: a union padded to six 64-bit words; waits and writes of 32 bits share one form."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("_pad0", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("_pad1", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("_pad2", ctypes.c_uint64),
    )


def write_words(stream: torch.cuda.Stream, addresses: Sequence[int], value: int) -> None:
    """Enqueues writing `value` to each address, after everything the stream holds: whoever sees the word sees all of
    that (the operation has a system-wide barrier)."""
    _enqueue(stream, _WRITE, addresses, value, 0)


def wait_words(stream: torch.cuda.Stream, addresses: Sequence[int], value: int) -> None:
    """Makes the stream wait until each word is at least `value`."""
    _enqueue(stream, _WAIT, addresses, value, _GEQ)


def _enqueue(stream: torch.cuda.Stream, operation: int, addresses: Sequence[int], value: int, flags: int) -> None:
    if not addresses:
        return
    word = value & 0xFFFFFFFF
    batch = (_Operation * len(addresses))(
        *(_Operation(operation=operation, address=address, value=word, flags=flags) for address in addresses)
    )
    with torch.cuda.device(stream.device):
        code = _driver().cuStreamBatchMemOp_v2(ctypes.c_void_p(stream.cuda_stream), len(addresses), batch, 0)
    if code:
        raise RuntimeError(f"cuStreamBatchMemOp failed with CUDA driver error {code}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
