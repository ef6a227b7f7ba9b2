"""Plans of packed documents against brute force, and dealing them out by work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ring_core.plan import FIRST, LAST, PACKED_LAYOUTS, SCHEDULES, GatherPlan, PackedProblem, RingPlan, make_plan
from ring_core.ranges import Ranges

Array = np.ndarray[Any, Any]


def packed(
    lengths: list[int],
    k_lengths: list[int] | None = None,
    *,
    mask: tuple[int | None, int | None] = (None, 0),
    layout: str = "contiguous",
    world_size: int = 1,
) -> PackedProblem:
    ends = [[0, *np.cumsum(lens).tolist()] for lens in (lengths, lengths if k_lengths is None else k_lengths)]
    return PackedProblem.of(ends[0], ends[1], *mask, layout, world_size)


@st.composite
def problems(draw: st.DrawFn, world_sizes: st.SearchStrategy[int] = st.integers(1, 8)) -> PackedProblem:  # noqa: B008
    """Any layout, mask and documents: empty ones, of one token, giants, with other numbers of keys; any number of
    tokens."""
    length = st.one_of(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30), st.just(90))
    lengths = draw(st.lists(length, max_size=7))
    k_lengths = None
    if draw(st.integers(0, 2)) == 0:
        k_lengths = [draw(length) for _ in lengths]
    side = st.one_of(st.none(), st.integers(0, 4), st.integers(0, 40))
    mask = draw(side), draw(st.one_of(st.just(0), side))
    layout = draw(st.sampled_from(PACKED_LAYOUTS))
    return packed(lengths, k_lengths, mask=mask, layout=layout, world_size=draw(world_sizes))


def visible(problem: PackedProblem) -> Array:
    """bool (Tq, Tk), from the definition."""
    documents = problem.documents
    left, right = documents.bounds
    seen = np.zeros((problem.q_length, problem.k_length), bool)
    for (q0, q1), (k0, k1) in zip(pairwise(documents.cu_q.tolist()), pairwise(documents.cu_k.tolist()), strict=True):
        distance = np.arange(k1 - k0) - (np.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0))
        seen[q0:q1, k0:k1] = (-left <= distance) & (distance <= right)
    return seen


def held(problem: PackedProblem, rank: int) -> tuple[Array, Array]:
    """Indices of the queries and of the keys that a rank holds."""
    streams = ((problem.queries, problem.q_length), (problem.keys, problem.k_length))
    found = [[np.arange(start, stop) for start, stop in cells.runs(rank)] for cells, _ in streams]
    queries, keys = (np.concatenate([np.zeros(0, int), *parts]) for parts in found)
    return queries, keys


def tokens(ranges: Ranges) -> set[int]:
    return {token for start, stop in ranges for token in range(start, stop)}


def buffers(plan: Any, step: int) -> Array:
    """Index of every key in the one piece that a step reads."""
    problem = plan.problem
    if isinstance(plan, RingPlan):
        _, chunk = held(problem, plan.source(step))
        parcel = plan.hops[step].receive if step else ((0, len(chunk)),)
        return np.concatenate([chunk[:0], *(chunk[start:stop] for start, stop in parcel)])
    assert plan.piece_count == 1
    if step == 1:  # of queries that see own keys only
        own: Array = held(problem, plan.rank)[1][slice(*plan.home)]
        return own
    piece = np.full(plan.piece_length, -1)
    places = [(placement.piece, placement.offset) for placement in plan.placements]
    assert places == sorted(places)
    for source, start, length, number, offset in plan.placements:
        assert number == 0 and (piece[offset : offset + length] == -1).all()
        assert set(range(start, start + length)) <= tokens(
            plan.receive[source] if source != plan.rank else ((0, problem.key_chunk(source)),)
        )
        piece[offset : offset + length] = held(problem, source)[1][start : start + length]
    assert (piece >= 0).all() and (np.diff(piece) > 0).all(), "not in stream order"
    return piece


def check_rank(plan: Any, forward: Array, backward: Array) -> None:
    """One rank's tables; adds what they cover to the counts (Tq, Tk)."""
    problem = plan.problem
    documents = problem.documents
    query_index, _ = held(problem, plan.rank)
    begun, ended = np.zeros(len(query_index), int), np.zeros(len(query_index), int)
    unbroken = True
    for number, step in enumerate(plan.steps):
        piece = buffers(plan, number)
        for table, covered in ((step.forward, forward), (step.backward, backward)):
            assert [segment for group in table.grouped for segment in group] == list(table.segments)
            spans = []
            for group in table.grouped:
                strips = {(s.q_start, s.q_len) if covered is forward else (s.k_start, s.k_len) for s in group}
                assert len(strips) == 1, group
                spans.append(strips.pop())
            for (start, length), (following, _) in pairwise(sorted(spans)):
                assert start + length <= following, "two strips share a row"
            for segment in table.segments:
                query = query_index[segment.q_start : segment.q_start + segment.q_len]
                assert len(query) == segment.q_len > 0 and segment.piece == 0 and segment.batch == -1
                assert segment.stride == 1 and (np.diff(query) == 1).all()
                document = documents.of_query(query)
                assert len(set(document.tolist())) == 1, "a strip crosses documents"
                position = query + documents.offset(document)
                assert position[0] == segment.q_position
                if segment.k_len:
                    key = piece[segment.k_start : segment.k_start + segment.k_len]
                    assert (key == segment.k_position + np.arange(segment.k_len)).all()
                    distance = np.arange(segment.k_len) - np.arange(segment.q_len)[:, None]
                    band = (segment.lower <= distance) & (distance <= segment.upper)
                    assert band.sum() == segment.pairs > 0
                    assert -segment.q_len <= segment.lower <= segment.k_len
                    assert -segment.q_len <= segment.upper <= segment.k_len
                    covered[np.ix_(query, key)] += band
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


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(problems())
@example(packed([], layout="balanced", world_size=3))
@example(packed([0, 0], [0, 5], layout="zigzag", world_size=2))
@example(packed([5, 0], [0, 7], layout="balanced", world_size=4))
@example(packed([1, 1, 1], layout="balanced", world_size=8))
def test_every_visible_pair_is_computed_once_on_the_right_rank(problem: PackedProblem) -> None:
    seen = visible(problem)
    for schedule in SCHEDULES:
        forward, backward = np.zeros(seen.shape, int), np.zeros(seen.shape, int)
        for rank in range(problem.world_size):
            plan = make_plan.__wrapped__(problem, rank, schedule)
            before = forward.sum()
            check_rank(plan, forward, backward)
            found = forward.sum() - before
            assert plan.pairs == found == problem.pairs[rank] == sum(step.backward.pairs for step in plan.steps)
        assert (forward == seen).all() and (backward == seen).all()
    assert problem.visible_pairs() == seen.sum()


