"""Kernels on one GPU: suites, the backward alone, steps, peers, their table and their targets."""

import dataclasses

import compare_fakes
import pytest
import torch

from ring_compare import implementations
from ring_compare.cli import main
from ring_compare.kernel_report import KERNEL_COLUMNS, kernel_row
from ring_compare.kernels import memory, speed
from ring_compare.lines import by_problem
from ring_compare.measure import CellRun, Task
from ring_compare.peers import flex_attention, steps
from ring_compare.ranks import Ranks
from ring_compare.records import Records, Result, load
from ring_compare.report import render
from ring_compare.suites import KERNEL_PHASES, SUITES, Cell, Overrides, Suite, Timing, suite_cells
from ring_compare.targets import GOALS, render_targets
from ring_core.segment import FIRST, LAST
from ring_core.testing.oracle import attention_oracle

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
TIMING = Timing(warmup_s=0.0, measure_s=0.001, min_samples=3, max_samples=6)
ENVIRONMENT = {
    "date": "2026-11-21T10:00:00+00:00",
    "revision": "0123456789",
    "command": "ring-compare run",
    "device": {"type": "cuda", "slug": "h200", "names": ["NVIDIA H200"]},
    "versions": {"torch": "2.11.0"},
}


def small(mask="causal", lengths=(32, 32), dtype="float32"):
    return Cell(2, *lengths, 4, 2, 16, dtype, mask, (-1, -1), "contiguous", "ring", 1)


def run(problem, *names, phases=KERNEL_PHASES):
    task = Task(Suite("test", "", (), TIMING, 60.0, phases=phases), (problem,), names, 7)
    rows = CellRun(task, ALONE, lambda stage: None).run()
    return {(row.implementation, row.phase): row for row in rows}


# Suites


def cells(name, **axes):
    return suite_cells(SUITES[name], Overrides(**axes), all_ranks=4)


def test_cells_are_those_of_the_issues():
    found = cells("kernels")
    assert {(c.B, c.Sq) for c in found} == {(4, 4096), (2, 8192), (1, 16384), (1, 32768)}
    assert {(c.Hq, c.Hkv, c.D) for c in found} == {(16, 16, 128), (32, 8, 128), (64, 8, 128)}
    assert {(c.mask, c.dtype, c.world_size) for c in found} == {("causal", "bfloat16", 1), ("full", "bfloat16", 1)}
    assert len(found) == 4 * 3 * 2
    assert {(c.Hq, c.Hkv, c.D) for c in cells("kernels-64")} == {(32, 32, 64)}
    assert {c.D for c in cells("kernels-wide")} == {96, 192, 256}
    assert [(c.B, c.Sq, c.Sk, c.mask) for c in cells("steps")] == [(1, 8192, 32768, "full")]
    assert all(SUITES[name].phases == ("fwd", "bwd", "fwd+bwd") for name in ("kernels", "steps"))
    assert SUITES["rings"].phases == ("fwd", "fwd+bwd")


def test_every_cell_of_a_target_is_in_a_suite():
    """A table that no run can fill is none."""
    found = [c for name in ("kernels", "kernels-64", "kernels-wide") for c in cells(name)]
    names = ("native", "native[cudnn]", "native[fa3]", "native[fa4]", "flex", "triton", "triton[portable]", "cute")
    results = [row for cell in found for name in names for row in rows(name, cell)]
    stepped = [f"steps-{n}[{name}]" for name in ("triton", "cute") for n in (1, 4, 8, 16)]
    results += [row for cell in cells("steps") for name in stepped for row in rows(name, cell)]
    text, _ = render_targets(Records(ENVIRONMENT, results), ("triton", "cute"))
    assert "not measured" not in text
    assert "missing" not in text
    used = {name for suite in ("kernels", "steps") for name in SUITES[suite].implementations}
    assert {"native", "native[cudnn]", "native[fa3]", "native[fa4]", "flex", *stepped} <= used


def test_axes_of_the_shape():
    found = cells("kernels", heads=((8, 2),), head_dims=(64,), batches=(3,), seqlens=(128,), masks=("full",))
    assert [(c.B, c.Sq, c.Hq, c.Hkv, c.D) for c in found] == [(3, 128, 8, 2, 64)]


# The backward alone


