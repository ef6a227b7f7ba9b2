"""What the DSL calls differently from release to release (4.7, 4.8), under one name each."""

from __future__ import annotations

try:
    from cutlass.memory import SmemAllocator
    from cutlass.tensor_utils import LayoutEnum
except ImportError:  # 4.7
    from cutlass.utils import LayoutEnum, SmemAllocator

__all__ = ["LayoutEnum", "SmemAllocator"]
