"""Plans against brute force: every visible pair once, nothing else; messages meet. At 1,024 ranks: by counting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ring_core import ranges
from ring_core.layout import LAYOUTS, local_runs, multiple
from ring_core.plan import (
    FIRST,
    LAST,
    SCHEDULES,
    GatherPlan,
    Plan,
    Problem,
    RingPlan,
    Segment,
    Table,
    attention_flops,
    count_pairs,
    make_plan,
    message_bytes,
)
from ring_core.plan import tiling as tiling

Array = np.ndarray[Any, Any]
ABSENT = -(10**9)


@contextmanager
def strips_of(multiple_of: int) -> Iterator[None]:
    """Plans whose strips begin at small multiples, so that short sequences have several."""
    before = tiling.STRIP_MULTIPLE
    tiling.STRIP_MULTIPLE = multiple_of
    make_plan.cache_clear()
    try:
        yield
    finally:
        tiling.STRIP_MULTIPLE = before
        make_plan.cache_clear()


@st.composite
def problems(draw: st.DrawFn, world_sizes: st.SearchStrategy[int] = st.integers(1, 8)) -> Problem:  # noqa: B008
    """Any layout, mask, world size up to 8 and lengths, padded and not."""
    world_size, layout = draw(world_sizes), draw(st.sampled_from(LAYOUTS))
    step = multiple(layout, world_size)
    k_length = step * draw(st.integers(0, 10))
    q_length = k_length if draw(st.booleans()) else step * draw(st.integers(0, 10))
    q_total, k_total = q_length, k_length
    if draw(st.booleans()):
        k_total = draw(st.integers(max(0, k_length - 2 * step), k_length))
        q_total = k_total if q_length == k_length else draw(st.integers(max(0, q_length - 2 * step), q_length))
    side = st.one_of(st.none(), st.integers(0, 4), st.integers(0, 40))
    right = draw(st.one_of(st.just(0), side))
    return Problem(q_length, k_length, q_total, k_total, draw(side), right, layout, world_size)


def visible(problem: Problem) -> Array:
    """bool (Sq, Sk), from the definition."""
    left, right = problem.bounds
    query, key = np.arange(problem.q_length)[:, None], np.arange(problem.k_length)
    distance = key - (query + problem.k_total - problem.q_total)
    return (-left <= distance) & (distance <= right) & (key < problem.k_total) & (query < problem.q_total)


def indices(layout: str, rank: int, world_size: int, length: int) -> Array:
    """Global indices of a rank's tokens, written down from each layout's description alone."""
    everything = np.arange(length)
    if layout == "contiguous":
        return everything.reshape(world_size, -1)[rank]
    if layout == "stripe":
        return everything[rank::world_size]
    halves = everything.reshape(2 * world_size, -1)
    return np.concatenate([halves[rank], halves[2 * world_size - 1 - rank]])


def queries_of(problem: Problem, rank: int) -> Array:
    return indices(problem.layout, rank, problem.world_size, problem.q_length)


def keys_of(problem: Problem, rank: int) -> Array:
    return indices(problem.layout, rank, problem.world_size, problem.k_length)


def pieces(plan: Plan, step: int) -> list[Array]:
    """Global index of every key in the buffers a step reads; ABSENT where nothing was fetched."""
    problem = plan.problem
    if isinstance(plan, RingPlan):
        chunk = keys_of(problem, plan.source(step))
        parcel = plan.hops[step].receive if step else ((0, len(chunk)),)
        return [np.concatenate([chunk[:0], *(chunk[start:stop] for start, stop in parcel)])]
    held = [np.full(plan.piece_length, ABSENT) for _ in range(plan.piece_count)]
    for placement in plan.placements:
        chunk = keys_of(problem, placement.source)[placement.start : placement.start + placement.length]
        place = held[placement.piece][placement.offset : placement.offset + placement.length]
        assert len(chunk) == len(place) == placement.length > 0, placement
        assert (place == ABSENT).all(), f"{placement} lies on another"
        place[:] = chunk
    return held


def band(segment: Segment) -> Array:
    distance = np.arange(segment.k_len) - np.arange(segment.q_len)[:, None]
    return (segment.lower <= distance) & (distance <= segment.upper)


def check_segment(problem: Problem, segment: Segment, query: Array, key: Array) -> None:
    """A segment lies inside its buffers, where its positions say, with its band clamped."""
    assert len(query) == segment.q_len > 0 and len(key) == segment.k_len, segment
    assert -segment.q_len <= segment.lower <= segment.k_len, segment
    assert -segment.q_len <= segment.upper <= segment.k_len, segment
    assert segment.batch == -1, segment
    assert band(segment).sum() == segment.pairs, segment
    if segment.k_len:
        assert (key != ABSENT).all(), f"reads keys that were not fetched: {segment}"
        offset = problem.k_total - problem.q_total
        assert (query + offset == segment.q_position + segment.stride * np.arange(segment.q_len)).all(), segment
        assert (key == segment.k_position + segment.stride * np.arange(segment.k_len)).all(), segment
        assert segment.pairs, f"computes nothing: {segment}"


def check_groups(table: Table, query_major: bool) -> None:
    """Groups tile the table; rows of one share their strip; no row (or key) is in two, or two CTAs would write it."""
    assert table.groups[0] == 0 and table.groups[-1] == len(table) and (np.diff(table.groups) > 0).all()
    assert [segment for group in table.grouped for segment in group] == list(table.segments)
    spans = []
    for group in table.grouped:
        strips = {(0, s.q_start, s.q_len) if query_major else (s.piece, s.k_start, s.k_len) for s in group}
        assert len(strips) == 1, group
        spans.append(strips.pop())
    spans.sort()
    for (piece, start, length), (next_piece, next_start, _) in pairwise(spans):
        assert piece != next_piece or start + length <= next_start, spans


def check_rank(plan: Plan, forward: Array, backward: Array) -> None:
    """One rank's tables; adds what they cover to the counts (Sq, Sk)."""
    problem = plan.problem
    query_index = queries_of(problem, plan.rank)
    begun, ended = np.zeros(len(query_index), int), np.zeros(len(query_index), int)
    unbroken = True
    for number, step in enumerate(plan.steps):
        held = pieces(plan, number)
        nothing = np.zeros(0, int)
        for table, covered in ((step.forward, forward), (step.backward, backward)):
            check_groups(table, query_major=table is step.forward)
            for segment in table.segments:
                query = query_index[segment.q_start : segment.q_start + segment.q_len]
                there = held[segment.piece] if segment.k_len else nothing
                key = there[segment.k_start : segment.k_start + segment.k_len]
                check_segment(problem, segment, query, key)
                covered[np.ix_(query, key)] += band(segment)
        for group in step.forward.grouped:
            unbroken &= bool(group[0].flags & FIRST) and bool(group[-1].flags & LAST)
        for segment in step.forward.segments:
            rows = slice(segment.q_start, segment.q_start + segment.q_len)
            begun[rows] += bool(segment.flags & FIRST)
            assert (begun[rows] == 1).all() and not ended[rows].any(), f"out of turn: {segment}"
            ended[rows] += bool(segment.flags & LAST)
        assert not any(segment.flags for segment in step.backward.segments)
    assert (begun == 1).all() and (ended == 1).all()
    assert plan.spans_steps == (not unbroken)


