"""What the workspace's tests share: ranks, the float64 oracle, error measures. For tests: nothing here is stable."""

from ring_core.testing.measure import (
    INPUT_KINDS,
    Errors,
    InputKind,
    Inputs,
    Tolerance,
    assert_close_to_oracle,
    baseline,
    baseline_errors,
    compare,
    make_inputs,
    tolerances,
)
from ring_core.testing.oracle import OracleResult, attention_oracle, philox4x32
from ring_core.testing.pool import RankDied, RankError, RankFailure, RankTimeout, WorkerPool, close_pools, get_pool
from ring_core.testing.worker import report

__all__ = [
    "INPUT_KINDS",
    "Errors",
    "InputKind",
    "Inputs",
    "OracleResult",
    "RankDied",
    "RankError",
    "RankFailure",
    "RankTimeout",
    "Tolerance",
    "WorkerPool",
    "assert_close_to_oracle",
    "attention_oracle",
    "baseline",
    "baseline_errors",
    "close_pools",
    "compare",
    "get_pool",
    "make_inputs",
    "philox4x32",
    "report",
    "tolerances",
]
