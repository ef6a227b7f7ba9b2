"""Launches compiled kernels again without Triton's binder: a repeated launch differs in pointers only.

Only imported where triton is. Triton's `kernel[grid](...)` looks at every argument and encodes every tensor descriptor,
every time: some 40 µs for the Hopper forward of ring-triton. A `Launch` remembers the compiled kernel and every number
it was launched with, and calls the driver's cuLaunchKernel with the pointers of the call. What a kernel takes follows
from its signature as Triton compiled it: constants and arguments that were specialised to 1 are none of its parameters,
a tensor descriptor is a 128-byte map, then its shape and strides, and two pointers to scratch memory come last
(`triton.backends.nvidia.driver` generates C for the same).

    first call     kernel = forward_kernel[grid](...)      compiled and launched by Triton
                   Launch.of(kernel, grid, arguments)
    every other    launch(stream, pointers, descriptors)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from threading import get_ident
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from ring_core.backend import DeviceTable

NUMBERS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
MAPS_KEPT = 512
"""Encoded descriptors of one argument, by address: a training step reuses the allocator's blocks."""
LAUNCHES_KEPT = 1024
"""Of one kernel over one table: lengths may be new in every step."""
MAP_BYTES = 128
"""A CUtensorMap: the end of Triton's `PyCUtensorMap` object."""