def check_coverage(problem: Problem, schedule: str) -> None:
    seen = visible(problem)
    forward, backward = np.zeros(seen.shape, int), np.zeros(seen.shape, int)
    for rank in range(problem.world_size):
        plan = make_plan(problem, rank, schedule)
        before = forward.sum()
        check_rank(plan, forward, backward)
        assert plan.pairs == forward.sum() - before == sum(step.backward.pairs for step in plan.steps)
    assert (forward == seen).all() and (backward == seen).all()
    assert problem.visible_pairs() == seen.sum()


def check_ring_messages(plans: list[RingPlan]) -> None:
    """Follows every chunk round the ring, then its gradients home."""
    problem, world_size = plans[0].problem, len(plans)
    for plan in plans:
        after = plans[(plan.rank + 1) % world_size]
        for step in range(1, world_size):
            assert plan.hops[step].send == after.hops[step].receive
    for owner in plans:
        summed: set[int] = set()
        arriving: ranges.Ranges = ()
        home = None
        for step in range(1, world_size):
            visitor = plans[(owner.rank + step) % world_size]
            hop = visitor.gradient_hops[step]
            assert hop.arriving == arriving
            assert tokens(hop.holding) == tokens(hop.arriving) | tokens(hop.own)
            assert tokens(hop.own) <= tokens(visitor.hops[step].receive)
            summed |= tokens(hop.own)
            arriving = ()
            if hop.target == owner.rank:
                assert home is None, "gradients come home twice"
                home = (visitor.rank, step, hop.holding)
            elif hop.target is not None:
                assert hop.target == (visitor.rank + 1) % world_size
                arriving = hop.holding
        assert owner.home == home
        assert tokens(home[2] if home else ()) == summed, "gradients got lost on the way"
        assert problem.world_size > 1 or owner.home is None


