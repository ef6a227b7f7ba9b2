"""The contract, in Triton's interpreter: every kernel case, and a share of the ring and packed cases, whose kernels the
others have shown. All of them run on GPUs (tests/gpu)."""

from __future__ import annotations

from typing import Any

import fast_interpreter
import pytest
from interpreted import run_packed_case, run_ring_case, small

from ring_core.backend import load_backend
from ring_core.testing.conformance import (
    KernelCase,
    PackedCase,
    RingCase,
    check_kernel_case,
    check_packed_case,
    check_ring_case,
    kernel_cases,
    packed_cases,
    ring_cases,
)
from ring_triton.portable.settings import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1; on a GPU, tests/gpu run these cases compiled"),
    # numpy says it of scores that the mask takes out after.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    # Triton 3.6's interpreter does it, which is why it needs numpy older than 2.4.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

fast_interpreter.install()

RINGS = [case for number, case in enumerate(ring_cases((1, 2))) if number % 5 == 0]
PACKED = [case for number, case in enumerate(packed_cases((1, 2))) if number % 5 == 0]


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(small(case), load_backend("triton"), seed=seed)


@pytest.mark.parametrize("case", RINGS, ids=str)
def test_ring(case: RingCase, ranks: Any, seed: int) -> None:
    case = small(case)
    check_ring_case(case, "triton", ranks(case.world_size, run_ring_case, case, seed), seed)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed(case: PackedCase, ranks: Any, seed: int) -> None:
    case = small(case)
    check_packed_case(case, "triton", ranks(case.world_size, run_packed_case, case, seed), seed)
