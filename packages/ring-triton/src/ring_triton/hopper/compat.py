"""What Gluon calls differently from release to release (3.6, 3.7, 3.9) or lacks in older ones, under one name each."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma_init
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""(descriptor, coordinates, mbarrier, shared memory): 3.9 renamed it."""

tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
"""(descriptor, coordinates, shared memory): 3.9 renamed it."""

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""(): all threads of the partition; 3.7 renamed it."""


@builtin  # type: ignore[untyped-decorator]
def _reduce_add(descriptor: Any, coordinates: Any, source: Any, _semantic: Any = None) -> None:
    """Adds a tile in shared memory to global memory by TMA: 3.6 and 3.7 build the operation but have no name for it."""
    at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, at, source.handle)


tma_reduce_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _reduce_add
"""(descriptor, coordinates, shared memory): completes as a TMA store does."""

__all__ = ["TensorDescriptor", "thread_barrier", "tma_load", "tma_reduce_add", "tma_store", "warpgroup_mma_init"]
