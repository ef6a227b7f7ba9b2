"""Tuning with a clock that is made up: what is tried, kept, and taken by whom. In the interpreter; Hopper's by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

import ring_triton
from ring_core import ring_attention
from ring_core.backend import Params, on_device
from ring_core.plan import Problem, make_plan
from ring_triton import TritonBackend, backend, tuned, tuning
from ring_triton.hopper.settings import settings_for
from ring_triton.portable import launch
from ring_triton.portable.settings import INTERPRETED, INTERPRETER, Setting

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1")
CALL: dict[str, Any] = {"length": 40, "heads": (2, 1), "dtype": torch.float32, "device": "cpu"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of its own, and nobody has asked for tuned settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned._State, "asked_for", False)
    tuned._read.cache_clear()
    yield tmp_path
    tuned._State.serial += 1


def clock(times: Callable[[tuned.Place, dict[str, Any]], float]) -> tuning.Timer:
    def timer(run: Callable[[], None]) -> float:
        assert tuned._State.tried is not None
        return times(*tuned._State.tried)

    return timer


def far_from_one(place: tuned.Place, setting: dict[str, Any]) -> float:
    """How far from 64 rows, 32 keys, 8 warps, one stage."""
    return 1.0 + abs(setting["rows"] - 64) + abs(setting["keys"] - 32) + (setting["warps"] != 8) + setting["stages"]


def test_the_fastest_is_kept_and_taken(own_cache: Path) -> None:
    results = ring_triton.tune(16, timer=clock(far_from_one), **CALL)
    kernels = [result.place.kernel for result in results]
    assert kernels == ["portable forward", "portable gradients_kv", "portable gradients_q"]
    for result in results:
        assert (result.place.width, result.place.mask, result.place.bits) == (16, "banded", 32)
        assert Setting(**result.setting) == Setting(64, 32, 8, 1)
        assert result.milliseconds == 2.0 and result.before == 1.0 + 32 + 16 + 1 + INTERPRETER.stages
        assert result.tried > 30
    assert tuned.cache_file() == own_cache / "ring-triton" / "tuned.json"
    rows = json.loads(tuned.cache_file().read_text())
    assert len(rows) == 3 and all("head dim 16, banded, 32 bits" in name for name in rows)
    assert not list(tuned.cache_file().parent.glob("tmp*")), "written whole"


def shape_of(causal: bool, head_dim: int = 16) -> tuple[int, int]:
    """Rows and keys of the tile that a forward would be launched with."""
    problem = Problem(40, 40, 40, 40, None, 0 if causal else None, "contiguous", 1)
    q = torch.zeros(1, 40, 2, head_dim)
    table = on_device(make_plan(problem, 0, "gather").steps[0].forward, q.device)
    shape = launch._shape("forward", table, q, q, q)
    return shape["ROWS"], shape["KEYS"]


def test_only_who_asks_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = INTERPRETER.rows, INTERPRETER.keys
    before = tuned.serial()
    ring_triton.tune(16, timer=clock(far_from_one), **CALL)
    assert tuned.serial() > before, "launches that are remembered are those of the old settings"
    assert shape_of(causal=True) == (64, 32)
    assert shape_of(causal=False) == shape_of(causal=True, head_dim=64) == table, "another kind of call"
    monkeypatch.setattr(tuned._State, "asked_for", False)
    assert shape_of(causal=True) == table
    tuned.ask_for()  # as RING_TRITON_TUNE=1 does
    assert shape_of(causal=True) == (64, 32)


def test_results_do_not_change(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 40, heads, 16, requires_grad=True) for heads in (2, 1, 1))

    def run() -> list[torch.Tensor]:
        out = ring_attention(q, k, v, causal=True, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    before = run()
    ring_triton.tune(16, timer=clock(far_from_one), **CALL)
    for a, b in zip(run(), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_left_out() -> None:
    def small_gpu(place: tuned.Place, setting: dict[str, Any]) -> float:
        if setting["rows"] > 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return float(setting["keys"])

    for result in ring_triton.tune(16, timer=clock(small_gpu), **CALL):
        assert result.setting["rows"] == 32 and result.setting["keys"] == INTERPRETER.keys


def test_a_file_that_is_no_such_file() -> None:
    tuned.cache_file().parent.mkdir(parents=True)
    for content in ("{", "[]", '{"a": 1}', '{"a": {"setting": 3}}'):
        tuned.cache_file().write_text(content)
        with pytest.raises(ValueError, match=r"tuned\.json does not hold settings of ring_triton\.tune"):
            tuned.load(tuned.cache_file())


def test_kernels_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_no_hopper", lambda device: "")
    backend._fastest.cache_clear()
    found = {}
    for head_dim in (64, 192):
        q = torch.zeros(1, 8, 2, head_dim, dtype=torch.bfloat16)
        found[head_dim] = [place for place, _ in tuning._places(TritonBackend("hopper"), q, Params(0.1), "full")]
    backend._fastest.cache_clear()
    assert [(place.kernel, place.width) for place in found[64]] == [("hopper forward", 64), ("hopper backward", 64)]
    kernels = ["hopper forward", "portable gradients_kv", "portable gradients_q"]
    assert [(place.kernel, place.width) for place in found[192]] == [(kernel, 256) for kernel in kernels]


def test_candidates_begin_with_the_table() -> None:
    found = tuning.candidates("hopper forward", settings_for(128))
    assert found[0] == settings_for(128) and len(set(found)) == len(found) > 10
    assert all(setting.block in (64, 128) for setting in found)
