"""Packed documents: ring_core's layouts and the kernels alone, on gloo ranks."""

import pytest
import torch

from ring_compare.documents import pieces
from ring_compare.launch import OwnRanks, run_task
from ring_compare.measure import Task
from ring_compare.places import layout_positions, put_together, take
from ring_compare.suites import DOCUMENT_LAYOUTS, Cell, Suite, Timing

TIMING = Timing(warmup_s=0.001, measure_s=0.001, min_samples=2, max_samples=2)
TOKENS = 2048  # the realistic mix: three documents and a bit


def cell(layout="balanced", mask="causal", world_size=2, schedule="gather", tokens=TOKENS, documents="realistic"):
    shape = (1, tokens, tokens, 2, 1, 8)
    return Cell(*shape, "float32", mask, (-1, -1), layout, schedule, world_size, documents)


@pytest.mark.parametrize("layout", DOCUMENT_LAYOUTS)
def test_ranks_hold_equal_parts_of_the_stream(layout):
    shares = [layout_positions(cell(layout, world_size=4), rank, TOKENS) for rank in range(4)]
    assert [len(share) for share in shares] == [TOKENS // 4] * 4
    assert sorted(torch.cat(shares).tolist()) == list(range(TOKENS))
    whole = torch.randn(1, TOKENS, 3)
    assert torch.equal(put_together([take(whole, share, 1) for share in shares], shares, 1), whole)


def test_pieces_of_local_tokens():
    assert pieces([3, 4, 5, 6, 10, 11], (0, 5, 5, 12)) == [(0, 3, 5), (5, 5, 7), (5, 10, 12)]
    assert pieces([], (0, 5)) == []


@pytest.fixture(scope="module")
def ranks():
    launcher = OwnRanks("cpu")
    yield launcher
    launcher.close()


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_rings_and_kernels_alone_agree_with_float64(ranks, mask):
    routes = [
        cell(layout, mask, schedule=schedule, tokens=256, documents="equal8")
        for layout in DOCUMENT_LAYOUTS
        for schedule in ("ring", "gather")
    ]
    task = Task(Suite("test", "", (), TIMING, 60.0), tuple(routes), ("reference", "local-varlen"), 0)
    rows = run_task(ranks, task, lambda stage: None)
    assert [(row.implementation, row.reason) for row in rows if row.reason] == []
    assert len(rows) == 2 * (6 + 3)
    alone = [row for row in rows if row.implementation == "local-varlen"]
    assert {(row.cell.layout, row.cell.schedule) for row in alone} == {(layout, "own") for layout in DOCUMENT_LAYOUTS}
    assert alone[0].errors.keys() == {"out"}
    assert alone[1].errors.keys() == {"dq"}


def test_documents_of_all_lengths(ranks):
    task = Task(Suite("test", "", (), TIMING, 60.0), (cell(),), ("reference", "local-varlen"), 0)
    assert [row.reason for row in run_task(ranks, task, lambda stage: None)] == [""] * 4
