"""One rank's plan, tables included: 1,024 ranks, 1M tokens. Made once per shape, on the host, while the GPU waits."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from ring_core.layout import LAYOUTS
from ring_core.plan import SCHEDULES, Problem, make_plan

WORLD_SIZE, TOKENS = 1024, 1 << 20
LIMIT = 50e-3  # seconds


@pytest.fixture(autouse=True)
def collected() -> None:
    """Leftovers of other tests are collected before, not during; what a plan itself costs the collector is measured."""
    gc.collect()


@pytest.mark.parametrize("window", [None, 4096], ids=["causal", "window"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_of_one_of_1024_ranks(benchmark: Any, layout: str, schedule: str, window: int | None) -> None:
    problem = Problem(TOKENS, TOKENS, TOKENS, TOKENS, window, 0, layout, WORLD_SIZE)
    plan = benchmark.pedantic(
        make_plan, args=(problem, 700, schedule), setup=make_plan.cache_clear, rounds=15, warmup_rounds=1
    )
    assert plan.pairs > 0
    benchmark.extra_info["segments"] = sum(len(step.forward) + len(step.backward) for step in plan.steps)
    # The median: a full collection or a colleague's job in one round is not the plan's cost.
    assert benchmark.stats.stats.median < LIMIT


def test_plan_from_the_cache(benchmark: Any) -> None:
    """What every call after the first pays: hashing the problem."""
    problem = Problem(TOKENS, TOKENS, TOKENS, TOKENS, None, 0, "zigzag", WORLD_SIZE)
    make_plan(problem, 700, "ring")
    benchmark(lambda: make_plan(Problem(TOKENS, TOKENS, TOKENS, TOKENS, None, 0, "zigzag", WORLD_SIZE), 700, "ring"))
