"""What Gluon calls differently from release to release (3.6, 3.7, 3.9), under one name each."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""(descriptor, coordinates, mbarrier, shared memory): 3.9 renamed it."""

__all__ = ["TensorDescriptor", "tma_load"]