class Launch:
    """One compiled kernel with all that it was launched with.

    Args:
        kernel: what `kernel[grid](...)` returned.
        grid: of that launch.
        arguments: those of the kernel that are no constants, in order. Numbers stay; tensors and descriptors are
            replaced at each launch.
        note: pointers that stay the same from launch to launch, for its user to find with it.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], arguments: Sequence[Any], note: tuple[int, ...] = ()) -> None:
        self.note = note
        signature = list(kernel.src.signature.values())
        pointers = sum(isinstance(kind, str) and kind.startswith("*") for kind in signature)
        self._pointers = (ctypes.c_uint64 * pointers)()
        self.numbers: list[Any] = []  # whose addresses the parameters are
        self._maps: list[tuple[int, Callable[[int], Any], dict[int, tuple[int, Any]]]] = []
        addresses: list[int] = []
        taken = 0
        for kind, argument in zip(signature, arguments, strict=False):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                addresses.append(ctypes.addressof(self._pointers) + 8 * taken)
                taken += 1
            elif kind.startswith("tensordesc"):
                encode = _encoder(argument, kernel.metadata.tensordesc_meta[len(self._maps)])
                self._maps.append((len(addresses), encode, {}))
                addresses.append(0)
                addresses += [self._number("i32", size) for size in argument.shape]
                addresses += [self._number("i64", stride) for stride in argument.strides]
            else:
                addresses.append(self._number(kind, argument))
        addresses += [self._number("u64", 0)] * 2  # global and profile scratch
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        warps, _, shared = kernel.packed_metadata
        x, y, z = (*grid, 1, 1)[:3]
        self._fixed = ctypes.c_void_p(kernel.function), *map(ctypes.c_uint, (x, y, z, 32 * warps, 1, 1, shared))
        self._launch = driver_launch()
        # What the parameters hold now: most calls find there what the one before has left.
        self._on_stream: int | None = None
        self._arguments: tuple[Any, ...] = ()
        self._at: tuple[int, ...] | None = None
        self._described: tuple[int, ...] | None = None

    def _number(self, kind: str, value: Any) -> int:
        number = NUMBERS[kind](value)
        self.numbers.append(number)
        return ctypes.addressof(number)

    def __call__(self, stream: int, pointers: tuple[int, ...], descriptors: tuple[int, ...] = ()) -> None:
        """Enqueues it on a stream (the driver's handle) of the current device.

        Args:
            pointers: addresses of all tensors among the arguments, in order; descriptors: those of the tensors that the
                descriptors describe.
        """
        if pointers != self._at:
            self._pointers[:] = pointers  # type: ignore[call-overload]  # any sequence will do
            self._at = pointers
        if descriptors != self._described:
            self._describe(descriptors)
        if stream != self._on_stream:
            self._arguments = *self._fixed, ctypes.c_void_p(stream), self._parameters, None
            self._on_stream = stream
        code = self._launch(*self._arguments)
        if code:
            raise RuntimeError(f"cuLaunchKernel failed with CUDA driver error {code}")

    def _describe(self, descriptors: tuple[int, ...]) -> None:
        """Lets the parameters point at the maps of these addresses."""
        self._described = None
        for (place, encode, known), address in zip(self._maps, descriptors, strict=True):
            found = known.get(address)
            if found is None:
                if len(known) >= MAPS_KEPT:
                    known.clear()
                made = encode(address)
                found = known[address] = id(made) + type(made).__basicsize__ - MAP_BYTES, made
            self._parameters[place] = found[0]
        self._described = descriptors


def launchable(kernel: Any, arguments: Sequence[Any]) -> bool:
    """Whether `Launch` knows all that this kernel needs."""
    if torch.version.hip is not None or not hasattr(kernel, "packed_metadata"):
        return False
    metadata = kernel.metadata
    plain = metadata.num_ctas == 1 and not (metadata.launch_cooperative_grid or metadata.launch_pdl)
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    kinds = list(kernel.src.signature.values())[: len(arguments)]
    described = sum(isinstance(kind, str) and kind.startswith("tensordesc") for kind in kinds)
    if described and (len(metadata.tensordesc_meta or ()) != described or None in metadata.tensordesc_meta):
        return False
    return (
        plain
        and not scratch
        and all(
            isinstance(kind, str) and (kind == "constexpr" or kind.startswith(("*", "tensordesc")) or kind in NUMBERS)
            for kind in kinds
        )
    )


class Launches:
    """The launches of one kernel, by key: everything that shapes them but the pointers.

    A pointer's alignment shapes them too: whoever makes the key asks `aligned`, or has told Triton not to look at it.
    Threads have launches of their own, since a launch holds the arguments while it happens.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Launch] = {}

    def get(self, key: Any) -> Launch | None:
        """The launch of that key on this thread; None while somebody wants to see launches (profilers)."""
        if _watched():
            return None
        return self._known.get((get_ident(), key))

    def again(self, key: Any, device: int, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
        """Launches what that key launched before, on the device's current stream, and says whether it could: pointers
        are `before`, those that were remembered as its note, then `after`."""
        known = self.get(key)
        if known is None or not aligned(*before, *after):
            return False
        known(current_stream()(device), (*before, *known.note, *after))
        return True

    def add(
        self, key: Any, kernel: Any, grid: Sequence[int], arguments: Sequence[Any], note: tuple[int, ...] = ()
    ) -> None:
        """Remembers what Triton has just launched, where `Launch` can repeat it."""
        if launchable(kernel, arguments):
            if len(self._known) >= LAUNCHES_KEPT:
                self._known.clear()
            self._known[get_ident(), key] = Launch(kernel, grid, arguments, note)


def shaped(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What of tensors shapes a launch."""
    return tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])


def addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Where they lie."""
    return tuple([x.data_ptr() for x in tensors])


def launches_of(table: DeviceTable, name: str) -> Launches:
    """Those of one kernel over one table, kept with it."""
    cache = table.host.cache
    found: Launches | None = cache.get(name)
    if found is None:
        found = cache[name] = Launches()
    return found


def aligned(*addresses: int) -> bool:
    """Whether all of them are multiples of 16, as Triton's kernels are compiled for what is."""
    together = 0
    for address in addresses:
        together |= address
    return not together & 15


def _watched() -> bool:
    enter: Any = knobs.runtime.launch_enter_hook  # a chain, or what somebody has put in its place
    leave: Any = knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def make_tensordesc_arg(descriptor: Any, metadata: Any) -> Any:
    """Triton's own, which the Triton of other GPUs need not have."""
    from triton.backends.nvidia.driver import make_tensordesc_arg as make

    return make(descriptor, metadata)


class _At:
    """A tensor descriptor's base at another address."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _encoder(descriptor: Any, metadata: Any) -> Callable[[int], Any]:
    """Makes Triton's object around the map of that descriptor at an address."""

    class Moved:
        shape, strides, padding = descriptor.shape, descriptor.strides, descriptor.padding
        round_f32_to_tf32 = getattr(descriptor, "round_f32_to_tf32", False)  # since 3.7

    def encode(address: int) -> Any:
        moved: Any = Moved()
        moved.base = _At(address)
        return make_tensordesc_arg(moved, metadata)[0]

    return encode


@cache
def driver_launch() -> Callable[..., int]:
    """cuLaunchKernel. Arguments are ctypes objects, which spares their conversion."""
    launch: Callable[..., int] = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    return launch


@cache
def current_stream() -> Callable[[int], int]:
    """Gives the handle of the current stream of a device, by its number."""
    found: Callable[[int], int] = triton.runtime.driver.active.get_current_stream
    return found
