"""Launches like ones before: everything but addresses is remembered, and whether it still holds is asked in C.

    launches(*given) ── is some launch remembered for tensors laid out like these? ── yes ──► its numbers, with these
         ▲                                  │ no                                              addresses, to the kernel
         └──── launches.add(…) ◄── the caller works out what to launch

A launch takes some forty numbers, nearly all of which follow from how tensors are laid out. In Python it takes the
host 3.5 µs to ask tensors for that, to look it up, and to hand the numbers over; in C, in a function that is linked
with each kernel (`again_source`), 1.3 µs. For a kernel that could not be linked Python does the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

AGAIN_SYMBOL = "ring_cute_again"
LATEST = 8
"""Launches that are remembered of one kind."""
KINDS = 64
"""Kinds that are remembered."""
_RANK = 5  # dims that tensors may have
_LAYOUT = 4 + 2 * _RANK  # words for a tensor's layout
_ARGUMENTS = 64  # of a kernel, at most
_INT, _FLOAT = 1, 3  # tvm_ffi's types

Given = Tensor | int | None
"""A tensor, whose address the kernel gets, a number, or None for 0."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that was linked."""

    function: Callable[..., None]  # of its numbers
    again: Callable[..., bool]  # of the address of what is remembered, then of what each launch gives

    def __call__(self, *numbers: float) -> None:
        self.function(*numbers)


def function_of(kernel: Callable[..., Any]) -> Callable[..., None]:
    """What takes a kernel's numbers, without a frame of Python's in between."""
    return kernel.function if isinstance(kernel, Kernel) else kernel


def current_stream(device: int) -> int:
    """The driver's handle of a GPU's current stream, without the object that `torch.cuda.current_stream` makes: 0.2 µs
    of the host's time instead of 3."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def current_device() -> int:
    """The GPU that launches go to: `torch.cuda.current_device`, for whom a tensor on one shows that CUDA is there."""
    index: int = torch._C._cuda_getDevice()
    return index


_AGAIN = """
/* A launch like one before. What is remembered, in words:
   seen | places | numbers | for each place: its number, the layout of what is given | for each number: type, value
   Needs no headers of the C library either: with -ffreestanding the compiler's own will do. */
#include <tvm/ffi/c_api.h>

int __tvm_ffi_%(kernel)s(void *self, const TVMFFIAny *numbers, int32_t count, TVMFFIAny *result);

/* The address of a tensor, or a number itself; `layout` is all that a launch depends on beside it. */
static int64_t described(const TVMFFIAny *given, int64_t *layout) {
    for (int n = 0; n < %(layout)d; n++) layout[n] = 0;
    layout[0] = given->type_index;
    if (given->type_index != kTVMFFITensor) return given->type_index == kTVMFFINone ? 0 : given->v_int64;
    const DLTensor *x = (const DLTensor *)(given->v_obj + 1);  /* behind the header of every object */
    const int64_t address = (int64_t)x->data + x->byte_offset;
    layout[1] = (int64_t)x->device.device_type << 32 | x->device.device_id;
    layout[2] = (int64_t)x->dtype.code << 32 | x->dtype.bits;
    layout[3] = address %% 16 << 8 | x->ndim;
    for (int n = 0; n < x->ndim && n < %(rank)d; n++) {
        layout[4 + n] = x->shape[n];
        layout[4 + %(rank)d + n] = x->strides[n];
    }
    return address;
}

