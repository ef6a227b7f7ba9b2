"""Plans that the tests of both directions share."""

from __future__ import annotations

from ring_core.plan import Problem

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


def problem(length: int, layout: str, world_size: int, left: int | None, right: int | None, total: int) -> Problem:
    return Problem(length, length, total, total, left, right, layout, world_size)
