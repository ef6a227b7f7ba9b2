"""The portable kernels in the interpreter on cases that hypothesis draws, and every head dim there is room for."""

from __future__ import annotations

from dataclasses import replace

import fast_interpreter
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ring_core.backend import load_backend
from ring_core.testing.conformance import KernelCase, check_kernel_case, random_kernel_cases
from ring_triton.portable.settings import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1; on a GPU, tests/gpu draw such cases"),
    # numpy says it of scores that the mask takes out after.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    # Triton 3.6's interpreter does it, which is why it needs numpy older than 2.4.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

fast_interpreter.install()


@given(case=random_kernel_cases(head_dims=(8, 16, 40, 64)), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_case(case: KernelCase, seed: int) -> None:
    check_kernel_case(replace(case, batch=1 if not case.per_entry else case.batch), load_backend("triton"), seed=seed)


@pytest.mark.parametrize("head_dim", [8, 40, 80, 112, 160])
def test_head_dim(head_dim: int, seed: int) -> None:
    case = KernelCase(name=f"dim {head_dim}", head_dim=head_dim, q_length=50, k_length=70, causal=True, batch=1)
    check_kernel_case(case, load_backend("triton"), seed=seed)
