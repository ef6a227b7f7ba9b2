"""How many heads' tiles are dealt out together."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from numpy.typing import NDArray

from ring_core.sections import section_of
from ring_core.testing.direct import causal_table
from ring_core.tiles import ITEM, make_schedule


def busy(blocks: NDArray[np.int32], head_batches: int, section: int, processors: int) -> float:
    """The share of the time that processors work, which take the next tile when they are free: longest first in a
    section of heads, then the next section's."""
    free, total = [0] * processors, 0
    for first in range(0, head_batches, section):
        here = min(section, head_batches - first)
        for length in np.repeat(blocks, here):
            heapq.heapreplace(free, free[0] + int(length))
            total += int(length)
    return total / (processors * max(free))


@pytest.mark.parametrize("length, tile_rows, block, processors", [(16384, 256, 128, 66), (16384, 128, 80, 132)])
def test_the_last_section_keeps_processors_busy(length: int, tile_rows: int, block: int, processors: int) -> None:
    """Three of 16 heads fit the L2."""
    table = causal_table(length, length, causal=True)
    schedule = make_schedule(table, tile_rows=tile_rows, block=block, piece_length=length)
    blocks = schedule.items[:, ITEM.index("blocks")]
    assert (np.diff(blocks) <= 0).all(), "longest first"
    assert busy(blocks, 16, 3, processors) < 0.96
    assert busy(blocks, 16, schedule.section(16, 3, processors), processors) > 0.99


def test_what_stays_in_the_l2_stays_together() -> None:
    equal = np.full(64, 100, dtype=np.int32)
    assert section_of(equal, 32, 8, 132) == 8
    assert section_of(equal, 32, 1, 132) == 4, "half as much again for each processor as a tile"
    assert section_of(equal, 30, 8, 132) == 10, "sections are alike"
    assert section_of(equal, 2, 8, 132) == 2, "there are no more"
    assert section_of(np.zeros(0, dtype=np.int32), 2, 1, 132) == 1