def check_gather_messages(plans: list[GatherPlan]) -> None:
    for plan in plans:
        for peer, wanted in plan.send.items():
            assert plans[peer].receive[plan.rank] == wanted
        for peer, taken in plan.receive.items():
            assert plans[peer].send[plan.rank] == taken
        assert plan.rank not in plan.order[1:], "own keys are there first"
        assert set(plan.order) - {plan.rank} == set(plan.receive)
        read = [keys_of(plan.problem, p.source)[p.start - p.offset] for p in plan.placements]
        assert read == sorted(read), "pieces are not in global order"
        assert {placement.piece for placement in plan.placements} == set(range(plan.piece_count))


def tokens(held: ranges.Ranges) -> set[int]:
    return {token for start, stop in held for token in range(start, stop)}


def check_messages(problem: Problem, schedule: str) -> None:
    plans: list[Any] = [make_plan(problem, rank, schedule) for rank in range(problem.world_size)]
    (check_ring_messages if schedule == "ring" else check_gather_messages)(plans)
    seen = visible(problem)
    needed = [  # by rank, then owner: which of the owner's tokens it sees
        [
            set(np.flatnonzero(seen[np.ix_(queries_of(problem, rank), keys_of(problem, owner))].any(axis=0)).tolist())
            for owner in range(problem.world_size)
        ]
        for rank in range(problem.world_size)
    ]
    for plan in plans:
        rank = plan.rank
        assert rank not in plan.key_tokens and rank not in plan.gradient_tokens
        for distance in range(1, problem.world_size):
            owner = (rank - distance) % problem.world_size
            if schedule == "gather":
                assert tokens(plan.receive.get(owner, ())) == needed[rank][owner], "sends what nobody sees"
            else:  # for this rank and those behind it, up to the owner
                behind = range(problem.world_size - distance)
                wanted = set().union(*(needed[(rank + n) % problem.world_size][owner] for n in behind))
                assert tokens(plan.hops[distance].receive) == wanted, "sends what nobody further on sees"
                own = plan.gradient_hops[distance].own
                assert tokens(own) == needed[rank][owner]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(problems(), st.sampled_from([1, 4, 128]))
# A window narrower than the stripe: most ranks see nothing of each other.
@example(Problem(24, 24, 24, 24, 0, 0, "stripe", 4), 4)
@example(Problem(0, 0, 0, 0, None, 0, "zigzag", 3), 4)
@example(Problem(16, 48, 13, 41, 5, 3, "zigzag", 4), 4)
def test_every_visible_pair_is_covered_exactly_once(problem: Problem, strip: int) -> None:
    with strips_of(strip):
        for schedule in SCHEDULES:
            check_coverage(problem, schedule)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(problems())
@example(Problem(24, 24, 24, 24, 0, 0, "stripe", 4))
def test_messages_meet_and_carry_only_what_is_seen(problem: Problem) -> None:
    for schedule in SCHEDULES:
        check_messages(problem, schedule)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(None, 0), (None, None), (700, 0), (300, 200)], ids=str)
def test_strips_as_kernels_get_them(layout: str, window: tuple[int | None, int | None]) -> None:
    """The same, with the true strip multiple and chunks of several strips."""
    problem = Problem(1536, 1536, 1400, 1400, *window, layout, 2)
    for schedule in SCHEDULES:
        check_coverage(problem, schedule)
        for rank in range(2):
            for step in make_plan(problem, rank, schedule).steps:
                for segment in step.forward.segments:
                    runs = local_runs(layout, rank, 2, 1536)
                    run = max(run.start for run in runs if run.start <= segment.q_start)
                    if segment.k_len:
                        assert (segment.q_start - run) % tiling.STRIP_MULTIPLE == 0, "a kernel's tile is cut in two"


# --- 1,024 ranks

LARGE = 1024
MILLION = 1 << 20


