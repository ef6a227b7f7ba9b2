"""Cases that hypothesis draws. Head dims and dtypes are few: each is another compilation."""

from __future__ import annotations

from dataclasses import replace

import cute_gpu_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_core.backend import load_backend
from ring_core.testing.conformance import KernelCase, check_kernel_case, random_kernel_cases


@pytest.mark.gpu
def test_random_case() -> None:
    backend = load_backend("cute")

    @given(
        case=random_kernel_cases(head_dims=cases.PROPERTY_HEAD_DIMS, longest=700),
        dtype=st.sampled_from(cases.DTYPES),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=100, deadline=None, database=None)
    def check(case: KernelCase, dtype: torch.dtype, seed: int) -> None:
        check_kernel_case(replace(case, dtype=dtype), backend, "cuda", seed=seed)

    check()