def test_backward_is_timed_without_its_forward(monkeypatch):
    calls = []
    forward = compare_fakes.Plain.call
    monkeypatch.setattr(compare_fakes.Plain, "call", lambda *given: calls.append(0) or forward(*given))
    row = run(small(), "compare_fakes:Plain", phases=("bwd",))["plain[torch]", "bwd"]
    assert row.status == "ok"
    assert len(row.samples_ms) >= 3
    assert len(calls) == 4  # the first, memory, the results compared, and one before the clock
    assert row.errors.keys() == {"dq", "dk", "dv"}


def test_three_phases_and_a_wrong_forward():
    rows = run(small(), "compare_fakes:Plain", "compare_fakes:Wrong")
    assert [phase for name, phase in rows if name == "plain[torch]"] == list(KERNEL_PHASES)
    for phase in KERNEL_PHASES:
        assert len(rows["plain[torch]", phase].samples_ms) >= 3
        assert (rows["wrong[torch]", phase].status, rows["wrong[torch]", phase].samples_ms) == ("failed", [])
    assert rows["plain[torch]", "bwd"].errors == rows["plain[torch]", "fwd+bwd"].errors


def test_a_forward_alone():
    """What has no backward is measured forward, and says why not in the other phases."""
    rows = run(small(), "compare_fakes:Plain", "compare_fakes:Onward", "compare_fakes:OnwardWrong")
    forward = rows["onward[torch]", "fwd"]
    assert (forward.status, forward.reason, set(forward.errors)) == ("ok", "", {"out", "lse"})
    assert len(forward.samples_ms) >= 3 and forward.peak_memory_bytes is not None
    for phase in ("bwd", "fwd+bwd"):
        row = rows["onward[torch]", phase]
        assert (row.status, row.reason) == ("skipped", "it computes no gradients; reference does")
        assert not row.samples_ms and not row.errors
    wrong = rows["onward, wrong[torch]", "fwd"]
    assert wrong.status == "failed" and wrong.reason.startswith("out relative error") and not wrong.samples_ms
    assert rows["plain[torch]", "bwd"].status == "ok"


# Steps


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("lengths", [(32, 32), (16, 64)])
def test_steps_of_the_reference_agree_with_float64(mask, lengths):
    names = [f"steps-{count}[reference]" for count in (1, 4, 16)]
    # In fp32 the roundings of 16 sums would be all there is, and twice those of one sum.
    rows = run(small(mask, lengths, "bfloat16"), *names, phases=("fwd", "fwd+bwd"))
    assert {row.reason for row in rows.values()} == {""}
    assert rows["steps-4[reference]", "fwd"].errors.keys() == {"out", "lse"}
    assert rows["steps-16[reference]", "fwd+bwd"].errors.keys() == {"dq", "dk", "dv"}


def test_tables_of_steps():
    one, *middle, last = [table.segments[0] for table in steps.step_tables(small("causal", (16, 64)), 4)]
    assert (one.flags, {s.flags for s in middle}, last.flags) == (FIRST, {0}, LAST)
    assert [s.k_position for s in (one, *middle, last)] == [0, 16, 32, 48]
    assert one.upper == 16  # all of it is visible
    assert last.upper == 0  # the diagonal
    (whole,) = steps.step_tables(small("full"), 1)[0].segments
    assert whole.flags == FIRST | LAST


def test_what_steps_refuse():
    made = implementations.load("steps-16[reference]")
    assert made.supports(small(lengths=(24, 24)), CPU) == "24 keys do not divide into 16 steps"
    assert "on one rank" in made.supports(dataclasses.replace(small(), world_size=2), CPU)
    assert implementations.known("steps-4[reference]")
    assert not implementations.known("steps-4[nothing]")
    with pytest.raises(implementations.NotInstalledError, match="the backend 'nothing', which is not installed"):
        implementations.load("steps-4[nothing]")


# Peers


def test_sdpa_agrees_with_float64():
    for mask in ("causal", "full"):
        rows = run(small(mask), "sdpa")
        assert {row.status for row in rows.values()} == {"ok"}
        assert rows["sdpa", "fwd"].errors.keys() == {"out"}