@pytest.mark.parametrize(
    "problem",
    [
        Problem(16 * LARGE, 16 * LARGE, 16 * LARGE - 9, 16 * LARGE - 9, None, 0, "contiguous", LARGE),
        Problem(4096, 4096, 4000, 4000, 1500, 0, "zigzag", 128),
        Problem(2048, 4096, 2048, 4096, 700, 300, "stripe", 128),
    ],
    ids=lambda problem: f"{problem.layout}-{problem.world_size}",
)
def test_all_of_hundreds_of_ranks_together_see_every_pair(problem: Problem) -> None:
    pairs = backward = sent = received = 0
    for rank in range(problem.world_size):
        plan = make_plan.__wrapped__(problem, rank, "gather")  # uncached: a thousand plans are a lot of memory
        pairs += plan.pairs
        backward += plan.steps[0].backward.pairs
        sent += sum(plan.key_tokens.values())
        received += sum(plan.gradient_tokens.values())
    assert pairs == backward == problem.visible_pairs()
    assert sent == received


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_of_1024_ranks_sees_what_its_rows_see(layout: str, schedule: str, seed: int) -> None:
    """Random masks and lengths, padded; counted row by row."""
    random = np.random.default_rng(seed)
    for _ in range(6):
        rank, length = int(random.integers(LARGE)), 2 * LARGE * int(random.integers(1, 200))
        total = length - int(random.integers(2 * LARGE))
        left, right = (None if random.random() < 0.3 else int(random.integers(4 * length // LARGE)) for _ in range(2))
        problem = Problem(length, length, total, total, left, right, layout, LARGE)
        plan = make_plan.__wrapped__(problem, rank, schedule)
        row = indices(layout, rank, LARGE, length)
        row = row[row < total]
        low = np.maximum(row - problem.bounds[0], 0)
        high = np.minimum(row + problem.bounds[1], total - 1)
        expected = int((high - low + 1).sum())
        assert plan.pairs == expected == sum(step.backward.pairs for step in plan.steps), (problem, rank)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_of_1024_ranks_with_a_million_tokens(layout: str, schedule: str) -> None:
    """Counted against each rank's own rows, by closed form; and nothing leaves int32."""
    problem = Problem(MILLION, MILLION, MILLION, MILLION, None, 0, layout, LARGE)
    for rank in (0, 511, 512, 1023):
        plan = make_plan.__wrapped__(problem, rank, schedule)
        expected = int((indices(layout, rank, LARGE, MILLION) + 1).sum())  # causal: row i sees i + 1 keys
        assert plan.pairs == expected == sum(step.backward.pairs for step in plan.steps)
        check_int32(plan)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_near_the_end_of_int32(layout: str) -> None:
    length = (1 << 31) - (1 << 16)  # 2 Gi tokens
    problem = Problem(length, length, length, length, 100_000, 0, layout, LARGE)
    for rank in (0, 700, 1023):
        plan = make_plan.__wrapped__(problem, rank, "gather")
        index = [(run.index, run.length, run.stride) for run in local_runs(layout, rank, LARGE, length)]
        expected = sum(int(np.minimum(first + stride * np.arange(n), 100_000).sum()) + n for first, n, stride in index)
        assert plan.pairs == expected
        check_int32(plan)


def check_int32(plan: Plan) -> None:
    for step in plan.steps:
        for table in (step.forward, step.backward):
            assert table.rows.dtype == table.groups.dtype == np.int32
            for name in ("q_len", "k_len", "q_start", "k_start", "piece", "k_position"):
                assert (table.rows[:, Segment._fields.index(name)] >= 0).all(), f"{name} wrapped round"


@pytest.mark.parametrize("layout", ["zigzag", "stripe"])
def test_causal_work_is_even(layout: str) -> None:
    world_size, length = 16, 16 * 4096
    problem = Problem(length, length, length, length, None, 0, layout, world_size)
    for schedule in SCHEDULES:
        pairs = [make_plan(problem, rank, schedule).pairs for rank in range(world_size)]
        assert max(pairs) / (sum(pairs) / world_size) <= 1.01


def test_contiguous_causal_work_is_uneven() -> None:
    """What the other layouts are for; keeps the test above from passing by accident."""
    problem = Problem(4096, 4096, 4096, 4096, None, 0, "contiguous", 4)
    pairs = [make_plan(problem, rank, "gather").pairs for rank in range(4)]
    assert pairs[3] > 6 * pairs[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_windows_send_windows(schedule: str) -> None:
    """A rank of 64 sends its neighbour the 1,000 keys that the window reaches, and nothing to anyone else."""
    length = 64 * 4096
    problem = Problem(length, length, length, length, 1000, 0, "contiguous", 64)
    for rank in (0, 5, 62):
        plan = make_plan(problem, rank, schedule)
        assert plan.key_tokens == {rank + 1: 1000}
        assert plan.gradient_tokens == ({} if rank == 0 else {rank - 1: 1000})
    assert make_plan(problem, 63, schedule).key_tokens == {}
    zigzag = Problem(length, length, length, length, 1000, 0, "zigzag", 64)
    halves = make_plan(zigzag, 5, schedule).key_tokens
    assert sum(halves.values()) <= 2 * 1000 * (1 if schedule == "gather" else 64)


def test_causal_contiguous_ring_sends_nothing_to_those_before() -> None:
    problem = Problem(64, 64, 64, 64, None, 0, "contiguous", 8)
    assert [sum(make_plan(problem, rank, "ring").key_tokens.values()) for rank in range(8)] == [
        8 * (rank + 1) if rank < 7 else 0 for rank in range(8)
    ]


# --- counting

SMALL = st.integers(0, 12)
BOUND = st.integers(-16, 16)


@given(SMALL, SMALL, BOUND, BOUND)
def test_count_pairs(q_len: int, k_len: int, lower: int, upper: int) -> None:
    pairs = sum(lower <= j - i <= upper for i in range(q_len) for j in range(k_len))
    assert count_pairs(*(np.array([x]) for x in (q_len, k_len, lower, upper)))[0] == pairs


def test_count_pairs_does_not_overflow() -> None:
    whole = np.array([1 << 30], np.int32)
    assert count_pairs(whole, whole, -whole, np.zeros(1, np.int32))[0] == (1 << 30) * ((1 << 30) + 1) // 2


@given(problems())
def test_visible_pairs(problem: Problem) -> None:
    assert problem.visible_pairs() == visible(problem).sum()


@given(problems())
def test_padding_rows(problem: Problem) -> None:
    for rank in range(problem.world_size):
        rows = [row for start, stop in problem.padding_rows(rank) for row in range(start, stop)]
        assert rows == np.flatnonzero(queries_of(problem, rank) >= problem.q_total).tolist()


def test_cost() -> None:
    # 2 products of 2 * pairs * D operations forward; 5 backward
    assert attention_flops(10, batch=2, num_heads=3, head_dim=64) == 2 * 2 * 10 * 2 * 3 * 64
    assert attention_flops(10, batch=2, num_heads=3, head_dim=64, backward=True) == 5 * 2 * 10 * 2 * 3 * 64
    assert message_bytes(7, batch=2, num_kv_heads=3, head_dim=64, element_size=2) == 2 * 7 * 2 * 3 * 64 * 2


def test_flops_and_bytes_of_a_full_mask_on_hundreds_of_ranks() -> None:
    problem = Problem(512 * 64, 512 * 64, 512 * 64, 512 * 64, None, None, "contiguous", 512)
    for schedule in SCHEDULES:
        plan = make_plan.__wrapped__(problem, 100, schedule)
        assert plan.pairs == 64 * 512 * 64
        assert sum(plan.key_tokens.values()) == 511 * 64  # every chunk but one leaves each rank once
        assert sum(plan.gradient_tokens.values()) == 511 * 64


# --- wrong arguments


def test_lengths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"q_length=10 is no multiple of 8 \(zigzag, 4 ranks\)"):
        Problem(10, 8, 8, 8, None, 0, "zigzag", 4)
    with pytest.raises(ValueError, match=r"k_total must be in \[0, k_length=8\]: got 9"):
        Problem(8, 8, 8, 9, None, 0, "zigzag", 4)


def test_unknown_rank_and_schedule() -> None:
    problem = Problem(8, 8, 8, 8, None, 0, "contiguous", 4)
    with pytest.raises(ValueError, match="rank 4 is not in a world of 4"):
        make_plan(problem, 4, "ring")
    with pytest.raises(ValueError, match="unknown schedule 'star'; there are 'ring', 'gather'"):
        make_plan(problem, 0, "star")


def test_plans_are_cached() -> None:
    problem = Problem(8, 8, 8, 8, None, 0, "contiguous", 4)
    assert make_plan(problem, 1, "ring") is make_plan(Problem(8, 8, 8, 8, None, 0, "contiguous", 4), 1, "ring")


# --- ranges

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6)


@given(RANGES)
def test_merged_ranges(pairs: list[tuple[int, int]]) -> None:
    merged = ranges.merge(pairs)
    assert tokens(merged) == tokens(tuple(pairs))
    assert ranges.count(merged) == len(tokens(merged))
    assert all(stop < start for (_, stop), (start, _) in pairwise(merged))


@given(RANGES, RANGES)
def test_overlapping_ranges(source: list[tuple[int, int]], target: list[tuple[int, int]]) -> None:
    a, b = ranges.merge(source), ranges.merge(target)
    packed_a, packed_b = ([x for start, stop in held for x in range(start, stop)] for held in (a, b))
    found = set()
    for at, into, n in ranges.overlaps(a, b):
        assert packed_a[at : at + n] == packed_b[into : into + n]
        found |= set(packed_a[at : at + n])
    assert found == set(packed_a) & set(packed_b)
