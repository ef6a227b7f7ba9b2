"""One rank's plan, tables included: 1,024 ranks, 1M tokens; packed documents on 8 ranks, which are planned anew for
every batch. Made on the host, while the GPU waits."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from ring_core.layout import LAYOUTS
from ring_core.plan import PACKED_LAYOUTS, SCHEDULES, PackedProblem, Problem, make_plan

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


def documents(kind: str) -> list[int]:
    """Lengths that fill 65536 tokens: thousands of documents, or realistic ones."""
    if kind == "4096 documents":
        return [16] * 4096
    random, lengths = np.random.default_rng(0), [0]
    while (left := 65536 - sum(lengths)) > 0:
        lengths.append(min(left, int(np.clip(random.lognormal(np.log(1500), 1.3), 64, 16384))))
    return lengths


@pytest.mark.parametrize("kind", ["4096 documents", "log-normal"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_plan_of_packed_documents(benchmark: Any, layout: str, schedule: str, kind: str) -> None:
    ends = [0, *np.cumsum(documents(kind)).tolist()]

    def plan() -> Any:
        problem = PackedProblem.of(ends, None, None, 0, layout, 8)
        return make_plan.__wrapped__(problem, 5, schedule)

    made = benchmark.pedantic(plan, rounds=15, warmup_rounds=1)
    benchmark.extra_info["segments"] = sum(len(step.forward) + len(step.backward) for step in made.steps)
    benchmark.extra_info["imbalance"] = round(max(made.problem.pairs) / float(np.mean(made.problem.pairs)), 4)
    assert benchmark.stats.stats.median < LIMIT


def test_plan_from_the_cache(benchmark: Any) -> None:
    """What every call after the first pays: hashing the problem."""
    problem = Problem(TOKENS, TOKENS, TOKENS, TOKENS, None, 0, "zigzag", WORLD_SIZE)
    make_plan(problem, 700, "ring")
    benchmark(lambda: make_plan(Problem(TOKENS, TOKENS, TOKENS, TOKENS, None, 0, "zigzag", WORLD_SIZE), 700, "ring"))