@pytest.mark.parametrize(
    "name, problem, reason",
    [
        ("sdpa", small(lengths=(16, 32)), "the other way"),
        ("sdpa", dataclasses.replace(small(), mask="window", window_size=(3, 0)), "causal and full masks"),
        ("sdpa[cudnn]", small(), "on GPUs, not on cpu"),
        ("flex", small(), "no backward on cpu"),
        ("flex", dataclasses.replace(small(), world_size=2), "no backward on cpu"),
    ],
)
def test_what_peers_refuse(name, problem, reason):
    assert reason in implementations.load(name).supports(problem, CPU)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_forward(monkeypatch):
    """Not compiled, which takes a C++ compiler here; masks, heads and lse are as everybody's."""
    monkeypatch.setattr(flex_attention, "_compiled", lambda: flex_attention.flex_attention)
    generator = torch.Generator().manual_seed(0)
    for problem in (small("causal", (32, 48)), small("full")):
        q = torch.randn(2, problem.Sq, 4, 16, generator=generator)
        k, v = torch.randn(2, 2, problem.Sk, 2, 16, generator=generator)
        out, lse = implementations.load("flex").call(q, k, v, problem, None)
        want = attention_oracle(q, k, v, causal=problem.causal)
        torch.testing.assert_close(out.double(), want.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), want.lse, rtol=1e-5, atol=1e-5)


# Reports and targets


def error(value):
    return {"max_abs": value, "relative": value, "rmse": value, "tolerance": 1.0}


CELL = Cell(1, 16384, 16384, 16, 16, 128, "bfloat16", "causal", (-1, -1), "contiguous", "ring", 1)


def rows(name, cell=CELL, fwd=1.0, bwd=2.0, mib=100, seed=0, host=None):
    provider = "flash-attn" if name == "native" else ""
    common = {"suite": "kernels", "cell": cell, "implementation": name, "provider": provider, "seed": seed}
    errors = {tensor: error(1e-3) for tensor in ("dq", "dk", "dv")}
    host_ms = [fwd if host is None else host]
    return [
        Result(**common, phase="fwd", samples_ms=[fwd], host_ms=host_ms, errors={"out": error(1e-3)}),
        Result(**common, phase="bwd", samples_ms=[bwd], host_ms=host_ms, errors=errors, peak_memory_bytes=mib * 2**20),
    ]


def test_ratios_are_to_the_better_of_the_same_run():
    found = [
        *rows("triton", fwd=1.0, bwd=4.0, mib=103),
        *rows("native[cudnn]", fwd=0.9, bwd=3.0),
        *rows("sdpa[cudnn]", fwd=0.8, bwd=3.5),
        *rows("native", fwd=2.0, bwd=5.0, mib=100),
        *rows("native[fa4]", fwd=0.1, bwd=0.1, seed=1),  # of another run
    ]
    lines = by_problem(found)[CELL.problem]
    (line,) = [x for x in lines if x.implementation == "triton"]
    row = dict(zip(KERNEL_COLUMNS, kernel_row(line, lines), strict=True))
    assert row["speed, × cuDNN"] == "0.80 / 0.75"
    assert row["× FA2"] == "2.00 / 1.25"
    assert row["× FlexAttention"] == row["time, × one step"] == ""
    assert row["peak memory, × FA2"] == "1.03"
    flops = 4 * 16384**2 * 16 * 128 / 2
    assert row["TFLOP/s, fwd"] == f"{flops / 1e-3 / 1e12:.3g}"
    assert row["bwd"] == f"{2.5 * flops / 4e-3 / 1e12:.3g}"
    assert speed(line, lines, ("native[fa4]",), "fwd") is None
    assert memory(line, lines, ("native[fa4]",)) is None
    text = render(Records(ENVIRONMENT, found))
    assert "| triton · contiguous · ring | 1.1e+03 | 687 |" in text
    assert "Kernels on one GPU" in text
    assert "| triton · contiguous · ring |" in text.split("grad max err")[1]


def verdicts(results, *names):
    text, met = render_targets(Records(ENVIRONMENT, results), names)
    table = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in table}, met, text


def everything(fwd=1.0, bwd=1.0, share=1.0):
    """Records that meet all of issue 4's where ours take as long as cuDNN."""
    found = []
    for cell in (*cells("kernels"), *cells("kernels-64")):
        found += rows("native[cudnn]", cell, 1.0, 1.0)
        found += rows("native", cell, 2.0, 2.0)
        found += rows("triton", cell, fwd, bwd, mib=int(100 * share))
        found += rows("triton[portable]", cell, 1.5, 1.5)
    (cell,) = cells("steps")
    for count, ms in ((1, 4.0), (4, 4.1), (8, 4.3), (16, 4.8)):
        found += rows(f"steps-{count}[triton]", cell, ms, ms, host=0.32)
    return found


