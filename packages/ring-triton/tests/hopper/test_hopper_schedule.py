"""The walk over tiles and blocks visits each visible pair once and no other, whatever the table."""

from __future__ import annotations

import numpy as np
import pytest
from hopper_plans import PLANS, problem
from hopper_walk import distances, true_distances, visible_pairs, visits

from ring_core.plan import PackedProblem, make_plan
from ring_core.segment import FIRST, LAST, Segment, Table
from ring_core.testing.direct import table_of
from ring_core.tiles import ITEM, WALK, make_schedule, with_first_walk

BLOCKS = (64, 128)


def check(table: Table, q_len: int, block: int, tile_rows: int = 128) -> None:
    pieces = 1 + max((s.piece for s in table.segments), default=0)
    piece_length = max((s.k_start + s.k_len for s in table.segments), default=1) + 3
    schedule = make_schedule(table, tile_rows=tile_rows, block=block, piece_length=piece_length)
    keys = pieces * piece_length + block
    got = visits(schedule, q_len=q_len, keys=keys, block=block, tile_rows=tile_rows)
    np.testing.assert_array_equal(got, visible_pairs(table, q_len=q_len, keys=keys, piece_length=piece_length))
    far = true_distances(table, q_len=q_len, keys=keys, piece_length=piece_length)
    np.testing.assert_array_equal(distances(schedule, q_len=q_len, keys=keys, block=block), far)
    items = schedule.items
    blocks = items[:, ITEM.index("blocks")]
    assert (np.diff(blocks) <= 0).all(), "not longest first"
    rows = np.zeros(q_len, dtype=int)
    for item in items:
        rows[item[2] : item[2] + item[3]] += 1
    expected = np.zeros(q_len, dtype=int)
    for strip in table.grouped:
        expected[strip[0].q_start : strip[0].q_start + strip[0].q_len] += 1
    np.testing.assert_array_equal(rows, expected)  # every row of every strip is written, also those that see nothing


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize(
    ("layout", "world_size", "left", "right", "total"),
    PLANS,
)
def test_plans(
    layout: str, world_size: int, left: int | None, right: int | None, total: int, schedule: str, block: int
) -> None:
    wanted = problem(1024, layout, world_size, left, right, total)
    for rank in range(world_size):
        for step in make_plan(wanted, rank, schedule).steps:
            if len(step.forward):
                check(step.forward, 1024 // world_size, block)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_packed_documents(layout: str, schedule: str) -> None:
    cu = [0, 3, 200, 201, 500, 640, 1000]
    wanted = PackedProblem.of(cu, cu, left=None, right=0, layout=layout, world_size=2)
    for rank in range(2):
        for step in make_plan(wanted, rank, schedule).steps:
            if len(step.forward):
                check(step.forward, 500, 128)


@pytest.mark.parametrize("seed", range(60))
def test_random_bands(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, groups, q = [], [0], 0
    for _ in range(rng.integers(1, 4)):
        q_len, count = int(rng.integers(1, 400)), int(rng.integers(1, 4))
        for n in range(count):
            k_len = int(rng.integers(0, 500))
            bounds = sorted(int(rng.integers(-q_len, k_len + 1)) for _ in range(2))
            if rng.random() < 0.1:
                bounds.reverse()  # nothing is visible
            flags = (FIRST if n == 0 else 0) | (LAST if n == count - 1 else 0)
            rows.append(Segment(q, q_len, n, int(rng.integers(0, 50)), k_len, *bounds, 0, 0, 1, -1, flags))
        groups.append(len(rows))
        q += q_len + int(rng.integers(0, 30))
    table = Table(np.array(rows, dtype=np.int32), np.array(groups, dtype=np.int32))
    check(table, q, int(rng.choice(BLOCKS)))


def test_full_mask_has_no_edges_and_causal_one_a_tile() -> None:
    full = make_plan(problem(1024, "contiguous", 1, None, None, 1024), 0, "gather").steps[0].forward
    causal = make_plan(problem(1024, "contiguous", 1, None, 0, 1024), 0, "gather").steps[0].forward
    make = {"tile_rows": 128, "block": 128, "piece_length": 1024}
    assert make_schedule(full, **make).walk[:, 5].tolist() == [0] * 8
    assert make_schedule(causal, **make).walk[:, 5].tolist() == [1] * 8
    assert sorted(make_schedule(causal, **make).items[:, 6].tolist()) == list(range(1, 9))


def test_batch_entries_of_their_own_are_told_apart() -> None:
    segment = Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, -1, FIRST | LAST)
    own = segment._replace(batch=1, q_start=200)
    table = Table(np.array([segment, own], dtype=np.int32), np.array([0, 1, 2], dtype=np.int32))
    schedule = make_schedule(table, tile_rows=128, block=128, piece_length=300)
    assert not schedule.every_batch
    items = schedule.for_batch(3)
    pairs = sorted((int(item[2]), int(item[4])) for item in items)
    assert pairs == [(0, 0), (0, 1), (0, 2), (128, 0), (128, 1), (128, 2), (200, 1), (328, 1)]


def test_items_carry_their_first_row_of_the_walk() -> None:
    strips = [
        [Segment(200 * n, 200, n, 0, k_len, -200, k_len, 0, 0, 1, -1, FIRST | LAST)]
        for n, k_len in enumerate((300, 0, 7))
    ]
    schedule = make_schedule(table_of(*strips), tile_rows=128, block=128, piece_length=300)
    items = with_first_walk(schedule.items, schedule.walk)
    assert items.shape == (6, 16) and items.dtype == np.int32
    seen = items[items[:, ITEM.index("walk_start")] < items[:, ITEM.index("walk_stop")]]
    assert len(seen) == 4 and sorted(seen[:, 8 + WALK.index("k_len")].tolist()) == [7, 7, 300, 300]
    np.testing.assert_array_equal(seen[:, 8:], schedule.walk[seen[:, 0], :8])
