"""The contract on GPUs, compiled: every kernel case in two sizes, and rings and packed documents over NCCL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

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
    packed_cases,
    ring_cases,
    run_packed_case,
    run_ring_case,
)
from ring_core.testing.plugin import RunRanks
from ring_triton import PATHS

NAMES = tuple(f"triton[{path}]" for path in PATHS)
"""Of each path by itself: what one cannot do, it must refuse by name."""
SCALE = 31
"""Lengths of about 2,000 tokens, multiples of nothing."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel_of_few_tokens(case: KernelCase, name: str, seed: int) -> None:
    """Blocks smaller than any tile, of one row, of one key."""
    check_kernel_case(case, load_backend(name), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", kernel_cases(scale=SCALE), ids=str)
def test_kernel(case: KernelCase, name: str, dtype: torch.dtype | None, seed: int) -> None:
    """Where the case leaves the dtype open: in those of the tensor cores, and in fp32."""
    if case.dtype is not None and dtype is not None:
        pytest.skip("the case has a dtype of its own")
    check_kernel_case(replace(case, dtype=case.dtype or dtype), load_backend(name), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_dim(head_dim: int, dtype: torch.dtype, seed: int) -> None:
    (case,) = (case for case in kernel_cases(scale=SCALE) if case.name == "causal-contiguous-ring-3")
    case = replace(case, name=f"dim {head_dim}", head_dim=head_dim, dtype=dtype, batch=1)
    check_kernel_case(case, load_backend("triton"), "cuda", seed=seed)


def rings() -> list[object]:
    """In the dtype of the case; where it leaves that open in bf16, and through collectives also in fp32, which takes
    the portable kernels."""
    found = []
    for case in ring_cases(scale=SCALE, through=("collectives", "peer_memory")):
        dtypes = [torch.bfloat16, torch.float32] if case.through == "collectives" else [torch.bfloat16]
        for dtype in dtypes if case.dtype is None else [case.dtype]:
            marks = pytest.mark.multi_gpu(case.world_size)
            name = str(dtype).removeprefix("torch.")
            found.append(pytest.param(replace(case, dtype=dtype), marks=marks, id=f"{case}-in-{name}"))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured(name: str, seed: int) -> None:
    check_capture(name, seed=seed)


@pytest.mark.parametrize("case", rings())
def test_ring(case: RingCase, ranks: RunRanks, seed: int) -> None:
    results: list[Any] = ranks(case.world_size, run_ring_case, case, "triton", seed, "cuda")
    check_ring_case(case, "triton", results, seed, "cuda")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.multi_gpu(case.world_size), id=str(case)) for case in packed_cases()],
)
def test_packed(case: PackedCase, ranks: RunRanks, seed: int) -> None:
    results: list[Any] = ranks(case.world_size, run_packed_case, case, "triton", seed, "cuda")
    check_packed_case(case, "triton", results, seed, "cuda")
