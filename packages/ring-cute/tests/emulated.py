"""The forward without a GPU: its own host code fills in descriptors and parameters, `ptx_machine` runs its PTX.

What the DSL makes of a kind is linked with a stand-in for the CUDA runtime, which keeps what would have been launched.
Needs the DSL, apache-tvm-ffi and a C compiler.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from ptx_machine import Memory, launch
from ptx_program import Program
from torch import Tensor

from ring_cute import library
from ring_cute.hopper import backward_launch as backward_launching
from ring_cute.hopper import launch as launching

RUNTIME = """
#include <string.h>
#include <stdint.h>
static void *kept[64];
static int sizes[64], count, dims[6];
void keep(int n, int size, void *where) { kept[n] = where; sizes[n] = size; count = n + 1; }
int *launched(void) { return dims; }
int _cuKernelGetAttribute(void) { return 0; }
int _cudaDeviceGetAttribute(void) { return 0; }
int _cudaFuncSetAttribute(void) { return 0; }
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaKernelSetAttributeForDevice(void) { return 0; }
int _cudaLibraryGetKernel(void) { return 0; }
int _cudaLibraryLoadData(void) { return 0; }
int cuda_dialect_init_library_once(void) { return 0; }
int cuda_dialect_unload_library_once(void) { return 0; }
void CuteDSLRT_TVMFFISetRaisedCudaError(void *raise, int code) {}
int _cudaLaunchKernelEx(void *config, void *kernel, void **arguments) {
    memcpy(dims, config, sizeof dims);
    for (int n = 0; n < count; n++) memcpy(kept[n], arguments[n], sizes[n]);
    return 0;
}
"""
_regions: list[tuple[int, np.ndarray]] = []
_kept: list[Tensor] = []  # memory that regions name
_schedules: list[Any] = []  # of all tables so far: a call that was made before does not prepare again


@cache
def emulated(kind: library.Kind) -> Callable[..., None]:
    """In the place of `library.load`: the kernel as a function of the same numbers, run on the CPU."""
    import cute_compiling
    import tvm_ffi

    folder = Path(tempfile.mkdtemp())
    compiled, ptx = cute_compiling.compiled_and_ptx(kind)
    program = Program(ptx)
    compiled.export_to_c(str(folder / "kernel.o"), function_name="forward")
    (folder / "runtime.c").write_text(RUNTIME)
    target = folder / "kernel.so"
    command = ["cc", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-o", target, folder / "kernel.o", folder / "runtime.c"]
    subprocess.run(command, check=True)
    host, stand_in = tvm_ffi.load_module(str(target)).forward, ctypes.CDLL(str(target))
    stand_in.launched.restype = ctypes.POINTER(ctypes.c_int)
    memory = [ctypes.create_string_buffer(size) for size in program.param_sizes]
    for n, buffer in enumerate(memory):
        stand_in.keep(n, program.param_sizes[n], buffer)

    def run(*numbers: Any) -> None:
        host(*numbers)
        cluster = getattr(getattr(kind, "settings", None), "cluster", 1)
        params = [buffer.raw for buffer in memory]
        launch(program, Memory(list(_regions)), params, tuple(stand_in.launched()[:3]), cluster=cluster)

    return run


def region(x: Tensor) -> tuple[int, np.ndarray]:
    """All of a tensor's memory."""
    storage = x.untyped_storage()
    raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return storage.data_ptr(), np.frombuffer(raw, dtype=np.uint8)


@contextmanager
def backward_on_cpu(*tensors: Tensor | None, processors: int = 2) -> Iterator[list[tuple[int, np.ndarray]]]:
    """`backward_launch` on tensors of the CPU; it may touch these, those that a caller adds to the list that it is
    given (`region`), and schedules, and nothing else."""
    zero = torch.zeros(1, dtype=torch.int32)
    schedule_for = backward_launching.schedule_for

    def scheduled(*arguments: Any) -> Any:
        made = schedule_for(*arguments)
        _schedules.append(made)
        _regions.extend(region(x) for x in (made.items, made.walk, made.turns) if x is not None)
        return made

    schedules = [x for made in _schedules for x in (made.items, made.walk, getattr(made, "turns", None))]
    _regions[:] = [region(x) for x in (*tensors, zero, *schedules) if x is not None]
    with (
        patch.object(library, "load", emulated),
        patch.object(backward_launching, "current_stream", lambda device: 0),
        patch.object(backward_launching, "_processors", lambda device: processors),
        patch.object(backward_launching, "_counter", lambda device, stream: zero.data_ptr()),
        patch.object(backward_launching, "schedule_for", scheduled),
        patch.object(Tensor, "new_empty", _noted(Tensor.new_empty, torch.nan)),
        patch.object(torch, "zeros", _noted(torch.zeros, 0.0)),
    ):
        yield _regions
    assert zero.item() == 0, "the counter of tiles is left at zero"


def _noted(make: Callable[..., Tensor], value: float) -> Callable[..., Tensor]:
    """What the host code makes itself, the kernels may touch; numbers begin with that value."""

    def made(*arguments: Any, **others: Any) -> Tensor:
        x = make(*arguments, **others)
        if x.is_floating_point():
            x.fill_(value)
        _kept.append(x)
        if x.numel():
            _regions.append(region(x))
        return x

    return made


@contextmanager
def on_cpu(*tensors: Tensor | None, processors: int = 2) -> Iterator[None]:
    """`launch.forward` on tensors of the CPU; it may touch these and what it makes itself, and nothing else."""
    zero = torch.zeros(1, dtype=torch.int32)
    prepare = launching.prepare

    def prepared(*arguments: Any) -> launching.Prepared:
        made = prepare(*arguments)
        _schedules.append(made)
        _regions.extend((region(made.items), region(made.walk)))
        return made

    schedules = [x for made in _schedules for x in (made.items, made.walk)]
    _regions[:] = [region(x) for x in (*tensors, zero, *schedules) if x is not None]
    with (
        patch.object(library, "load", emulated),
        patch.object(launching, "current_stream", lambda device: 0),
        patch.object(launching, "_processors", lambda device: processors),
        patch.object(launching, "_counter", lambda device, stream: zero.data_ptr()),
        patch.object(launching, "prepare", prepared),
    ):
        yield
    assert zero.item() == 0, "the counter of tiles is left at zero"
