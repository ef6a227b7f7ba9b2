"""The contract, on torch's CPU kernel and on a stand-in for flash-attn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ring_core.backend import load_backend
from ring_core.testing.conformance import (
    KernelCase,
    RingCase,
    check_kernel_case,
    check_ring_case,
    kernel_cases,
    ring_cases,
    run_ring_case,
)

NATIVE = "native"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend(NATIVE), seed=seed)


@pytest.mark.parametrize("case", ring_cases(through=("collectives", "shared_memory")), ids=str)
def test_ring(case: RingCase, ranks: Any, seed: int) -> None:
    check_ring_case(case, NATIVE, ranks(case.world_size, run_ring_case, case, NATIVE, seed), seed)
