"""The backward's walk over key tiles and blocks of queries visits each visible pair once and no other."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hopper_backward_walk import blocks_of, distances, true_distances, visible_pairs, visits
from hopper_plans import PLANS, problem

from ring_core.key_tiles import ITEM, Schedule, make_schedule
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.segment import Segment, Table
from ring_core.testing.direct import table_of

BLOCKS = (64, 128)


def check(
    table: Table, q_len: int, block: int, *, tile_keys: int = 128, members: int = 1, by_piece: bool = False
) -> None:
    pieces = 1 + max((s.piece for s in table.segments), default=0)
    length = max((s.k_start + s.k_len for s in table.segments), default=1) + 3
    schedule = make_schedule(table, tile_keys=tile_keys, block=block, by_piece=by_piece)
    shape = {"q_len": q_len, "pieces": pieces, "length": length}
    got = visits(schedule, **shape, block=block, tile_keys=tile_keys, members=members)
    wanted = visible_pairs(table, **shape)
    for head in got:
        np.testing.assert_array_equal(head, wanted)
    np.testing.assert_array_equal(distances(schedule, **shape, block=block), true_distances(table, **shape))
    blocks = schedule.items[:, ITEM.index("blocks")]
    if not by_piece:
        assert (np.diff(blocks) <= 0).all(), "not longest first"
    keys = np.zeros((pieces, length), dtype=int)
    for item in schedule.items.tolist():
        keys[item[5], item[2] : item[2] + item[3]] += 1
    expected = np.zeros_like(keys)
    for strip in table.grouped:
        expected[strip[0].piece, strip[0].k_start : strip[0].k_start + strip[0].k_len] += 1
    np.testing.assert_array_equal(keys, expected)  # every key of every strip has its tile, also those nobody sees


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
            if len(step.backward):
                check(step.backward, 1024 // world_size, block, by_piece=rank % 2 == 1)


@pytest.mark.parametrize("block", BLOCKS)
def test_keys_that_some_query_sees(block: int) -> None:
    """By tiles: all keys of a plan's strips, which follow the visible edge; those of a tile without blocks are none."""
    for layout, world_size, left, right, total in PLANS:
        wanted = problem(1024, layout, world_size, left, right, total)
        for step in make_plan(wanted, world_size - 1, "ring").steps:
            strips = sum(strip[0].k_len for strip in step.backward.grouped)
            for batch in (1, 3):
                schedule = make_schedule(step.backward, tile_keys=128, block=block)
                assert schedule.seen_keys(batch) == batch * strips
    strips = [
        [Segment(0, 64, 0, 0, 200, -64, 40, 0, 0, 1, -1, 3)],  # up to key 103: one tile of two
        [Segment(0, 64, 0, 200, 50, 10, 5, 0, 0, 1, -1, 3)],  # an empty band
        [Segment(0, 64, 0, 250, 30, -64, 30, 0, 0, 1, 1, 3)],  # of one batch entry
    ]
    assert make_schedule(table_of(*strips), tile_keys=128, block=block).seen_keys(3) == 3 * 128 + 30


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_packed_documents(layout: str, schedule: str) -> None:
    cu = [0, 3, 200, 201, 500, 640, 1000]
    wanted = PackedProblem.of(cu, cu, left=None, right=0, layout=layout, world_size=2)
    for rank in range(2):
        for step in make_plan(wanted, rank, schedule).steps:
            if len(step.backward):
                check(step.backward, 500, 64)


@pytest.mark.parametrize("seed", range(60))
def test_random_bands(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, groups, q_len, used = [], [0], int(rng.integers(1, 500)), {}
    for _ in range(rng.integers(1, 4)):
        piece, k_len = int(rng.integers(0, 3)), int(rng.integers(1, 400))
        k_start = used.get(piece, int(rng.integers(0, 50)))
        used[piece] = k_start + k_len
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(0, q_len))
            count = int(rng.integers(1, q_len - start + 1))
            bounds = sorted(int(rng.integers(-count, k_len + 1)) for _ in range(2))
            if rng.random() < 0.1:
                bounds.reverse()  # nothing is visible
            rows.append(Segment(start, count, piece, k_start, k_len, *bounds, 0, 0, 1, -1, 0))
        groups.append(len(rows))
    table = Table(np.array(rows, dtype=np.int32), np.array(groups, dtype=np.int32))
    check(table, q_len, int(rng.choice(BLOCKS)), members=int(rng.integers(1, 4)), by_piece=bool(seed % 2))


