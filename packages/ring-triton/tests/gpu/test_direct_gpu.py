"""Launches by the driver alone give what launches by Triton give: other tensors, other streams, other threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core import direct
from ring_core.backend import Params, on_device
from ring_core.plan import Problem, make_plan
from ring_triton import PATHS, TritonBackend

SHAPE = (2, 300, 6, 128)  # of q; half as many key heads


def passes(path: str, seed: int, *, sinks: bool = False, final: bool = False) -> list[Tensor]:
    """out, lse, dq, dk, dv of a causal call whose inputs follow from the seed; final: dk and dv in their dtype."""
    device = torch.device("cuda", torch.cuda.current_device())
    backend = TritonBackend(path)
    generator = torch.Generator(device).manual_seed(seed)
    batch, length, heads, dim = SHAPE

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    q, dout, out = random(*SHAPE), random(*SHAPE), torch.empty(SHAPE, dtype=torch.bfloat16, device=device)
    k, v = (random(1, batch, length, heads // 2, dim) for _ in range(2))
    lse = torch.empty(batch, heads, length, device=device)
    params = Params(0.1, sinks=torch.arange(heads, device=device).float() if sinks else None, deterministic=True)
    step = make_plan(Problem(length, length, length, length, None, 0, "contiguous", 1), 0, "gather").steps[0]
    tables = on_device(step.forward, device), on_device(step.backward, device)
    backend.forward(q, k, v, out, lse, None, tables[0], params=params)
    dk, dv = torch.zeros(2, *k.shape, device=device, dtype=k.dtype if final else torch.float32)
    state: Any = backend.prepare(q, k.shape[1:], out, dout, lse, None, params=params)
    backend.backward(state, q, k, v, dout, dk, dv, tables[1], params=params)
    dq, _ = backend.finish(state, params=params)
    return [out, lse, dq, dk, dv]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many launches went to the driver directly."""
    calls = [0]
    launch = direct.Launch.__call__

    def counting(self: Any, *arguments: Any) -> None:
        calls[0] += 1
        launch(self, *arguments)

    monkeypatch.setattr(direct.Launch, "__call__", counting)
    return calls


def available(path: str) -> None:
    can = TritonBackend(path).capabilities(torch.device("cuda"))
    if not can.available:
        pytest.skip(can.reason)


@pytest.mark.gpu
@pytest.mark.parametrize(("sinks", "final"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits(
    path: str, sinks: bool, final: bool, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    available(path)
    with monkeypatch.context() as patch:  # by Triton alone
        patch.setattr(direct.Launches, "get", lambda self, key: None)
        want = {seed: passes(path, seed, sinks=sinks, final=final) for seed in (1, 2)}
    assert not counted[0]
    passes(path, 1, sinks=sinks, final=final)
    before = counted[0]
    kept = []
    for seed in (2, 1, 2):
        found = passes(path, seed, sinks=sinks, final=final)
        kept.append(found)  # so that each call's tensors lie elsewhere
        assert all(torch.equal(a, b) for a, b in zip(found, want[seed], strict=True))
    assert counted[0] - before >= 3 * 4, "forward, prepare, two or three of the backward"


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_other_streams_and_threads(path: str, counted: list[int]) -> None:
    available(path)
    want = passes(path, 3)
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []

    def elsewhere() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.extend(passes(path, 3) for _ in range(3))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=elsewhere) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9 and counted[0] > 0
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
