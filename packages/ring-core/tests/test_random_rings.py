"""Rings that nobody thought of: every option drawn at random, another draw in every run."""

from __future__ import annotations

import random

import pytest
import torch

from ring_core.layout import LAYOUTS, multiple
from ring_core.plan import PACKED_LAYOUTS
from ring_core.testing.conformance import (
    PackedCase,
    RingCase,
    check_packed_case,
    check_ring_case,
    run_packed_case,
    run_ring_case,
)
from ring_core.testing.plugin import RunRanks

DRAWS = 25


def draw(rng: random.Random, world_size: int) -> RingCase:
    layout = rng.choice(LAYOUTS)
    schedule, through = rng.choice([("ring", "collectives"), ("gather", "collectives"), ("gather", "shared_memory")])
    step = multiple(layout, world_size)
    q_length = step * rng.randint(0, 12)
    k_length = q_length if rng.random() < 0.6 else step * rng.randint(0, 12)
    padded = rng.random() < 0.4
    causal = rng.random() < 0.5
    kv_heads = rng.choice([1, 2])
    return RingCase(
        name="drawn",
        world_size=world_size,
        layout=layout,
        schedule=schedule,
        through=through,
        batch=rng.choice([1, 2]),
        q_heads=kv_heads * rng.choice([1, 3]),
        kv_heads=kv_heads,
        head_dim=rng.choice([8, 40]),
        dtype=torch.float64,
        q_length=q_length,
        k_length=k_length,
        q_total=rng.randint(max(0, q_length - 2 * step), q_length) if padded else None,
        k_total=rng.randint(max(0, k_length - 2 * step), k_length) if padded else None,
        causal=causal,
        window=(rng.choice([-1, 0, 1, 6, 40]), rng.choice([-1, 0, 2, 30])),
        softcap=rng.choice([0.0, 0.0, 3.0]),
        alibi=rng.choice(["", "", "head", "batch"]),
        sinks=rng.random() < 0.3,
        dropout_p=rng.choice([0.0, 0.0, 0.3]),
    )


def draw_packed(rng: random.Random, world_size: int) -> PackedCase:
    schedule, through = rng.choice([("ring", "collectives"), ("gather", "collectives"), ("gather", "shared_memory")])
    lengths = tuple(rng.choice([0, 1, rng.randint(0, 9), rng.randint(0, 60)]) for _ in range(rng.randint(0, 9)))
    keys = tuple(rng.randint(0, 40) for _ in lengths) if rng.random() < 0.3 else None
    kv_heads = rng.choice([1, 2])
    return PackedCase.of(
        "drawn",
        lengths,
        keys,
        world_size=world_size,
        layout=rng.choice(PACKED_LAYOUTS),
        schedule=schedule,
        through=through,
        q_heads=kv_heads * rng.choice([1, 3]),
        kv_heads=kv_heads,
        head_dim=rng.choice([8, 40]),
        dtype=torch.float64,
        causal=rng.random() < 0.5,
        window=(rng.choice([-1, 0, 1, 6, 40]), rng.choice([-1, 0, 2, 30])),
        softcap=rng.choice([0.0, 0.0, 3.0]),
        alibi=rng.choice(["", "", "head"]),
        sinks=rng.random() < 0.3,
        dropout_p=rng.choice([0.0, 0.0, 0.3]),
    )


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_random_packed_documents(world_size: int, ranks: RunRanks, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(DRAWS // 2):
        case, case_seed = draw_packed(rng, world_size), rng.getrandbits(30)
        results = ranks(world_size, run_packed_case, case, "reference", case_seed)
        check_packed_case(case, "reference", results, case_seed)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_random_rings(world_size: int, ranks: RunRanks, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(DRAWS):
        case, case_seed = draw(rng, world_size), rng.getrandbits(30)
        results = ranks(world_size, run_ring_case, case, "reference", case_seed)
        check_ring_case(case, "reference", results, case_seed)