def test_targets_of_triton_are_met():
    found, met, text = verdicts(everything())
    assert met
    assert "ring-cute" not in text
    assert "4 GPUs" not in text
    assert found["D 128, fwd: speed, × cuDNN, mean"] == ["≥ 0.97", "≥ 1.08", "1.000 (triton, 16 cells)", "pass"]
    assert found["portable, D 128, fwd, full: speed, × FA2, mean"][2] == "1.333 (triton[portable], 8 cells)"
    assert found["portable, D 128, fwd: speed, × FlexAttention, mean"][3] == "not measured"
    assert found["4 steps of 8192 keys, fwd: time, × one call"][2:] == ["1.025 (steps-4[triton], 16/16)", "goal"]
    assert found["16 steps of 2048 keys, fwd: time, × one call"][2:] == ["1.200 (steps-16[triton], 16/16)", "told"]
    assert found["host time per step of 16, fwd, µs"][2:] == ["20.000 (steps-16[triton], 16/16)", "pass"]


def test_a_slow_cell_a_hungry_one_and_missing_ones():
    slow = [
        dataclasses.replace(r, samples_ms=[1.2])
        if (r.implementation, r.phase, r.cell.Sq, r.cell.mask, r.cell.Hq) == ("triton", "fwd", 8192, "full", 32)
        else r
        for r in everything(share=1.06)
    ]
    found, met, _ = verdicts(slow)
    assert not met
    assert found["D 128, fwd: speed, × cuDNN, mean"][3] == "pass"
    worst = found["D 128, fwd: speed, × cuDNN, worst cell"]
    assert worst[2:] == ["0.833 (triton, 16 cells: S 8192, 32/8, D 128, full)", "**miss**"]
    assert found["D 128: peak memory, × FA2, worst cell"][3] == "**miss**"
    some = [r for r in everything() if r.cell.Sq != 32768]
    found, met, _ = verdicts(some)
    assert not met
    assert found["D 128, fwd: speed, × cuDNN, mean"][2:] == ["1.000 (triton, 12 of 16 cells)", "cells missing"]


def test_a_path_that_few_cells_measured_does_not_stand_for_all():
    hopper = rows("triton[hopper]", cells("kernels")[0], 0.1, 0.1)
    found, _, _ = verdicts([*everything(), *hopper])
    assert found["D 128, fwd: speed, × cuDNN, mean"][2] == "1.000 (triton, 16 cells)"


def test_runs_of_one_problem_stay_apart():
    """A second run, with FlexAttention beside some of the first one's, on a slower machine."""
    again = [
        row
        for cell in cells("kernels")
        for name, ms in (("flex", 3.0), ("triton[portable]", 2.5))
        for row in rows(name, cell, ms, ms, seed=1)
    ]
    found, _, _ = verdicts([*everything(), *again])
    assert found["portable, D 128, bwd: speed, × FlexAttention, mean"][2] == "1.200 (triton[portable], 16 cells)"
    assert found["portable, D 128, fwd, full: speed, × FA2, mean"][2] == "1.333 (triton[portable], 8 cells)"


def test_tables_by_name():
    assert [goals.name for goals in GOALS] == ["rings", "triton", "cute"]
    found, met, _ = verdicts(everything(), "cute")
    assert not met
    assert {row[3] for row in found.values()} <= {"not measured", "verdict", "---"}


def test_the_command_on_a_cpu(tmp_path, capsys):
    shape = ["--seqlen", "32", "--batch", "1", "--heads", "4/2", "--head-dim", "16", "--dtype", "fp32"]
    where = ["--device", "cpu", "--out", str(tmp_path)]
    names = ["--implementations", "reference", "sdpa", "flex"]
    assert main(["run", "--suite", "kernels", *shape, *where, *names, "--phase", "bwd", "fwd"]) == 0
    (path,) = (tmp_path / "kernels").glob("*.jsonl")
    results = load(path).results
    assert {(r.implementation, r.phase) for r in results if r.status == "ok"} == {
        (name, phase) for name in ("reference", "sdpa") for phase in ("fwd", "bwd")
    }
    assert {r.reason for r in results if r.implementation == "flex"} == {
        "FlexAttention is compared compiled, and has no backward on cpu"
    }
    assert "speed, × cuDNN" in path.with_suffix(".md").read_text()
    assert main(["targets", "--table", "triton", str(path)]) == 1
    assert "| D 64, bwd: speed, × cuDNN, mean |" in capsys.readouterr().out
