"""Kernels that watch pieces come and go: late pieces change no bit, and what has departed is final."""

from __future__ import annotations

import pytest
from cute_gpu_cases import LONG_STAGED, STAGED

from ring_core.backend import load_backend
from ring_core.testing.conformance import StagedCase, check_departures, check_late_arrivals, check_poison

BACKEND = "cute"


@pytest.mark.gpu
@pytest.mark.parametrize("case", STAGED, ids=str)
def test_late_pieces(case: StagedCase, seed: int) -> None:
    case.skip_unless_staged(BACKEND, backward=False)
    check_late_arrivals(load_backend(BACKEND), case, case.orders, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", STAGED, ids=str)
def test_poison_ends_waiting(case: StagedCase, seed: int) -> None:
    case.skip_unless_staged(BACKEND, backward=False)
    check_poison(load_backend(BACKEND), case, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", STAGED, ids=str)
def test_what_departs_is_final(case: StagedCase, seed: int) -> None:
    case.skip_unless_staged(BACKEND, backward=True)
    last_first = list(range(case.plan.piece_count))[::-1]
    check_departures(load_backend(BACKEND), case, last_first, repeatable=False, seed=seed)


@pytest.mark.gpu
def test_pieces_depart_while_others_are_computed(seed: int) -> None:
    case = LONG_STAGED
    case.skip_unless_staged(BACKEND, backward=True)
    early = check_departures(load_backend(BACKEND), case, repeatable=False, seed=seed).early
    assert max(early) > 0.2, f"pieces left {early} ms before the end of the kernel"
