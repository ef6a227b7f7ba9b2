"""The contract on GPUs: every kernel case in two sizes, and rings and packed documents over NCCL and peer memory."""

from __future__ import annotations

from typing import Any

import cute_gpu_cases as cases
import pytest

from ring_core import load_backend
from ring_core.testing.conformance import (
    KernelCase,
    PackedCase,
    RingCase,
    check_capture,
    check_kernel_case,
    check_packed_case,
    check_ring_case,
    kernel_cases,
    run_packed_case,
    run_ring_case,
)
from ring_core.testing.plugin import RunRanks


@pytest.mark.gpu
@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel_of_few_tokens(case: KernelCase, seed: int) -> None:
    """Blocks smaller than any tile, of one row, of one key."""
    check_kernel_case(case, load_backend("cute"), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.kernels(), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend("cute"), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.head_dims(), ids=str)
def test_head_dim(case: KernelCase, seed: int) -> None:
    """With gradients where there are such kernels, else forward, and gradients are refused."""
    check_kernel_case(case, load_backend("cute"), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.shaped(), ids=str)
def test_shaped_scores(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend("cute"), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.wide(), ids=str)
def test_wide_heads(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend("cute"), "cuda", seed=seed)


@pytest.mark.gpu
def test_captured(seed: int) -> None:
    check_capture("cute", seed=seed)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.multi_gpu(case.world_size), id=str(case)) for case in cases.rings()],
)
def test_ring(case: RingCase, ranks: RunRanks, seed: int) -> None:
    results: list[Any] = ranks(case.world_size, run_ring_case, case, "cute", seed, "cuda")
    check_ring_case(case, "cute", results, seed, "cuda")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.multi_gpu(case.world_size), id=str(case)) for case in cases.packed()],
)
def test_packed(case: PackedCase, ranks: RunRanks, seed: int) -> None:
    results: list[Any] = ranks(case.world_size, run_packed_case, case, "cute", seed, "cuda")
    check_packed_case(case, "cute", results, seed, "cuda")
