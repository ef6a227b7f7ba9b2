"""Plans and tables that the tests and probes of both directions share."""

from __future__ import annotations

import numpy as np

from ring_core.plan import Problem
from ring_core.segment import COLUMNS, Segment, Table

PLANS: list[tuple[str, int, int | None, int | None, int]] = [
    # layout, world size, left, right, true length of 1024 tokens
    ("contiguous", 1, None, None, 1024),
    ("contiguous", 1, None, 0, 1000),
    ("contiguous", 1, 100, 50, 1024),
    ("contiguous", 4, None, 0, 1024),
    ("contiguous", 4, 130, 0, 1001),
    ("zigzag", 4, None, 0, 1024),
    ("zigzag", 2, 70, 0, 900),
    ("stripe", 4, None, 0, 1024),
    ("stripe", 4, 200, 0, 1024),
]

PROBED: list[tuple[str, int, int | None, int | None, int]] = [
    # layout, world size, left, right, true length of 1024 tokens: what the probes run on a GPU
    ("contiguous", 1, None, 0, 1024),
    ("contiguous", 1, 200, 100, 1024),
    ("contiguous", 2, None, None, 1000),
    ("zigzag", 4, None, 0, 1024),
    ("zigzag", 2, 150, 0, 900),
    ("stripe", 4, None, 0, 1024),
]


def problem(length: int, layout: str, world_size: int, left: int | None, right: int | None, total: int) -> Problem:
    return Problem(length, length, total, total, left, right, layout, world_size)


def table_of(*strips: list[Segment]) -> Table:
    rows = [segment for strip in strips for segment in strip]
    groups = np.cumsum([0] + [len(strip) for strip in strips])
    return Table(np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS)), groups.astype(np.int32))