/* given: where `remembered` is, then what takes the places; result: whether it is laid out as it was, and launched */
int __tvm_ffi_%(again)s(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result) {
    int64_t *remembered = (int64_t *)given->v_int64, *place = remembered + 3;
    const int seen = remembered[0], places = remembered[1], numbers = remembered[2];
    TVMFFIAny filled[%(arguments)d];
    __builtin_memcpy(filled, place + places * (1 + %(layout)d), numbers * sizeof *filled);
    result->type_index = kTVMFFIBool;
    result->v_int64 = 0;
    for (int n = 0; n < places; n++, place += 1 + %(layout)d) {
        int64_t layout[%(layout)d];
        filled[*place].v_int64 = described(++given, layout);
        if (!seen) __builtin_memcpy(place + 1, layout, sizeof layout);
        else if (__builtin_memcmp(place + 1, layout, sizeof layout)) return 0;
    }
    remembered[0] = 1;
    const int failed = __tvm_ffi_%(kernel)s(self, filled, numbers, result);
    if (failed) return failed;
    result->type_index = kTVMFFIBool;
    result->v_int64 = 1;
    return 0;
}
"""


def again_source(kernel: str) -> str:
    """The C source of AGAIN_SYMBOL for a compiled kernel of that name, to be linked with it; needs headers of tvm_ffi.
    It does what `_plain` does."""
    names = {"kernel": kernel, "again": AGAIN_SYMBOL, "layout": _LAYOUT, "rank": _RANK, "arguments": _ARGUMENTS}
    return _AGAIN % names


_Known = tuple[Callable[..., bool], Tensor | None]
"""A launch, and the memory that it is remembered in."""


class Launches:
    """Those of one kind, the latest first."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: list[_Known] = []

    def __call__(self, *given: Given) -> bool:
        """Launches, if such tensors have been given before; says whether."""
        for known in self._known:
            if known[0](*given):
                if known is not self._known[0]:
                    self._put_first(known)
                return True
        return False

    def add(self, kernel: Callable[..., Any], numbers: Sequence[float | None], given: Sequence[Given]) -> None:
        """Launches, and remembers it.

        Args:
            kernel: of `library.load`.
            numbers: its arguments, None where each launch gives its own.
            given: what this one gives there.
        """
        assert sum(number is None for number in numbers) == len(given)
        known = (_linked if isinstance(kernel, Kernel) else _plain)(kernel, numbers)
        if not known[0](*given):
            raise AssertionError("a first launch has nothing to differ from")
        self._put_first(known)

    def _put_first(self, known: _Known) -> None:
        self._known = [known, *(other for other in self._known if other is not known)][:LATEST]


class LaunchesByKind(dict[Any, Launches]):
    """Those of every kind; of which there may be ever new ones, where a scale changes from call to call."""

    def __missing__(self, kind: Any) -> Launches:
        if len(self) >= KINDS:
            self.clear()
        found = self[kind] = Launches()
        return found


def _linked(kernel: Any, numbers: Sequence[float | None]) -> _Known:
    """By the function that is linked with the kernel. What it remembers: whether it has seen a launch, how many places
    and numbers, for each place its number and the layout of what was given there, each number's type and value."""
    assert len(numbers) <= _ARGUMENTS
    places = _places(numbers)
    words = [0, len(places), len(numbers)]
    for place in places:
        words += [place, *[0] * _LAYOUT]
    typed = [(_FLOAT if isinstance(number, float) else _INT, number or 0) for number in numbers]
    packed = struct.pack("".join("qd" if kind == _FLOAT else "qq" for kind, _ in typed), *chain(*typed))
    remembered = torch.tensor([*words, *struct.unpack(f"{2 * len(numbers)}q", packed)], dtype=torch.int64, device="cpu")
    return partial(kernel.again, remembered.data_ptr()), remembered


def _places(numbers: Sequence[float | None]) -> list[int]:
    """Where each launch gives its own."""
    return [n for n, number in enumerate(numbers) if number is None]


def _plain(kernel: Any, numbers: Sequence[float | None]) -> _Known:
    """The same in Python."""
    places = _places(numbers)
    known: list[Any] = []

    def launch(*given: Given) -> bool:
        layouts = [_layout(x) if isinstance(x, Tensor) else x is None for x in given]
        if not known:
            known.extend(layouts)
        elif layouts != known:
            return False
        filled: list[Any] = list(numbers)
        for place, x in zip(places, given, strict=True):
            filled[place] = x.data_ptr() if isinstance(x, Tensor) else x or 0
        kernel(*filled)
        return True

    return launch, None


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16
