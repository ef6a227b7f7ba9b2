import time

import pytest

from ring_compare.launch import OwnRanks, run_task
from ring_compare.measure import Task
from ring_compare.suites import Cell, Suite, Timing

TIMING = Timing(warmup_s=0.001, measure_s=0.001, min_samples=2, max_samples=2)


@pytest.fixture
def ranks():
    launcher = OwnRanks("cpu")
    yield launcher
    launcher.close()


def run(ranks, world_size, *names, timeout_s=60.0):
    cell = Cell(1, 16, 16, 2, 1, 8, "float32", "causal", (-1, -1), "zigzag", "ring", world_size)
    suite = Suite("test", "", (), TIMING, timeout_s)
    task = Task(suite, cell, tuple(f"compare_fakes:{name}" for name in names), 0)
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


def test_hang_and_death_end_in_rows(ranks):
    start = time.monotonic()
    rows = run(ranks, 1, "Hangs", "Dies", "Plain", timeout_s=6.0)
    assert rows["hangs"].status == rows["dies"].status == "failed"
    # Where Python was is for a debugger, not for a table.
    assert rows["hangs"].reason == "no end after 6 s; rank 0 was at: first call (while first call)"
    assert "rank 0 ended with exit code 7; its stderr: illegal instruction, or so" in rows["dies"].reason
    assert rows["plain"].status == "ok"
    assert time.monotonic() - start < 60
