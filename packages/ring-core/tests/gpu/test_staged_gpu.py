"""What the checks for staged backends say of the reference backend: it waits on the host and counts in its stream."""

from __future__ import annotations

import pytest
import torch

from ring_core.backend import load_backend
from ring_core.testing.conformance import StagedCase, check_departures, check_late_arrivals, check_poison

CASES = [
    StagedCase(length=252, heads=(4, 2), head_dim=16, world_size=3, rank=2, dtype=torch.float32),
    StagedCase(length=256, heads=(4, 2), head_dim=16, world_size=2, rank=1, layout="zigzag", causal=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_late_pieces(case: StagedCase, seed: int) -> None:
    check_late_arrivals(load_backend("reference"), case, case.orders, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_departs_is_final(case: StagedCase, seed: int) -> None:
    check_departures(load_backend("reference"), case, list(range(case.plan.piece_count))[::-1], seed=seed)


@pytest.mark.gpu
def test_poison_ends_waiting(seed: int) -> None:
    check_poison(load_backend("reference"), CASES[0], seed=seed)
