import dataclasses
import json
import subprocess
import sys

import pytest

from ring_compare.cli import main
from ring_compare.records import load
from ring_compare.suites import SUITES

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "ring_compare",
]


def record_file(folder, suite="smoke"):
    (path,) = (folder / suite).glob("*.jsonl")
    assert path.with_suffix(".md").exists()
    return path


def test_smoke_suite_on_two_ranks(tmp_path, capsys):
    code = main(["run", "--suite", "smoke", "--device", "cpu", "--out", str(tmp_path), "--seed", "5"])
    output = capsys.readouterr().out
    records = load(record_file(tmp_path))
    assert [r.reason for r in records.results if r.status == "failed"] == []
    assert code == 0
    reference = [r for r in records.results if r.implementation == "reference"]
    assert len(reference) == 4 * 2
    assert {(r.cell.layout, r.cell.schedule) for r in reference} == {
        (layout, schedule) for layout in ("contiguous", "zigzag") for schedule in ("ring", "gather")
    }
    assert {r.cell.world_size for r in reference} == {2}
    assert [r.seed for r in reference] == [5] * 8  # routes of a problem share its inputs
    assert records.environment["seed"] == 5
    for line in ("records: ", "report:  "):
        assert line + str(tmp_path) in output
    report = record_file(tmp_path).with_suffix(".md").read_text()
    assert "| reference · zigzag · ring |" in report
    assert "x2_" in record_file(tmp_path).name


def test_joins_the_ranks_of_torchrun(tmp_path, subprocess_env):
    names = ["reference", "compare_fakes:RaisesEverywhere", "compare_fakes:RaisesOnLastRankOfLong"]
    axes = ["--layout", "zigzag", "--schedule", "ring", "--seqlen", "64", "128", "--device", "cpu", "--timeout", "6"]
    command = [*TORCHRUN, "run", "--suite", "smoke", *axes, "--out", str(tmp_path), "--backend", *names]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("records: ") == 1, done.stdout  # one rank speaks
    results = load(record_file(tmp_path)).results
    short = {r.implementation: r for r in results if r.cell.Sq == 64}
    long = {r.implementation: r for r in results if r.cell.Sq == 128}
    assert [r.reason for r in results if r.cell.Sq == 64 and r.implementation == "reference"] == ["", ""]
    assert short["raises late[torch]"].status == "ok"
    # What all ranks refuse alike leaves them in step.
    assert short["refuses[torch]"].reason.startswith("rank 0: ValueError: no such head dim")
    # A lone failure does not, and nobody can start new ranks: that much must end, and be told.
    assert long["raises late[torch]"].reason.startswith("rank 1: RuntimeError: this kernel")
    assert long["reference"].status == "skipped"
    assert long["reference"].reason.startswith("not run: rank 1 failed otherwise than the rest")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--backend", "nothing"], "--implementations nothing: not installed; there are"),
        (["run", "--implementations", "local[nothing]"], "--implementations local[nothing]: not installed"),
        (["report", "no_such_file"], "no_such_file"),
        (["run", "--suite", "cpu", "--layout", "balanced"], "no cell is left"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["run", "--suite", "huge"], ["run", "--dtype", "int8"], ["run", "--seqlen", "0"]]
)
def test_bad_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ring-compare" in capsys.readouterr().err


def test_failure_gives_exit_code_one(tmp_path, capsys):
    axes = ["--device", "cpu", "--world-size", "1", "--seqlen", "32", "--dtype", "fp32", "--out", str(tmp_path)]
    assert main(["run", "--suite", "smoke", *axes, "--backend", "compare_fakes:Plain", "compare_fakes:Wrong"]) == 1
    assert "wrong[torch]: failed: out relative error 0.01" in capsys.readouterr().out
    statuses = {r.implementation: r.status for r in load(record_file(tmp_path)).results}
    assert statuses == {"plain[torch]": "ok", "wrong[torch]": "failed"}


def test_timing_options_and_the_end_of_time(tmp_path, capsys):
    axes = ["--device", "cpu", "--world-size", "1", "--seqlen", "32", "64", "--out", str(tmp_path)]
    short = ["--measure-seconds", "0.001", "--warmup-seconds", "0", "--max-seconds", "0"]
    assert main(["run", "--suite", "smoke", *axes, *short, "--backend", "compare_fakes:Plain"]) == 1
    assert "not begun after 0 s (--max-seconds)" in capsys.readouterr().out
    results = load(record_file(tmp_path)).results
    assert [(r.cell.Sq, r.status) for r in results] == [(32, "skipped")] * 2 + [(64, "skipped")] * 2


def test_what_a_suite_names_but_is_not_installed_is_skipped(tmp_path, monkeypatch):
    suite = dataclasses.replace(SUITES["smoke"], implementations=("nothing[cudnn]", "reference"))
    monkeypatch.setitem(SUITES, "smoke", suite)
    axes = ["--device", "cpu", "--world-size", "1", "--seqlen", "32", "--out", str(tmp_path)]
    assert main(["run", "--suite", "smoke", *axes]) == 0
    found = {r.implementation: (r.status, r.reason) for r in load(record_file(tmp_path)).results}
    assert found["reference"] == ("ok", "")
    assert found["nothing[cudnn]"][0] == "skipped"
    assert found["nothing[cudnn]"][1].startswith("unknown implementation 'nothing[cudnn]'; installed: ")


def test_nothing_measured_is_no_success(tmp_path, capsys):
    axes = ["--device", "cpu", "--world-size", "2", "--seqlen", "31", "--out", str(tmp_path)]
    assert main(["run", "--suite", "smoke", *axes, "--backend", "reference"]) == 1
    assert "31 does not divide" in capsys.readouterr().out


def test_list_cells(capsys):
    assert main(["run", "--suite", "smoke", "--list-cells", "--layout", "stripe", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("stripe" in line and "2 ranks" in line for line in lines)


def test_list_and_env(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("reference", "float32", "smoke", "cpu", "gpu"))
    assert main(["env"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]
