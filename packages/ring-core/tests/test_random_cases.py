"""The reference backend on cases that hypothesis draws: what every kernel is held to."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ring_core.backend import load_backend
from ring_core.testing.conformance import KernelCase, check_kernel_case, random_kernel_cases


@given(case=random_kernel_cases(head_dims=(8, 16, 24)), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_random_case(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend("reference"), seed=seed)
