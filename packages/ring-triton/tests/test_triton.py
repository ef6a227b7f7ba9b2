"""What the conformance suite does not see: names, the example, work lists, what is said where nothing runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import ring_triton
from ring_core.backend import FEATURES, Dropout, Params, UnsupportedError, on_device, takes_flags
from ring_core.plan import Problem, make_plan
from ring_core.segment import FIRST, LAST, Table, count_pairs
from ring_triton import PATHS, TritonBackend, backend
from ring_triton.portable.settings import INTERPRETED, width_of
from ring_triton.portable.work import query_work, strip_work

README = Path(__file__).parents[1] / "README.md"
CPU = torch.device("cpu")


def test_the_family_has_the_prefix() -> None:
    functions = [name for name in ring_triton.__all__ if name.endswith("_func")]
    assert len(functions) == 21
    assert all(name.startswith("triton_") and getattr(ring_triton, name).__name__ == name for name in functions)


def test_paths_by_name() -> None:
    assert TritonBackend().name == "triton"
    assert [TritonBackend(path).name for path in PATHS] == [f"triton[{path}]" for path in PATHS]
    with pytest.raises(ValueError, match="no such path"):
        TritonBackend("ampere")


@pytest.fixture
def hopper_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if every device had compute capability 9.0."""
    monkeypatch.setattr(backend, "_no_hopper", lambda device: "")
    monkeypatch.setattr(backend, "_missing", lambda device: "")
    backend._fastest.cache_clear()
    yield
    backend._fastest.cache_clear()


HALF = torch.zeros(1, 8, 4, 64, dtype=torch.bfloat16)
SLOPES = torch.zeros(4)
OTHERS = {
    "softcap": (HALF, Params(0.1, softcap=5.0)),
    "ALiBi": (HALF, Params(0.1, alibi_slopes=SLOPES)),
    "dropout": (HALF, Params(0.1, dropout=Dropout(0.1, SLOPES))),
    "scale is -0.1": (HALF, Params(-0.1)),
    "torch.float32": (HALF.float(), Params(0.1)),
    "head dim is 320": (torch.zeros(1, 8, 4, 320, dtype=torch.bfloat16), Params(0.1)),
}


@pytest.mark.usefixtures("hopper_here")
def test_the_fastest_path_that_can() -> None:
    plain = Params(0.1, sinks=SLOPES, deterministic=True)
    assert TritonBackend().path_of("forward", HALF, plain) == "hopper"
    assert TritonBackend("hopper").path_of("forward", HALF, plain) == "hopper"
    assert TritonBackend("portable").path_of("forward", HALF, plain) == "portable"
    for direction in ("forward", "backward"):
        for head_dim in (64, 128, 192):
            q = torch.zeros(1, 8, 4, head_dim, dtype=torch.bfloat16)
            wanted = "hopper" if head_dim <= 128 or direction == "forward" else "portable"
            assert TritonBackend("hopper").path_of(direction, q, plain) == wanted
            assert TritonBackend().path_of(direction, q, plain) == wanted
            dout = None if direction == "forward" else q
            for path in ("hopper", None):
                assert takes_flags(TritonBackend(path), q, dout, plain) == (wanted == "hopper"), "waits in the kernel"
    assert not takes_flags(TritonBackend("portable"), HALF, None, plain)


@pytest.mark.usefixtures("hopper_here")
@pytest.mark.parametrize("reason", OTHERS)
def test_what_hopper_kernels_do_not_take(reason: str) -> None:
    q, params = OTHERS[reason]
    assert TritonBackend().path_of("forward", q, params) == "portable"
    assert not takes_flags(TritonBackend(), q, None, params)
    with pytest.raises(UnsupportedError, match=rf"triton\[hopper\].*{reason}.*'triton' and 'triton\[portable\]'"):
        TritonBackend("hopper").path_of("forward", q, params)


@pytest.mark.usefixtures("hopper_here")
def test_capabilities_of_the_paths() -> None:
    any_path, hopper, portable = (TritonBackend(path).capabilities(CPU) for path in (None, "hopper", "portable"))
    assert any_path.features == portable.features == frozenset(FEATURES)
    assert hopper.features == any_path.features - {"alibi", "ring_alibi", "softcap", "dropout"}
    assert torch.float32 in any_path.dtypes and hopper.dtypes == {torch.float16, torch.bfloat16}
    assert (any_path.flags, hopper.flags, portable.flags) == (True, True, False)
    assert any_path.final_gradients and hopper.final_gradients and portable.final_gradients


