"""Compiles kernels for sm_90a; needs the DSL, but no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream

from ring_cute.hopper.forward import HopperForward
from ring_cute.settings import ForwardKind

ADDRESSES, SIZES, STRIDES, COUNTS = 12, 4, 15, 7
OPTIONS = "--enable-tvm-ffi --gpu-arch sm_90a"


def compile_forward(kind: ForwardKind, options: str = OPTIONS) -> Any:
    """The kernel for that kind: a callable that takes the numbers of `HopperForward.__call__` and a stream."""
    return cute.compile(
        HopperForward(kind),
        *(Int64(0) for _ in range(ADDRESSES)),
        Float32(0.0),
        *(Int32(0) for _ in range(SIZES)),
        *(Int64(0) for _ in range(STRIDES)),
        *(Int32(0) for _ in range(COUNTS)),
        make_fake_stream(),
        options=options,
    )


COMPILERS: dict[type, Callable[[Any], Any]] = {ForwardKind: compile_forward}
"""By kind of kernel."""


def compile_kind(kind: Any) -> Any:
    """A kernel of any kind: a callable that takes the numbers of its class's `__call__` and a stream."""
    return COMPILERS[type(kind)](kind)
