"""Segment tables for one process: those of simulated ranks, from their plans, and hand-made ones that no plan makes.

A `Share` is what one rank would be given: its queries, and for each call of the backend the keys and the two tables.
Keys are named by their global index, so that the same code fills pieces from whole sequences and brings gradients back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ring_core.layout import LayoutName, local_positions
from ring_core.plan import GatherPlan, Plan, Problem, make_plan
from ring_core.segment import COLUMNS, FIRST, LAST, Segment, Table

if TYPE_CHECKING:
    from ring_core.testing.conformance.kernel import KernelCase

WIDE = 1 << 30  # no bound; clamped to the segment like any other


@dataclass(frozen=True)
class Call:
    """One call of forward and one of backward. keys: int64 (C, S_piece), global index of what lies there, -1 for
    nothing."""

    keys: Tensor
    forward: Table
    backward: Table


@dataclass(frozen=True)
class Share:
    """queries: int64 (Sq,), global index of the local rows. padding: local rows (start, stop) beyond the true length.
    spans_calls: some strip begins in one call and ends in another, so there is a state."""

    queries: Tensor
    calls: tuple[Call, ...]
    padding: tuple[tuple[int, int], ...]
    spans_calls: bool


def shares(case: KernelCase) -> Iterator[Share]:
    """What each simulated rank of the case is given."""
    if case.hand_made:
        yield _hand_made(case)
        return
    problem = Problem(case.q_length, case.k_length, *case.total_length, *case.bounds, case.layout, case.world_size)
    for rank in range(case.world_size):
        plan = make_plan(problem, rank, case.schedule)
        queries = _positions(case.q_length, problem, rank)
        calls = tuple(
            Call(keys, step.forward, step.backward) for keys, step in zip(_stored(plan), plan.steps, strict=True)
        )
        yield Share(queries, calls, tuple(problem.padding_rows(rank)), plan.spans_steps)


def _positions(length: int, problem: Problem, rank: int) -> Tensor:
    layout = cast(LayoutName, problem.layout)
    return local_positions(length, layout=layout, rank=rank, world_size=problem.world_size)


def _stored(plan: Plan) -> Iterator[Tensor]:
    """Which keys lie where in each step, (C, S_piece), as a transport would have put them there."""
    problem = plan.problem
    assert isinstance(problem, Problem)
    if isinstance(plan, GatherPlan):
        pieces = torch.full((plan.piece_count, plan.piece_length), -1)
        for source, start, length, piece, offset in plan.placements:
            chunk = _positions(problem.k_length, problem, source)
            pieces[piece, offset : offset + length] = chunk[start : start + length]
        yield pieces
        return
    for number, hop in enumerate(plan.hops):
        chunk = _positions(problem.k_length, problem, plan.source(number))
        parts = [chunk] if number == 0 else [chunk[start:stop] for start, stop in hop.receive]
        yield (torch.cat(parts) if parts else chunk[:0])[None]


def _hand_made(case: KernelCase) -> Share:
    """Documents cut into strips of `case.strip` rows and blocks of `case.block` keys, the blocks dealt out over
    `case.calls` calls.

    With `per_entry` each batch entry has rows of its own (batch >= 0), cut at places of its own.
    """
    length = max(1, -(-case.k_length // case.pieces))
    keys = torch.arange(case.pieces * length)
    keys = torch.where(keys < case.k_length, keys, -1).reshape(case.pieces, length)
    by_query: list[list[list[Segment]]] = [[] for _ in range(case.calls)]
    by_key: list[list[list[Segment]]] = [[] for _ in range(case.calls)]
    spans = False
    for entry in range(case.batch) if case.per_entry else (-1,):
        shift = max(0, entry)
        for document in case.documents:
            q0, q1, k0, k1 = document
            strips = list(pairwise(_cuts(q0, q1, case.strip + 3 * shift)))
            inside = [start for start in range(length, k1, length) if start > k0]  # no block lies in two pieces
            edges = sorted({*_cuts(k0, k1, case.block + 5 * shift), *inside})
            blocks = list(pairwise(edges)) or [
                (k0, k0)
            ]  # no keys at all: rows that see nothing are written all the same
            if not strips:
                continue
            calls = [number * case.calls // len(blocks) for number in range(len(blocks))]
            spans |= calls[0] != calls[-1]
            grid = [[_segment(case, document, rows, columns, length, entry) for columns in blocks] for rows in strips]
            for row in grid:
                row[0] = row[0]._replace(flags=row[0].flags | FIRST)
                row[-1] = row[-1]._replace(flags=row[-1].flags | LAST)
                for call in range(case.calls):
                    by_query[call].append([segment for segment, at in zip(row, calls, strict=True) if at == call])
            for number, call in enumerate(calls):
                by_key[call].append([row[number] for row in grid if row[number].k_len])
    tables = zip(map(_table, by_query), map(_table, by_key), strict=True)
    return Share(
        torch.arange(case.q_length), tuple(Call(keys, forward, backward) for forward, backward in tables), (), spans
    )


def _segment(
    case: KernelCase,
    document: tuple[int, int, int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    piece_length: int,
    entry: int,
) -> Segment:
    """A rectangle of a document, with the band written out from positions in the packed stream of keys."""
    q0, q1, k0, k1 = document
    left, right = case.bounds
    left, right = WIDE if left is None else left, WIDE if right is None else right
    q_len, k_len = rows[1] - rows[0], columns[1] - columns[0]
    q_position = k0 + rows[0] - q0 + (k1 - k0) - (q1 - q0)  # the last query of a document stands at its last key
    k_position = columns[0]
    distance = q_position - k_position
    lower, upper = (max(-q_len, min(k_len, bound)) for bound in (distance - left, distance + right))
    piece = columns[0] // piece_length if k_len else 0
    k_start = columns[0] - piece * piece_length if k_len else 0
    return Segment(rows[0], q_len, piece, k_start, k_len, lower, upper, q_position, k_position, 1, entry, 0)


def _cuts(start: int, stop: int, step: int) -> list[int]:
    return [*range(start, stop, step), stop] if stop > start else []


def _table(groups: Sequence[list[Segment]]) -> Table:
    groups = [group for group in groups if group]
    rows = [segment for group in groups for segment in group]
    edges = np.cumsum([0, *(len(group) for group in groups)])
    return Table(np.array(rows, np.int32).reshape(-1, len(COLUMNS)), edges.astype(np.int32))


def rows_of(table: Table, batch: int, q_length: int, flag: int = 0) -> Tensor:
    """bool (B, Sq): rows in some segment of the table (with that flag)."""
    covered = torch.zeros(batch, q_length, dtype=torch.bool)
    for s in table.segments:
        if not flag or s.flags & flag:
            entries = slice(None) if s.batch < 0 else s.batch
            covered[entries, s.q_start : s.q_start + s.q_len] = True
    return covered


def keys_of(table: Table, batch: int, keys: Tensor) -> Tensor:
    """bool (C, B, S_piece): keys in some segment of the table. keys: as in `Call`."""
    covered = torch.zeros(keys.shape[0], batch, keys.shape[1], dtype=torch.bool)
    for s in table.segments:
        if s.k_len:
            entries = slice(None) if s.batch < 0 else s.batch
            covered[s.piece, entries, s.k_start : s.k_start + s.k_len] = True
    return covered
