import dataclasses
import subprocess
import sys
import time

import pytest

from ring_compare.launch import OwnRanks, _blame, run_task, share_of_cores
from ring_compare.measure import Stage, Task
from ring_compare.suites import Cell, Suite, Timing
from ring_core.testing import RankDied, RankTimeout, WorkerPool

TIMING = Timing(warmup_s=0.001, measure_s=0.001, min_samples=2, max_samples=2)


@pytest.fixture
def ranks():
    launcher = OwnRanks("cpu")
    yield launcher
    launcher.close()


def run(ranks, world_size, *names, timeout_s=60.0):
    cell = Cell(1, 16, 16, 2, 1, 8, "float32", "causal", (-1, -1), "zigzag", "ring", world_size)
    suite = Suite("test", "", (), TIMING, timeout_s)
    task = Task(suite, (cell,), tuple(f"compare_fakes:{name}" for name in names), 0)
    results = run_task(ranks, task, lambda stage: None)
    assert len(results) == 2 * len(names)
    return {result.implementation.removesuffix("[torch]"): result for result in results}


def test_one_rank_that_raises_costs_its_own_row_only(ranks):
    rows = run(ranks, 2, "RaisesOnLastRank", "Plain")
    assert rows["raises"].status == "failed"
    assert "rank 1: RuntimeError: this kernel cannot do that (while first call)" in rows["raises"].reason
    assert rows["raises"].provider == "torch"
    assert rows["plain"].status == "ok"
    assert rows["plain"].samples_ms


def test_an_implementation_is_given_up_after_two_failures(ranks):
    first = Cell(1, 16, 16, 2, 1, 8, "float32", "causal", (-1, -1), "zigzag", "ring", 1)
    cells = [dataclasses.replace(first, schedule=schedule) for schedule in ("ring", "gather", "auto")]
    task = Task(Suite("test", "", (), TIMING, 60.0), tuple(cells), ("compare_fakes:RaisesEverywhere", "reference"), 0)
    rows = run_task(ranks, task, lambda stage: None)
    found = {(row.implementation, row.cell.schedule): (row.status, row.reason) for row in rows}
    assert [found["reference", schedule] for schedule in ("ring", "gather", "auto")] == [("ok", "")] * 3
    assert [found["refuses[torch]", schedule][0] for schedule in ("ring", "gather")] == ["failed"] * 2
    assert found["refuses[torch]", "auto"] == ("skipped", "not run: 2 of its routes failed")


def test_of_ranks_that_hang_the_one_behind_is_blamed():
    def stages(*numbers):
        return {rank: Stage(n, f"name {n}", f"label {n}", "", f"step {n}") for rank, n in enumerate(numbers)}

    log = 'a warning\nThread 0x7f (most recent call first):\n  File "a.py", line 3 in call\n'
    failure = _blame(RankTimeout("", [0, 2], ["", "", log], stages(7, 1, 5)), 9.0)  # rank 1 had answered
    assert failure.stage.name == "name 5"
    assert failure.text == "no end after 9 s; rank 2 was at: step 5; its stderr: a warning"
    failure = _blame(RankDied("", {1: -9, 0: 1}, ["", ""], stages(2, 3)), 9.0)  # 1 died first
    assert (failure.stage.name, failure.text) == ("name 3", "rank 1 ended with exit code -9")


def test_ranks_that_do_not_start_are_nobodys_fault(monkeypatch):
    def refuse(*arguments, **options):
        raise RankTimeout("", [0], ["no such device"], {})

    monkeypatch.setattr(WorkerPool, "run", refuse)
    rows = run(OwnRanks("cpu"), 1, "Plain", "Wrong")
    assert {row.status for row in rows.values()} == {"failed"}
    assert rows["compare_fakes:Plain"].reason == (
        "no end after 180 s; rank 0 was at: starting; its stderr: no such device (while starting)"
    )


def test_hang_and_death_end_in_rows(ranks):
    start = time.monotonic()
    rows = run(ranks, 1, "Hangs", "Dies", "Plain", timeout_s=6.0)
    assert rows["hangs"].status == rows["dies"].status == "failed"
    # Where Python was is for a debugger, not for a table.
    assert rows["hangs"].reason == "no end after 6 s; rank 0 was at: first call (while first call)"
    assert "rank 0 ended with exit code 7; its stderr: illegal instruction, or so" in rows["dies"].reason
    assert rows["plain"].status == "ok"
    assert time.monotonic() - start < 60


def test_ranks_share_neighbouring_cores() -> None:
    cores = [0, 1, 2, 3, 8, 9, 10, 11, 12]
    shares = [share_of_cores(cores, rank, 4) for rank in range(4)]
    assert shares == [{0, 1}, {2, 3}, {8, 9}, {10, 11}]
    assert share_of_cores(cores, 3, 5) == set(cores), "not two for each"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has affinities")
def test_all_threads_keep_to_their_cores() -> None:
    """In a process of its own: this one goes on with all its cores."""
    code = (
        "import os, threading; from ring_compare.launch import keep_to; event = threading.Event(); "
        "thread = threading.Thread(target=event.wait); thread.start(); one = {min(os.sched_getaffinity(0))}; "
        "keep_to(one); found = [os.sched_getaffinity(t) for t in (0, thread.native_id)]; event.set(); "
        "assert found == [one, one], found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_given_ranks_may_be_on_other_hosts(monkeypatch):
    """Only own ones must find a GPU here."""
    from ring_compare import run

    monkeypatch.setattr(run, "visible_ranks", lambda device: 2)
    cell = Cell(1, 64, 64, 4, 2, 32, "float32", "causal", (-1, -1), "zigzag", "ring", 4)
    assert run._reason_to_skip(cell, "cuda", None) == "4 ranks, but 2 visible GPUs"
    assert run._reason_to_skip(cell, "cuda", object()) is None
