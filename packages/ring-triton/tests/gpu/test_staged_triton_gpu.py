"""Kernels that watch pieces come and go: late pieces change no bit, and what has departed is final."""

from __future__ import annotations

import pytest
import torch

from ring_core.backend import load_backend
from ring_core.testing.conformance import StagedCase, check_departures, check_late_arrivals, check_poison

BACKEND = "triton"
CASES = [
    StagedCase(),
    StagedCase(causal=True, head_dim=64, dtype=torch.float16),
    StagedCase(layout="zigzag", causal=True, world_size=2, rank=1),
    StagedCase(layout="zigzag", causal=True, rank=0),
    StagedCase(layout="stripe", causal=True, head_dim=64, rank=2),
    StagedCase(length=4000, layout="stripe", head_dim=256, heads=(6, 2), rank=1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_late_pieces(case: StagedCase, seed: int) -> None:
    case.skip_unless_staged(BACKEND, backward=False)
    check_late_arrivals(load_backend(BACKEND), case, case.orders, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_poison_ends_waiting(case: StagedCase, seed: int) -> None:
    case.skip_unless_staged(BACKEND, backward=False)
    check_poison(load_backend(BACKEND), case, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_departs_is_final(case: StagedCase, repeatable: bool, seed: int) -> None:
    case.skip_unless_staged(BACKEND, backward=True)
    last_first = list(range(case.plan.piece_count))[::-1]
    check_departures(load_backend(BACKEND), case, last_first, repeatable=repeatable, seed=seed)


@pytest.mark.gpu
def test_pieces_depart_while_others_are_computed(seed: int) -> None:
    case = StagedCase(length=32768, heads=(16, 4))
    case.skip_unless_staged(BACKEND, backward=True)
    early = check_departures(load_backend(BACKEND), case, repeatable=False, seed=seed).early
    assert max(early) > 0.2, f"pieces left {early} ms before the end of the kernel"
