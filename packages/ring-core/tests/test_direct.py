"""Kernels called directly: the reference passes, and what is wrong with others is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core.backend import Params
from ring_core.reference import ReferenceBackend
from ring_core.testing.direct import (
    BackwardCase,
    ForwardCase,
    Functions,
    backward_plans,
    causal_keys,
    causal_steps,
    causal_table,
    forward_plans,
    key_batches,
    key_steps,
    own_batches,
    random_keys,
    random_queries,
    run_backward,
    run_forward,
    short_strips,
)

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend()


def forward(*given: Any, params: Params, settings: Any) -> None:
    REFERENCE.forward(*given, params=params)


def prepare(q: Tensor, *tensors: Tensor, params: Params) -> Any:
    return REFERENCE.prepare(q, q.shape, *tensors, params=params)


def backward(*given: Any, params: Params, departures: Tensor | None, settings: Any) -> None:
    REFERENCE.backward(*given, params=params, departures=departures)


FUNCTIONS = Functions(prepare, backward, REFERENCE.finish)
FORWARD = [
    ForwardCase("four steps", causal_steps(200, (3, 2, 1, 0)), 200, dim=16, sinks=True),
    ForwardCase("short strips", short_strips(), 700, dim=16),
    ForwardCase("own batch entries", [own_batches()], 256, dim=16, batch=2),
    random_queries(3, dim=16),
    *list(forward_plans(dim=16))[::11],
]
BACKWARD = [
    key_steps(16, departures=True),
    key_batches(16),
    random_keys(3, 16),
    BackwardCase("sinks", [causal_keys(100, 120, causal=True, offset=20)], 100, dim=16, sinks=True, dlse=True),
    BackwardCase("final", [causal_keys(64, 96)], 64, dim=16, final=True, piece_length=100, repeat=2),
    *list(backward_plans(16))[::11],
]


@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.name)
def test_the_reference_passes_forward(case: ForwardCase) -> None:
    message, fine = run_forward(case, forward, CPU)
    assert fine, message


@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.name)
def test_the_reference_passes_backward(case: BackwardCase) -> None:
    message, fine = run_backward(case, FUNCTIONS, CPU)
    assert fine, message


OWN = ForwardCase("", [own_batches()], 256, dim=16, batch=2)
SOME_EMPTY = ForwardCase("", [causal_table(40, 9, causal=True, k_position=20)], 40, dim=16)


@pytest.mark.parametrize("wrong", ["value", "lse", "untouched", "empty"])
def test_what_is_wrong_forward(wrong: str) -> None:
    def mistaken(*given: Any, **others: Any) -> None:
        forward(*given, **others)
        out, lse = given[3], given[4]
        if wrong == "value":
            out[:, 3] *= 2
        elif wrong == "lse":
            lse[:, 1, 70] += 0.01
        elif wrong == "untouched":
            out[1, 10] = 0.0  # of the entry that has no such row
        else:
            out[lse.transpose(1, 2) == -torch.inf] = 1e-3

    message, fine = run_forward(SOME_EMPTY if wrong == "empty" else OWN, mistaken, CPU)
    assert not fine
    assert "wrong rows" in message


@pytest.mark.parametrize("wrong", ["dq", "dk", "elsewhere", "departures", "bits"])
def test_what_is_wrong_backward(wrong: str) -> None:
    calls = 0

    def mistaken(*given: Any, params: Params, departures: Tensor | None, settings: Any) -> None:
        nonlocal calls
        calls += 1
        backward(*given, params=params, departures=departures, settings=settings)
        dk, dv = given[5], given[6]
        if wrong == "dk":
            dk[0, :, 5] *= 2.0
        elif wrong == "elsewhere":
            dv[0, :, -1] = 0.0
        elif wrong == "departures" and departures is not None:
            departures[0] += 1
        elif wrong == "bits":
            dk[0, :, 5] *= 1 + 1e-6 * calls

    def finish(state: Any, *, params: Params) -> tuple[Tensor, Tensor | None]:
        dq, dsinks = REFERENCE.finish(state, params=params)
        return (dq * 1.1 if wrong == "dq" else dq), dsinks

    case = BackwardCase("", [causal_keys(64, 96)], 64, dim=16, piece_length=100, departures=True, repeat=2)
    message, fine = run_backward(case, Functions(prepare, mistaken, finish), CPU)
    assert not fine
    told = {"elsewhere": "outside every segment", "departures": "departures", "bits": "same bits"}
    assert told.get(wrong, "wrong rows") in message
