"""What every backend must pass: the contract of `ring_core.backend.Backend`, as cases that are data.

A backend's test file:

    from ring_core import load_backend
    from ring_core.testing.conformance import (
        check_kernel_case, check_packed_case, check_ring_case, kernel_cases, packed_cases, ring_cases, run_packed_case,
        run_ring_case
    )

    @pytest.mark.parametrize("case", kernel_cases(), ids=str)
    def test_kernel(case, seed):
        check_kernel_case(case, load_backend("triton"), "cpu", seed=seed)

    @pytest.mark.parametrize("case", ring_cases([2, 4]), ids=str)
    def test_ring(case, ranks, seed):
        check_ring_case(case, "triton", ranks(case.world_size, run_ring_case, case, "triton", seed), seed)

    @pytest.mark.parametrize("case", packed_cases([2, 4]), ids=str)
    def test_packed(case, ranks, seed):
        check_packed_case(case, "triton", ranks(case.world_size, run_packed_case, case, "triton", seed), seed)

*Kernel level*: one process drives the backend with the tables of simulated ranks and with hand-made ones; what the
contract says is not read holds NaN, what it says is not written is compared bit by bit. *Ring level*: ranks of a pool
go through `ring_attention` or `ring_attention_packed`. Results are judged against the float64 oracle, by the error that
torch's own attention makes in the same dtype. A case that the backend's Capabilities rule out is not run; the operator
must then refuse it by name, and that is what is checked. *Random*: `random_kernel_cases`, a strategy of hypothesis.
*Staged*, on GPUs: pieces come late
(`check_late_arrivals`), never (`check_poison`) and leave early (`check_departures`), for backends whose kernels watch
them. *Captured*, on GPUs: CUDA graphs give what the calls in them give (`check_capture`).
"""

from ring_core.testing.conformance.capture import check_capture
from ring_core.testing.conformance.case import AttentionCase, check_refused
from ring_core.testing.conformance.kernel import KernelCase, check_kernel_case, check_late_piece
from ring_core.testing.conformance.kernel_cases import kernel_cases
from ring_core.testing.conformance.packed import PackedCase, check_packed_case, packed_cases, run_packed_case
from ring_core.testing.conformance.random_cases import random_kernel_cases
from ring_core.testing.conformance.ring import RingCase, check_ring_case, ring_cases, run_ring_case
from ring_core.testing.conformance.staged import (
    StagedCase,
    check_departures,
    check_late_arrivals,
    check_poison,
)

__all__ = [
    "AttentionCase",
    "KernelCase",
    "PackedCase",
    "RingCase",
    "StagedCase",
    "check_capture",
    "check_departures",
    "check_kernel_case",
    "check_late_arrivals",
    "check_late_piece",
    "check_packed_case",
    "check_poison",
    "check_refused",
    "check_ring_case",
    "kernel_cases",
    "packed_cases",
    "random_kernel_cases",
    "ring_cases",
    "run_packed_case",
    "run_ring_case",
]