def seen_by_waiting(problem: PackedProblem, seen: Array, rank: int) -> set[int]:
    """Keys that a rank's queries see in documents of which they see keys of others too: those that lie with theirs
    among a rank's queries count as one, as one strip of a kernel."""
    queries, own = np.sort(held(problem, rank)[0]), held(problem, rank)[1]
    document = problem.documents.of_query(queries)
    found: set[int] = set()
    for part in np.split(queries, np.flatnonzero((np.diff(queries) != 1) | (np.diff(document) != 0)) + 1):
        keys = set(np.flatnonzero(seen[part].any(axis=0)).tolist())
        if keys - set(own.tolist()):
            found |= keys
    return found


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(problems())
def test_what_waits_comes_first_in_balanced_layouts(problem: PackedProblem) -> None:
    if problem.layout != "balanced" or problem.documents.cu_q.tolist() != problem.documents.cu_k.tolist():
        return
    for rank in range(problem.world_size):
        plan = make_plan.__wrapped__(problem, rank, "gather")
        waiting = [(s.q_start, s.q_start + s.q_len) for s in plan.steps[0].forward.segments]
        assert max((stop for _, stop in waiting), default=0) == sum(stop - start for start, stop in waiting)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(problems())
def test_only_keys_that_are_seen_travel(problem: PackedProblem) -> None:
    world_size, seen = problem.world_size, visible(problem)
    needed = [
        [
            set(np.flatnonzero(seen[np.ix_(held(problem, rank)[0], held(problem, owner)[1])].any(axis=0)).tolist())
            for owner in range(world_size)
        ]
        for rank in range(world_size)
    ]
    assert problem.most_needed == max(sum(map(len, row)) for row in needed)
    gathers: list[Any] = [make_plan.__wrapped__(problem, rank, "gather") for rank in range(world_size)]
    rings: list[Any] = [make_plan.__wrapped__(problem, rank, "ring") for rank in range(world_size)]
    for rank in range(world_size):
        gather, ring = gathers[rank], rings[rank]
        assert isinstance(gather, GatherPlan)
        assert gather.piece_length == len(seen_by_waiting(problem, seen, rank))
        if gather.home is not None:
            start, stop = gather.home
            assert 0 <= start <= stop <= problem.key_chunk(rank)
            read = [(s.k_start, s.k_start + s.k_len) for s in gather.steps[1].backward.segments]
            assert not read or (min(read)[0], max(stop for _, stop in read)) == (0, stop - start)
        assert rank not in gather.order[1:] and set(gather.order) - {rank} == set(gather.receive)
        for peer, given_away in gather.send.items():
            assert gathers[peer].receive[rank] == given_away
        assert sum(map(len, gather.receive.values())) == sum(len(other.send.get(rank, ())) for other in gathers)
        for distance in range(1, world_size):
            owner = (rank - distance) % world_size
            assert tokens(gather.receive.get(owner, ())) == needed[rank][owner]
            behind = range(world_size - distance)
            wanted = set().union(*(needed[(rank + n) % world_size][owner] for n in behind))
            assert tokens(ring.hops[distance].receive) == wanted, "sends what nobody further on sees"
            assert tokens(ring.gradient_hops[distance].own) == (needed[rank][owner] if wanted else set())
            after = rings[(rank + 1) % world_size]
            assert ring.hops[distance].send == after.hops[distance].receive
    for owner_plan in rings:  # gradients follow the chunk and come home
        owner, arriving, summed, home = owner_plan.rank, (), set(), None
        for distance in range(1, world_size):
            hop = rings[(owner + distance) % world_size].gradient_hops[distance]
            assert hop.arriving == arriving
            assert tokens(hop.holding) == tokens(hop.arriving) | tokens(hop.own)
            summed |= tokens(hop.own)
            arriving = ()
            if hop.target == owner:
                assert home is None
                home = ((owner + distance) % world_size, distance, hop.holding)
            elif hop.target is not None:
                assert hop.target == (owner + distance + 1) % world_size
                arriving = hop.holding
        assert owner_plan.home == home and tokens(home[2] if home else ()) == summed


