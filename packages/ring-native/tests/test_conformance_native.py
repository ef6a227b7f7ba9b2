"""The contract, on torch's CPU kernel and on stand-ins for the kernels that need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from native_fakes import FAKES, run_packed_case, run_ring_case

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

NATIVE = "native"
STAND_INS = [f"native[fake-{name}]" for name in FAKES]


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend(NATIVE), seed=seed)


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
@pytest.mark.parametrize("backend", STAND_INS)
def test_kernel_of_a_stand_in(case: KernelCase, backend: str, seed: int) -> None:
    check_kernel_case(case, load_backend(backend), seed=seed)


@pytest.mark.parametrize("case", ring_cases((1, 2, 4), through=("collectives", "shared_memory")), ids=str)
def test_ring(case: RingCase, ranks: Any, seed: int) -> None:
    check_ring_case(case, NATIVE, ranks(case.world_size, run_ring_case, case, NATIVE, seed), seed)


@pytest.mark.parametrize("case", ring_cases((2, 4)), ids=str)
def test_ring_of_a_stand_in(case: RingCase, ranks: Any, seed: int) -> None:
    """By turns, as the kernel cases have shown each by itself."""
    backend = STAND_INS[sum(map(ord, case.name)) % len(STAND_INS)]
    check_ring_case(case, backend, ranks(case.world_size, run_ring_case, case, backend, seed), seed)


@pytest.mark.parametrize("case", packed_cases(through=("collectives", "shared_memory")), ids=str)
def test_packed(case: PackedCase, ranks: Any, seed: int) -> None:
    check_packed_case(case, NATIVE, ranks(case.world_size, run_packed_case, case, NATIVE, seed), seed)


@pytest.mark.parametrize("case", packed_cases((2, 4)), ids=str)
def test_packed_on_a_stand_in(case: PackedCase, ranks: Any, seed: int) -> None:
    backend = STAND_INS[sum(map(ord, case.name)) % len(STAND_INS)]
    check_packed_case(case, backend, ranks(case.world_size, run_packed_case, case, backend, seed), seed)
