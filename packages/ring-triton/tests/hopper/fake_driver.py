"""Launches that go as far as the driver's door: kernels are compiled for sm_90a, what would be launched is noted."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import triton
from hopper_compiling import NoGpu

from ring_core import direct, merge_triton
from ring_core.comm import pack_triton, sum_triton
from ring_triton.hopper import backward_launch, launch
from ring_triton.portable import launch as portable
from ring_triton.portable.settings import listed, width_of


class Map:
    """As much of Triton's tensor map object as its address."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address


class CompileOnly:
    """A kernel whose launches compile; how often is counted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled = 0
        self.last: Any = None

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled += 1
            self.last = self.kernel.warmup(*arguments, grid=grid, **constants)
            self.last.function = 0
            return self.last

        return run


@contextmanager
def no_gpu(driver_launch: Callable[..., int]) -> Iterator[CompileOnly]:
    """`hopper.launch.forward` on CPU tensors while it lasts; driver_launch instead of cuLaunchKernel."""
    triton.runtime.driver.set_active(NoGpu())
    compile_only = CompileOnly(launch.forward_kernel)
    encoded: Callable[[Any, Any], list[Any]] = lambda moved, metadata: [Map(moved.base.data_ptr())]  # noqa: E731
    with (
        patch.object(launch, "forward_kernel", compile_only),
        patch.object(launch, "processors", lambda device: 132),
        patch.object(launch, "current_stream", lambda: lambda index: 7),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        patch.object(direct, "driver_launch", lambda: driver_launch),
        patch.object(direct, "make_tensordesc_arg", encoded),
    ):
        yield compile_only


PORTABLE = ("forward_kernel", "gradients_kv_kernel", "gradients_q_kernel", "prepare_kernel")


@contextmanager
def no_gpu_portable(driver_launch: Callable[..., int]) -> Iterator[dict[str, CompileOnly]]:
    """`portable.launch` on CPU tensors while it lasts, with the settings for sm_90."""
    triton.runtime.driver.set_active(NoGpu())
    kernels = {name: CompileOnly(getattr(portable, name)) for name in PORTABLE}
    setting: Callable[..., Any] = lambda _, kernel, dim, bits: listed("sm_90", kernel, width_of(dim), bits)  # noqa: E731
    with (
        patch.multiple(portable, setting_of=setting, **kernels),
        patch.object(direct, "current_stream", lambda: lambda index: 7),
        patch.object(direct, "driver_launch", lambda: driver_launch),
    ):
        yield kernels


@contextmanager
def no_gpu_core(driver_launch: Callable[..., int]) -> Iterator[list[CompileOnly]]:
    """ring-core's own kernels on CPU tensors while it lasts: merge, packing, sum of contributions."""
    triton.runtime.driver.set_active(NoGpu())
    kernels = [CompileOnly(merge_triton._merge), CompileOnly(pack_triton._pack), CompileOnly(sum_triton._sum)]
    with (
        patch.object(merge_triton, "_merge", kernels[0]),
        patch.object(pack_triton, "_pack", kernels[1]),
        patch.object(sum_triton, "_sum", kernels[2]),
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
        patch.multiple(direct, current_stream=lambda: lambda index: 7, driver_launch=lambda: driver_launch),
    ):
        yield kernels


BACKWARD = ("backward_kernel", "prepare_kernel", "finish_kernel")


@contextmanager
def no_gpu_backward(driver_launch: Callable[..., int]) -> Iterator[dict[str, CompileOnly]]:
    """`hopper.backward_launch` on CPU tensors while it lasts."""
    triton.runtime.driver.set_active(NoGpu())
    kernels = {name: CompileOnly(getattr(backward_launch, name)) for name in BACKWARD}
    encoded: Callable[[Any, Any], list[Any]] = lambda moved, metadata: [Map(moved.base.data_ptr())]  # noqa: E731
    streams: Callable[[], Any] = lambda: lambda index: 7  # noqa: E731
    with (
        patch.multiple(
            backward_launch, _split=lambda *_: 1, processors=lambda device: 132, current_stream=streams, **kernels
        ),
        patch.multiple(
            direct, current_stream=streams, driver_launch=lambda: driver_launch, make_tensordesc_arg=encoded
        ),
    ):
        yield kernels


def parameters_of(ptx: str) -> list[int]:
    """Bytes of each parameter of a module's entry."""
    (entry,) = re.findall(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    sizes = []
    for line in entry.split(","):
        array = re.search(r"\.b8\s+\w+\[(\d+)\]", line)
        sizes.append(int(array[1]) if array else int(re.findall(r"\.param \.[bufs](\d+)", line)[0]) // 8)
    return sizes


def inputs(batch: int = 1, length: int = 256, heads: tuple[int, int] = (4, 2), dim: int = 128) -> list[torch.Tensor]:
    """q, k, v, out, lse."""
    q, out = torch.zeros(2, batch, length, heads[0], dim, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 1, batch, length, heads[1], dim, dtype=torch.bfloat16)
    return [q, k, v, out, torch.zeros(batch, heads[0], length)]


def silent() -> Callable[..., int]:
    """A C function that ignores its arguments and gives 0: what ctypes costs, without the driver."""
    nothing = ctypes.CDLL(None).getppid
    nothing.restype = None
    return nothing  # type: ignore[no-any-return]