@settings(max_examples=60, deadline=None, print_blob=True)
@given(problems(st.integers(1, 64)))
def test_tokens_are_dealt_out_evenly(problem: PackedProblem) -> None:
    for cells, length in ((problem.queries, problem.q_length), (problem.keys, problem.k_length)):
        everything = [token for rank in range(problem.world_size) for run in cells.runs(rank) for token in range(*run)]
        assert sorted(everything) == list(range(length))
        sizes = [sum(stop - start for start, stop in cells.runs(rank)) for rank in range(problem.world_size)]
        assert sizes == cells.lengths.tolist() and max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None, print_blob=True)
@given(problems(st.integers(1, 64)))
def test_a_problem_is_its_code(problem: PackedProblem) -> None:
    again = PackedProblem.decode(problem.code)
    assert again == problem and hash(again) == hash(problem) and again.code == problem.code
    documents, theirs = problem.documents, again.documents
    assert (documents.cu_q == theirs.cu_q).all() and (documents.cu_k == theirs.cu_k).all()
    assert (documents.left, documents.right) == (theirs.left, theirs.right)
    other = PackedProblem.of(documents.cu_q, documents.cu_k, 77, documents.right, problem.layout, problem.world_size)
    assert other != problem


# --- balanced by work

SHARE = 1.03


