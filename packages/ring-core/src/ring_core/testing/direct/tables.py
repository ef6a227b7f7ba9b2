"""Tables to call kernels with: of plans, by hand, at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ring_core.plan import PackedProblem, Plan, Problem, make_plan
from ring_core.segment import COLUMNS, FIRST, LAST, Segment, Table

Strips = list[Segment]

PLANNED: tuple[tuple[str, int, int | None, int | None, int], ...] = (
    # layout, world size, left, right, true length of 1024 tokens
    ("contiguous", 1, None, 0, 1024),
    ("contiguous", 1, 200, 100, 1024),
    ("contiguous", 2, None, None, 1000),
    ("zigzag", 4, None, 0, 1024),
    ("zigzag", 2, 150, 0, 900),
    ("stripe", 4, None, 0, 1024),
    ("stripe", 2, 200, 0, 1024),
)


def table_of(*strips: Strips) -> Table:
    """Strips, of queries forward and of keys backward, each a list of its segments."""
    rows = [segment for strip in strips for segment in strip]
    groups = np.cumsum([0] + [len(strip) for strip in strips])
    return Table(np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS)), groups.astype(np.int32))


def causal_table(q_len: int, k_len: int, *, causal: bool, flags: int = FIRST | LAST, k_position: int = 0) -> Table:
    """One segment; causal: query i sees keys up to i - k_position."""
    upper = min(k_len, -k_position) if causal else k_len
    return table_of([Segment(0, q_len, 0, 0, k_len, -q_len, upper, 0, k_position, 1, -1, flags)])


def causal_steps(q_len: int, order: tuple[int, ...]) -> list[Table]:
    """Accumulating steps, one over each quarter of the keys, causal."""
    each, ends = q_len // 4, {order[0]: FIRST, order[-1]: LAST}
    return [causal_table(q_len, each, causal=True, k_position=each * n, flags=ends.get(n, 0)) for n in order]


def short_strips() -> list[Table]:
    """Three steps of strips of many lengths, 679 rows one right after another, that see all, something or nothing in a
    step."""
    tables = []
    for step in range(3):
        strips, q = [], 0
        for n, q_len in enumerate((1, 63, 64, 65, 127, 128, 129, 100)):
            k_len = (200, 0, 30)[(step + n) % 3]
            flags = (FIRST, 0, LAST)[step]
            strips.append([Segment(q, q_len, 0, 0, k_len, -q_len, k_len - 50 * (n % 2), 0, 0, 1, -1, flags)])
            q += q_len
        tables.append(table_of(*strips))
    return tables


def own_batches() -> Table:
    """Strips of queries of one of two batch entries each, of 200 rows at most."""
    return table_of(
        [Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, 0, FIRST | LAST)],
        [Segment(50, 100, 0, 0, 77, -100, 5, 0, 0, 1, 1, FIRST | LAST)],
    )


def random_table(seed: int) -> tuple[Table, int]:
    """Strips of queries that see pieces of keys in bands of any kind, and the number of rows."""
    rng = np.random.default_rng(seed)
    strips, q = [], int(rng.integers(0, 20))
    for _ in range(rng.integers(1, 5)):
        q_len, count = int(rng.integers(1, 400)), int(rng.integers(1, 4))
        strip = []
        for n in range(count):
            k_len = int(rng.integers(0, 500))
            low, high = sorted(int(rng.integers(-q_len, k_len + 1)) for _ in range(2))
            flags = (FIRST if n == 0 else 0) | (LAST if n == count - 1 else 0)
            strip.append(Segment(q, q_len, n, int(rng.integers(0, 50)), k_len, low, high, 0, 0, 1, -1, flags))
        strips.append(strip)
        q += q_len + int(rng.integers(0, 30))
    return table_of(*strips), q + 5


def random_key_table(seed: int) -> tuple[Table, int]:
    """Strips of keys, each with some segments of queries that begin anywhere, and the number of rows."""
    rng = np.random.default_rng(seed)
    strips, q_len, used = [], int(rng.integers(40, 400)), dict[int, int]()
    for _ in range(rng.integers(1, 4)):
        piece, k_len = int(rng.integers(0, 3)), int(rng.integers(1, 300))
        k_start = used.get(piece, int(rng.integers(0, 30)))
        used[piece] = k_start + k_len + int(rng.integers(0, 20))
        strip = []
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(0, q_len))
            rows = int(rng.integers(1, q_len - start + 1))
            low, high = sorted(int(rng.integers(-rows, k_len + 1)) for _ in range(2))
            strip.append(Segment(start, rows, piece, k_start, k_len, low, high, 0, 0, 1, -1, 0))
        strips.append(strip)
    return table_of(*strips), q_len


@dataclass(frozen=True)
class RankPlan:
    """What a rank computes: its plan, and how many rows of how long pieces it has."""

    name: str
    plan: Plan
    q_len: int
    piece_length: int


def rank_plans() -> Iterator[RankPlan]:
    """First and last ranks of `PLANNED` and of packed documents, by both schedules."""
    problems: list[tuple[str, Problem | PackedProblem]] = [
        (
            f"{layout} x{world} window {left},{right} of {total}",
            Problem(1024, 1024, total, total, left, right, layout, world),
        )
        for layout, world, left, right, total in PLANNED
    ]
    cu = [0, 3, 200, 201, 500, 640, 1000]
    problems += [
        (f"packed x{world}", PackedProblem.of(cu, cu, left=None, right=0, layout=layout, world_size=world))
        for world, layout in ((2, "zigzag"), (1, "contiguous"))
    ]
    for name, problem in problems:
        length = 1000 if isinstance(problem, PackedProblem) else 1024
        for schedule in ("gather", "ring"):
            for rank in {0, problem.world_size - 1}:
                plan = make_plan(problem, rank, schedule)
                label = f"{name}, {schedule}, rank {rank}"
                yield RankPlan(label, plan, length // problem.world_size, getattr(plan, "piece_length", 0))


def rows_of(tables: list[Table], batch: int, q_len: int) -> Tensor:
    """bool (B, Sq): rows in some segment of the tables."""
    rows = torch.zeros(batch, q_len, dtype=torch.bool)
    for s in (segment for table in tables for segment in table.segments):
        rows[slice(None) if s.batch < 0 else s.batch, s.q_start : s.q_start + s.q_len] = True
    return rows


def pieces_of(tables: list[Table], piece_length: int) -> tuple[int, int]:
    """How many pieces of how many keys they name; piece_length: of so many at least."""
    segments = [segment for table in tables for segment in table.segments]
    return 1 + max((s.piece for s in segments), default=0), max(
        piece_length, max((s.k_start + s.k_len for s in segments), default=1)
    )


def keys_of(tables: list[Table], batch: int, pieces: int, length: int) -> Tensor:
    """bool (B, C * S): keys in some segment of the tables, as `k` and `v` of one memory lie."""
    keys = torch.zeros(batch, pieces, length, dtype=torch.bool)
    for s in (segment for table in tables for segment in table.segments):
        keys[slice(None) if s.batch < 0 else s.batch, s.piece, s.k_start : s.k_start + s.k_len] = True
    return keys.flatten(1)