def test_no_hopper_kernels_without_hopper() -> None:
    can = TritonBackend("hopper").capabilities(CPU)
    assert (not can.available and "compute capability 9.0" in can.reason) or not INTERPRETED
    assert TritonBackend().path_of("forward", HALF, Params(0.1)) == "portable"
    with pytest.raises(UnsupportedError, match=r"compute capability 9\.0"):
        TritonBackend("hopper").path_of("forward", HALF, Params(0.1))


def test_where_nothing_runs_it_says_why() -> None:
    command = "import torch, ring_triton; print(ring_triton.TritonBackend().capabilities(torch.device('cpu')).reason)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1" in done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1")
def test_the_example_of_the_readme() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", example], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 100, 4, 64]) torch.Size([1, 4, 100])" in done.stdout


def test_widths_are_powers_of_two_that_hold_the_head() -> None:
    assert [width_of(d) for d in (8, 16, 40, 64, 80, 128, 160, 256)] == [16, 16, 64, 64, 128, 128, 256, 256]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
def test_work_lists_cover_every_pair_once(layout: str) -> None:
    """Counted with all tiles of a causal window's plan, on both sides and for the transposed list."""
    problem = Problem(300, 300, 300, 300, 90, 0, layout, 2 if layout != "zigzag" else 5)
    for rank in range(2):
        for step in make_plan(problem, rank, "ring").steps:
            forward, backward = on_device(step.forward, CPU), on_device(step.backward, CPU)
            work = strip_work(forward, "q", 32, 3)
            assert work.entries == 3
            assert _pairs(step.forward, work.rows.numpy(), None, "q", 32) == step.forward.pairs
            if not len(step.backward):
                continue
            work = strip_work(backward, "k", 32, 3)
            assert _pairs(step.backward, work.rows.numpy(), None, "k", 32) == step.backward.pairs
            length = problem.q_length // problem.world_size
            work = query_work(backward, 32, 3, length, cover=False)
            assert work.numbers is not None
            pairs = _pairs(step.backward, work.rows.numpy(), work.numbers.numpy(), "sequence", 32)
            assert pairs == step.backward.pairs
            assert len(query_work(backward, 32, 3, length, cover=True)) == -(-length // 32)


def test_the_longest_tile_comes_first() -> None:
    plan = make_plan(Problem(256, 256, 256, 256, None, 0, "contiguous", 1), 0, "gather")
    (step,) = plan.steps
    assert strip_work(on_device(step.forward, CPU), "q", 64, 1).rows[:, 0].tolist() == [192, 128, 64, 0]
    assert strip_work(on_device(step.backward, CPU), "k", 64, 1).rows[:, 0].tolist() == [0, 64, 128, 192]


def test_entries_with_rows_of_their_own_name_themselves() -> None:
    rows = [[0, 40, 0, 0, 30, -40, 30, 0, 0, 1, entry, FIRST | LAST] for entry in (0, 1, -1)]
    table = Table(np.array(rows, np.int32), np.arange(4, dtype=np.int32))
    work = strip_work(on_device(table, CPU), "q", 32, 2)
    assert work.entries == 1
    assert sorted(work.rows[:, 3].tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
    work = query_work(on_device(table, CPU), 32, 2, 40, cover=False)
    assert work.entries == 1
    assert sorted(map(tuple, work.rows[:, [0, 3]].tolist())) == [(0, 0), (0, 1), (32, 0), (32, 1)]
    assert (work.rows[:, 2] - work.rows[:, 1]).tolist() == [2, 2, 2, 2]


def _pairs(table: Table, work: np.ndarray, numbers: np.ndarray | None, side: str, block: int) -> int:
    """Visible pairs of all tiles, the way the kernels read them."""
    total = 0
    for offset, begin, end, _ in work.tolist():
        for at in range(begin, end):
            segment = table.segments[at if numbers is None else int(numbers[at])]
            start = offset - segment.q_start if side == "sequence" else offset
            length = segment.k_len if side == "k" else segment.q_len
            first, stop = max(0, start), min(start + block, length)
            shift = -first if side == "k" else first
            sizes = (segment.q_len, stop - first) if side == "k" else (stop - first, segment.k_len)
            bounds = segment.lower + shift, segment.upper + shift
            total += int(count_pairs(*(np.array([x]) for x in (*sizes, *bounds)))[0])
    return total
