"""What the DSL calls differently from release to release (4.7, 4.8), under one name each."""

from __future__ import annotations

try:
    from cutlass.memory import SmemAllocator
except ImportError:  # 4.7
    from cutlass.utils import SmemAllocator

__all__ = ["SmemAllocator"]