def realistic(kind: str, tokens: int, random: np.random.Generator) -> list[int]:
    lengths: list[int] = []
    if kind == "equal":
        return [tokens // 64] * 64
    if kind == "giant":
        lengths = [tokens // 2]
    while (left := tokens - sum(lengths)) > 0:
        if kind == "log-normal":
            drawn = int(np.clip(random.lognormal(np.log(1500), 1.3), 64, 16384))
        else:
            drawn = int(random.integers(16, 700))
        lengths.append(min(drawn, left))
    if kind == "giant":  # somewhere
        at = int(random.integers(len(lengths)))
        lengths[0], lengths[at] = lengths[at], lengths[0]
    return lengths


@pytest.mark.parametrize("mask", [(None, 0), (None, None), (4096, 0)], ids=["causal", "full", "window"])
@pytest.mark.parametrize("kind", ["log-normal", "giant", "small", "equal", "one"])
def test_work_is_equal_within_three_percent(kind: str, mask: tuple[int | None, int | None], seed: int) -> None:
    random = np.random.default_rng(seed)
    for world_size in (2, 3, 4, 8, 16, 64):
        tokens = world_size * int(random.integers(4000, 12000)) + int(random.integers(world_size))
        lengths = [tokens] if kind == "one" else realistic(kind, tokens, random)
        problem = packed(lengths, mask=mask, layout="balanced", world_size=world_size)
        assert max(problem.pairs) / np.mean(problem.pairs) <= SHARE, (world_size, lengths)
        runs = [0] * world_size  # neighbours in the stream are one, wherever they lie in the tensor
        for owner in problem.queries.owner[np.append(True, np.diff(problem.queries.owner) != 0)]:
            runs[owner] += 1
        assert sum(runs) <= 2 * world_size - 1 and max(runs) <= 8, runs


def test_balanced_means_zigzag_for_one_causal_document() -> None:
    """Up to which rank holds which pair of half-chunks."""
    problem = packed([64 * 1024], layout="balanced", world_size=4)
    zigzag = packed([64 * 1024], layout="zigzag", world_size=4)
    assert max(problem.pairs) / min(problem.pairs) < 1.005
    assert max(len(problem.queries.runs(rank)) for rank in range(4)) <= 2
    assert zigzag.pairs[0] == pytest.approx(problem.pairs[0], rel=0.005)


def test_documents_that_lie_on_one_rank_send_nothing() -> None:
    problem = packed([1000] * 16, layout="balanced", world_size=8)
    for rank in range(8):
        assert not make_plan(problem, rank, "gather").key_tokens, "a cut went through a document"


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        ([1, 5], None, r"cu_seqlens must begin with 0 and never fall, got 1 as entry 0 of 2"),
        ([0, 5, 4], None, r"cu_seqlens must begin with 0 and never fall, got 4 as entry 2 of 3"),
        ([0, 5], [0, 3, 2], r"cu_seqlens_k must begin with 0 and never fall, got 2 as entry 2 of 3"),
        ([0, 5], [0, 3, 4], r"pair documents by index and must have one length, got 2 and 3 entries"),
        ([], None, r"cu_seqlens must be one list"),
        ([[0, 5]], None, r"cu_seqlens must be one list"),
    ],
)
def test_wrong_ends_are_refused(cu_q: Any, cu_k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedProblem.of(cu_q, cu_k, None, 0, "contiguous", 2)


def test_wrong_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown layout 'stripe' of packed documents; there are 'contiguous', 'zigz"):
        packed([5], layout="stripe")
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        packed([5], world_size=0)
