"""Segments into blocks, blocks into masks: exactly the same pairs, each once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ring_core.backend import UnsupportedError
from ring_core.plan import GatherPlan, Problem, make_plan
from ring_core.segment import Segment
from ring_native.blocks import UNBOUNDED, Block, coalesced, merged, pairs, trimmed
from ring_native.calls import Call, backward_calls, forward_calls
from ring_native.masks import CAUSAL, FULL, Choice, Mask, Style, mask_of, split

Shown = NDArray[np.int64]
SIZE = 24


def shown(block: Block, size: int = 2 * SIZE) -> Shown:
    """How often the block shows each pair, (size, size)."""
    i, j = np.indices((size, size))
    inside = (block.q_start <= i) & (i < block.q_stop) & (block.k_start <= j) & (j < block.k_stop)
    return (inside & (block.lower <= j - i) & (j - i <= block.upper)).astype(np.int64)


def as_flash_attn_reads(mask: Mask, q_len: int, k_len: int, longest_k: int | None = None) -> Shown:
    """What flash-attn shows: aligned at the last query and key, and neither a negative bound nor one of Sk or more (of
    the longest sequence) is one."""
    longest_k = k_len if longest_k is None else longest_k
    left, right = (UNBOUNDED if bound < 0 or bound >= longest_k else bound for bound in mask)
    i, j = np.indices((q_len, k_len))
    offset = j - i - (k_len - q_len)
    return ((-left <= offset) & (offset <= right)).astype(np.int64)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    length = st.integers(1, SIZE)
    q0, k0 = draw(st.integers(0, 8)), draw(st.integers(0, 8))
    bound = st.one_of(st.integers(-SIZE, SIZE), st.just(UNBOUNDED))
    lower, upper = draw(bound), draw(bound)
    lower = -UNBOUNDED if lower == UNBOUNDED else lower
    return Block(-1, q0, q0 + draw(length), k0, k0 + draw(length), lower, upper)


@settings(max_examples=400, deadline=None)
@given(blocks())
def test_trimmed_shows_the_same_and_has_no_blind_row(block: Block) -> None:
    before, tight = shown(block), trimmed(block)
    assert pairs(block) == before.sum()
    if tight is None:
        assert not before.any()
        return
    assert (shown(tight) == before).all()
    inside = before[tight.q_start : tight.q_stop, tight.k_start : tight.k_stop]
    assert inside.any(axis=1).all() and inside.any(axis=0).all()
    assert trimmed(tight) == tight


@settings(max_examples=400, deadline=None)
@given(blocks(), st.sampled_from([Style.BOTTOM_RIGHT, Style.ANY]))
def test_split_shows_the_band_once(block: Block, style: Style) -> None:
    tight = trimmed(block)
    if tight is None:
        return
    parts = split(tight, style)
    assert (sum(map(shown, parts)) == shown(block)).all()
    for part in parts:
        mask = mask_of(part)
        expected = shown(part)[part.q_start : part.q_stop, part.k_start : part.k_stop]
        if style is Style.ANY:
            left, right = (UNBOUNDED if bound < 0 else bound for bound in mask)
            i, j = np.indices(expected.shape)
            offset = j - i - (part.k_len - part.q_len)
            assert (expected == ((-left <= offset) & (offset <= right))).all()
        else:
            assert (as_flash_attn_reads(mask, part.q_len, part.k_len) == expected).all()
            assert mask == FULL or part.q_len <= part.k_len
    rows = [row for part in parts for row in range(part.q_start, part.q_stop)]
    assert len(rows) == len(set(rows)), "rows are split, so that nothing has to be merged"


@settings(max_examples=300, deadline=None)
@given(blocks())
def test_squares_are_causal_squares_or_rectangles(block: Block) -> None:
    tight = trimmed(block)
    if tight is None:
        return
    if tight.lower != -UNBOUNDED:
        with pytest.raises(UnsupportedError, match="window's edge"):
            split(tight, Style.SQUARES)
        return
    parts = split(tight, Style.SQUARES)
    assert (sum(map(shown, parts)) == shown(block)).all()
    assert len(parts) <= 3
    for part in parts:
        assert mask_of(part) == FULL or (mask_of(part) == CAUSAL and part.q_len == part.k_len)


@settings(max_examples=300, deadline=None)
@given(st.lists(blocks(), min_size=2, max_size=2))
def test_merged_shows_both(both: list[Block]) -> None:
    tight = [block for block in map(trimmed, both) if block is not None]
    if len(tight) < 2 or (shown(tight[0]) & shown(tight[1])).any():
        return
    a, b = tight
    union = merged(a, b)
    if union is not None:
        assert (shown(union) == shown(a) + shown(b)).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, SIZE), st.integers(1, SIZE), st.integers(-SIZE, SIZE), st.integers(-SIZE, SIZE), st.randoms())
def test_a_band_cut_up_is_put_together(q_len: int, k_len: int, lower: int, upper: int, random) -> None:  # type: ignore[no-untyped-def]
    """However a planner cuts it: a staircase of strips over pieces becomes one block again."""
    piece = random.randint(1, k_len)
    rows = sorted({0, q_len, *random.sample(range(q_len + 1), min(2, q_len))})
    keys = sorted({*range(0, k_len, piece), k_len})
    segments = [
        Segment(a, b - a, c // piece, c % piece, d - c, lower + a - c, upper + a - c, 0, 0, 1, -1, 0)
        for a, b in pairwise(rows)
        for c, d in pairwise(keys)
    ]
    whole = trimmed(Block(-1, 0, q_len, 0, k_len, lower, upper))
    made = coalesced(segments, piece)
    total = sum((shown(block) for block in made), np.zeros((2 * SIZE, 2 * SIZE), np.int64))
    assert (total == (0 if whole is None else shown(whole))).all()
    if whole is None:
        assert not made
    elif whole.lower == -UNBOUNDED:
        assert made == [whole]
    else:  # of a window's single rows nobody knows that they are a window's
        assert len(made) <= len(segments)


def test_documents_of_one_token_are_no_window() -> None:
    segments = [Segment(n, 1, 0, n, 1, 0, 0, 0, 0, 1, -1, 0) for n in range(5)]
    assert all(block.lower == -UNBOUNDED for block in coalesced(segments, 5))


@settings(max_examples=200, deadline=None)
@given(st.lists(blocks(), min_size=1, max_size=4))
def test_a_common_mask_shows_every_sequence_as_its_own(several: list[Block]) -> None:
    """Sequences of one call share a mask, and bounds are compared with the longest."""
    parts = [
        part for block in several for tight in [trimmed(block)] if tight for part in split(tight, Style.BOTTOM_RIGHT)
    ]
    choice: Choice | None = None
    taken: list[Block] = []
    for part in parts:
        both = Choice.of(part) if choice is None else choice.both(Choice.of(part))
        if both is not None:
            choice, taken = both, [*taken, part]
    if choice is None:
        return
    longest = max(part.k_len for part in taken)
    for part in taken:
        expected = shown(part)[part.q_start : part.q_stop, part.k_start : part.k_stop]
        assert (as_flash_attn_reads(choice.mask, part.q_len, part.k_len, longest) == expected).all()


def calls_of(problem: Problem, rank: int, schedule: str) -> list[tuple[list[Call], list[Call]]]:
    plan = make_plan(problem, rank, schedule)
    chunk = problem.k_length // problem.world_size
    length = plan.piece_length if isinstance(plan, GatherPlan) else chunk
    return [
        (
            [call for call, _ in forward_calls(step.forward, length, 1, Style.BOTTOM_RIGHT, True).calls],
            list(backward_calls(step.backward, length, 1, Style.BOTTOM_RIGHT, True)),
        )
        for step in plan.steps
    ]


@pytest.mark.parametrize("rank", range(4))
def test_a_zigzag_gather_is_two_prefix_calls(rank: int) -> None:
    """The merge-free path: each half of the queries against a prefix of the keys, the longer one first."""
    problem = Problem(8192, 8192, 8192, 8192, None, 0, "zigzag", 4)
    ((forward, backward),) = calls_of(problem, rank, "gather")
    half = 1024
    expected = [
        Call(-1, half, 2 * half, 0, (8 - rank) * half, CAUSAL),
        Call(-1, 0, half, 0, (rank + 1) * half, CAUSAL),
    ]
    if rank == 3:  # whose halves are neighbours
        expected = [Call(-1, 0, 2 * half, 0, 5 * half, CAUSAL)]
    for calls in (forward, backward):
        found = [(c.batch, c.rows, c.keys, c.mask, c.sequences) for c in calls]
        assert found == [(c.batch, c.rows, c.keys, c.mask, c.sequences) for c in expected]


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_step_is_one_call(layout: str, schedule: str) -> None:
    for rank in range(4):
        for forward, backward in calls_of(Problem(8192, 8192, 8192, 8192, None, 0, layout, 4), rank, schedule):
            most = 2 if (layout, schedule) == ("zigzag", "gather") else 1
            assert len(forward) <= most and len(backward) <= most
