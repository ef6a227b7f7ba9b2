"""Plans on demand: cached, because every layer of a model asks for the same one."""

from __future__ import annotations

from functools import lru_cache

from ring_core.plan.packed import PackedProblem
from ring_core.plan.packed_schedule import packed_gather_plan, packed_ring_plan
from ring_core.plan.problem import Problem
from ring_core.plan.schedule import Plan, gather_plan, ring_plan

SCHEDULES = ("ring", "gather")


@lru_cache(maxsize=256)
def make_plan(problem: Problem | PackedProblem, rank: int, schedule: str) -> Plan:
    """The plan of one rank, in 'ring' or 'gather'."""
    if not 0 <= rank < problem.world_size:
        raise ValueError(f"rank {rank} is not in a world of {problem.world_size}")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(map(repr, SCHEDULES))}")
    if isinstance(problem, PackedProblem):
        return packed_ring_plan(problem, rank) if schedule == "ring" else packed_gather_plan(problem, rank)
    return ring_plan(problem, rank) if schedule == "ring" else gather_plan(problem, rank)
