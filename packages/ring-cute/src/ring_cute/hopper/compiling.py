"""Compiles kernels for sm_90a; needs the DSL, but no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream

from ring_cute.hopper.backward import HopperBackward
from ring_cute.hopper.backward_ends import Finish, Prepare
from ring_cute.hopper.backward_settings import BackwardKind, EndsKind
from ring_cute.hopper.forward import HopperForward
from ring_cute.hopper.scores import no_terms
from ring_cute.settings import ForwardKind

ADDRESSES, SIZES, STRIDES, COUNTS = 12, 4, 15, 7
OPTIONS = "--enable-tvm-ffi --gpu-arch sm_90a"
BACKWARD_ADDRESSES, BACKWARD_SIZES, BACKWARD_STRIDES, BACKWARD_COUNTS = 17, 3, 16, 12


def compile_forward(kind: ForwardKind, options: str = OPTIONS) -> Any:
    """The kernel for that kind: a callable that takes what `HopperForward.__call__` does, in that order."""
    return cute.compile(
        HopperForward(kind),
        *(Int64(0) for _ in range(ADDRESSES)),
        Float32(0.0),
        *(Int32(0) for _ in range(SIZES)),
        *(Int64(0) for _ in range(STRIDES)),
        *(Int32(0) for _ in range(COUNTS)),
        make_fake_stream(),
        *_terms(kind),
        options=options,
    )


def compile_backward(kind: BackwardKind, options: str = OPTIONS) -> Any:
    """The kernel for that kind: a callable that takes what `HopperBackward.__call__` does, in that order."""
    return cute.compile(
        HopperBackward(kind),
        *(Int64(0) for _ in range(BACKWARD_ADDRESSES)),
        Float32(0.0),
        Float32(0.0),
        *(Int32(0) for _ in range(BACKWARD_SIZES)),
        *(Int64(0) for _ in range(BACKWARD_STRIDES)),
        *(Int32(0) for _ in range(BACKWARD_COUNTS)),
        make_fake_stream(),
        *_terms(kind),
        options=options,
    )


def _terms(kind: ForwardKind | BackwardKind) -> tuple[Any, ...]:
    """What shaped scores take after the stream, so that kernels of others are handed no more than ever."""
    return no_terms() if kind.shaped else ()


def compile_ends(kind: EndsKind, options: str = OPTIONS) -> Any:
    """The kernel for that kind: a callable that takes the numbers of `Prepare.__call__` or `Finish.__call__`."""
    sizes = (Int32(0) for _ in range(3))
    if kind.step == "prepare":
        addresses_and_strides = (Int64(0) for _ in range(7 + 11))
        return cute.compile(Prepare(kind), *addresses_and_strides, *sizes, make_fake_stream(), options=options)
    strides = (Int64(0) for _ in range(3))
    numbers = (Int64(0), Int64(0), Float32(0.0))
    return cute.compile(Finish(kind), *numbers, *strides, *sizes, make_fake_stream(), options=options)


COMPILERS: dict[type, Callable[[Any], Any]] = {
    ForwardKind: compile_forward,
    BackwardKind: compile_backward,
    EndsKind: compile_ends,
}
"""By kind of kernel."""


def compile_kind(kind: Any) -> Any:
    """A kernel of any kind: a callable that takes the numbers of its class's `__call__` and a stream."""
    return COMPILERS[type(kind)](kind)