def edges(schedule: Schedule) -> list[int]:
    found = []
    for values in schedule.items.tolist():
        blocks = blocks_of(schedule, dict(zip(ITEM, values, strict=True)))
        found.append(sum(b < row["whole_from"] or b >= row["whole_to"] for row, b, _ in blocks))
    return found


def test_full_mask_has_no_edges_and_causal_two_a_tile() -> None:
    full = make_plan(problem(1024, "contiguous", 1, None, None, 1024), 0, "gather").steps[0].backward
    causal = make_plan(problem(1024, "contiguous", 1, None, 0, 1024), 0, "gather").steps[0].backward
    assert edges(make_schedule(full, tile_keys=128, block=64)) == [0] * 8
    assert edges(make_schedule(causal, tile_keys=128, block=64)) == [2] * 8
    assert edges(make_schedule(causal, tile_keys=128, block=128)) == [1] * 8
    blocks = make_schedule(causal, tile_keys=128, block=128).items[:, ITEM.index("blocks")]
    assert blocks.tolist() == list(range(8, 0, -1))


def test_pieces_one_after_the_other() -> None:
    strips = [
        [Segment(0, rows, piece, 0, 256, -rows, 256, 0, 0, 1, -1, 0)] for piece, rows in ((2, 100), (0, 900), (1, 300))
    ]
    table = Table(np.array([s for strip in strips for s in strip], dtype=np.int32), np.arange(4, dtype=np.int32))
    of = lambda by_piece: make_schedule(table, tile_keys=128, block=64, by_piece=by_piece).items[:, 5].tolist()  # noqa: E731
    assert of(True) == [2, 2, 0, 0, 1, 1]  # the table's order
    assert of(False) == [0, 0, 1, 1, 2, 2]  # longest first


def test_batch_entries_of_their_own_are_told_apart() -> None:
    segment = Segment(0, 200, 0, 0, 200, -200, 300, 0, 0, 1, -1, 0)
    own = segment._replace(batch=1, k_start=200)
    table = Table(np.array([segment, own], dtype=np.int32), np.array([0, 1, 2], dtype=np.int32))
    schedule = make_schedule(table, tile_keys=128, block=64)
    assert not schedule.every_batch
    pairs = sorted((int(item[2]), int(item[4])) for item in schedule.for_batch(3))
    assert pairs == [(0, 0), (0, 1), (0, 2), (128, 0), (128, 1), (128, 2), (200, 1), (328, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_batches", [8, 16, 32, 64])
@pytest.mark.parametrize("length", [4096, 8192, 16384])
def test_sections_keep_processors_busy(length: int, head_batches: int, causal: bool) -> None:
    """Tiles dealt out in the kernel's order to whoever is free."""
    right, processors = 0 if causal else None, 132
    step = make_plan(Problem(length, length, length, length, None, right, "contiguous", 1), 0, "gather").steps[0]
    schedule = make_schedule(step.backward, tile_keys=128, block=64)
    blocks = schedule.items[:, ITEM.index("blocks")].tolist()
    section = schedule.section(head_batches, 1, processors)
    until = [0] * processors
    for first in range(0, head_batches, section):
        for tile in blocks:
            for _ in range(min(section, head_batches - first)):
                heapq.heapreplace(until, until[0] + tile)
    busy = sum(blocks) * head_batches / processors / max(until)
    work = sum(blocks) / blocks[0]  # longest tiles a head
    assert busy > min(0.95, work * head_batches / processors / -(-work * head_batches // processors) - 0.01)
    assert schedule.section(head_batches, head_batches, processors) == head_batches
