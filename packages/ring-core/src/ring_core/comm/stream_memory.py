"""What streams do without a kernel, by the CUDA driver: write 32-bit words, wait for them, copy.

torch offers the write but not the wait (cuStreamBatchMemOp: CUDA driver API, "Stream Memory Operations"). Streams are
given by the driver's handle, and the thread's current device must be theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, …_WRITE_VALUE_32
_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(word - value) >= 0
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_MOST = 256  # operations a batch


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


_VALUE = _Operation.value.offset // 8


class Write(NamedTuple):
    """Sets the word at an address once everything before is done; whoever sees it sees all of that (the operation has a
    system-wide barrier)."""

    address: int
    value: int


class Wait(NamedTuple):
    """Nothing after it begins until the word at an address is at least `value`."""

    address: int
    value: int


def enqueue(stream: int, operations: Sequence[Write | Wait]) -> None:
    """Enqueues them in that order, in one call of the driver, since each costs the host some 10 µs."""
    for start in range(0, len(operations), _MOST):
        some = operations[start : start + _MOST]
        batch = (_Operation * len(some))(
            *(
                _Operation(operation=_WRITE, address=x.address, value=x.value & 0xFFFFFFFF)
                if isinstance(x, Write)
                else _Operation(operation=_WAIT, address=x.address, value=x.value & 0xFFFFFFFF, flags=_GEQ)
                for x in some
            )
        )
        _checked("cuStreamBatchMemOp", _driver().cuStreamBatchMemOp_v2(stream, len(some), batch, 0))


class Signals:
    """The same words over and over, with a new value each time: made once, since making the driver's records takes the
    host longer than enqueuing them."""

    def __init__(self, written: Sequence[int], awaited: Sequence[int]) -> None:
        self._records = (_Operation * (len(written) + len(awaited)))(
            *(_Operation(operation=_WRITE, address=address) for address in written),
            *(_Operation(operation=_WAIT, address=address, flags=_GEQ) for address in awaited),
        )
        # All values at once, signed: before the first epochs there are negative ones.
        self._values = np.frombuffer(memoryview(self._records), np.int64)[_VALUE :: ctypes.sizeof(_Operation) // 8]

    def enqueue(self, stream: int, value: int) -> None:
        """Writes `value` to the first ones, then waits until the others are at least that, in one call."""
        count = len(self._values)
        if count:
            self._values[:] = value
            _checked("cuStreamBatchMemOp", _driver().cuStreamBatchMemOp_v2(stream, count, self._records, 0))


def copy_all(stream: int, target: int, copies: Iterable[tuple[int, int, int]]) -> None:
    """Enqueues copies between device addresses, which a copy engine makes where one of them is another GPU's: each of
    (bytes behind the target, source, number of bytes).

    What torch's `copy_` would do, at a fifth of its time on the host.
    """
    copy = _driver().cuMemcpyDtoDAsync_v2
    for place, source, nbytes in copies:
        code = copy(target + place, source, nbytes, stream)
        if code:
            _checked("cuMemcpyDtoDAsync", code)


def tolerate_captures() -> None:
    """From now on this thread may ask events and copy while another one captures a CUDA graph, which by default would
    break that capture, and fail here."""
    mode = ctypes.c_int(_RELAXED)
    _checked("cuThreadExchangeStreamCaptureMode", _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


def _checked(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name} failed with CUDA driver error {code}")


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuStreamBatchMemOp_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
    library.cuMemcpyDtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return library
