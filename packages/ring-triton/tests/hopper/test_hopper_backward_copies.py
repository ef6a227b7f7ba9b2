"""What TMA reads of lse and delta: from 16-byte aligned addresses only; others are an illegal instruction to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hopper_backward_walk import blocks_of

from ring_core.key_tiles import ITEM, make_schedule
from ring_core.plan import Problem, make_plan
from ring_triton.hopper import backward_launch
from ring_triton.portable.settings import INTERPRETED

BLOCK = 64


def first_element(row: int | np.ndarray, pitch: int) -> int | np.ndarray:
    """Where the producer reads a block that begins at this row of (B Hq Sq)."""
    return row + (row & 3) * (pitch - 1)


@pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1; the GPU probe runs the kernel compiled")
@pytest.mark.parametrize(("batch", "length", "heads", "dim"), [(1, 1, 1, 8), (1, 7, 1, 128), (2, 65, 3, 64)])
def test_a_block_that_begins_at_any_row_is_there_and_aligned(batch: int, length: int, heads: int, dim: int) -> None:
    torch.manual_seed(0)
    out, dout = torch.randn(2, batch, length, heads, dim).unbind(0)
    lse = torch.randn(batch, heads, length)
    lse[0, 0, 0] = -torch.inf
    state = backward_launch.prepare(out, out, dout, lse, None)
    delta = (out * dout).sum(-1).transpose(1, 2)
    scaled_lse = (lse * backward_launch.LOG2E).masked_fill(lse == -torch.inf, torch.inf)
    torch.testing.assert_close(state.delta, delta)
    torch.testing.assert_close(state.scaled_lse, scaled_lse)
    rows, pitch = delta.numel(), state.copies.shape[-1]
    assert pitch % 4 == 0
    for memory, view in zip(state.copies.flatten(1), (state.delta, state.scaled_lse), strict=True):
        assert memory.data_ptr() % 16 == 0
        padded = torch.cat((memory, torch.zeros(BLOCK)))  # TMA: zeros beyond its bound
        for row in range(rows):
            at = int(first_element(row, pitch))
            assert at % 4 == 0
            there = min(BLOCK, rows - row)
            assert torch.equal(padded[at : at + there], view.flatten()[row : row + there])
            if view is state.delta:
                assert torch.isfinite(padded[at : at + BLOCK]).all(), "0 x delta is not 0"


@pytest.mark.parametrize(("layout", "left", "right"), [("contiguous", 33, 0), ("stripe", None, 0), ("zigzag", 7, 5)])
def test_blocks_do_begin_at_rows_that_are_not_aligned(layout: str, left: int | None, right: int) -> None:
    """What makes the copies necessary, and that they are enough."""
    problem = Problem(684, 684, 684, 684, left, right, layout, 2)  # type: ignore[arg-type]
    table = make_plan(problem, 1, "gather").steps[0].backward
    schedule = make_schedule(table, tile_keys=128, block=BLOCK)
    rows = np.array(
        [
            head * 342 + row["q_start"] + row["i_lo"] + number * BLOCK
            for values in schedule.items.tolist()
            for row, number, head in blocks_of(schedule, dict(zip(ITEM, values, strict=True)), 2)
        ]
    )
    assert (rows % 4 != 0).any()
    assert not (first_element(rows, 2 * 342) % 4).any()
