"""The reference backend and the NCCL transports, where there are GPUs: `pytest packages/ring-core/tests/gpu`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

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
    run_packed_case,
    run_ring_case,
)
from ring_core.testing.plugin import RunRanks

REFERENCE = "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("case", kernel_cases(scale=3), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend(REFERENCE), "cuda", seed=seed)


def by_world_size(cases: Sequence[RingCase | PackedCase]) -> list[object]:
    """Each case under the marker that says how many GPUs it needs."""
    return [pytest.param(case, marks=pytest.mark.multi_gpu(case.world_size), id=str(case)) for case in cases]


@pytest.mark.parametrize("case", by_world_size(packed_cases((1, 2, 4), scale=3)))
def test_packed(case: PackedCase, ranks: RunRanks, seed: int) -> None:
    results = ranks(case.world_size, run_packed_case, case, REFERENCE, seed, "cuda")
    check_packed_case(case, REFERENCE, results, seed)


@pytest.mark.parametrize("case", by_world_size(ring_cases((1, 2, 4), scale=3)))
def test_ring(case: RingCase, ranks: RunRanks, seed: int) -> None:
    results = ranks(case.world_size, run_ring_case, case, REFERENCE, seed, "cuda")
    check_ring_case(case, REFERENCE, results, seed)
