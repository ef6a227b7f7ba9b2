"""Rounding errors do not grow with the number of ranks: bf16 storage, fp32 accumulation over all hops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import join_shards, ring_attention, shard_sequence
from ring_core.testing import attention_oracle, compare, get_pool

LENGTH = 256
WORLD_SIZES = (1, 2, 4, 8, 16)
CASES: tuple[tuple[Any, Any], ...] = (("ring", "zigzag"), ("gather", "zigzag"), ("ring", "contiguous"))
NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LENGTH, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2, 4)]


def at_every_world_size(seed: int) -> dict[tuple[str, str, int], list[Tensor]]:
    """The first n of 16 ranks attend, for every n: one pool serves them all."""
    q, k, v, dout = inputs(seed)
    results = {}
    for world_size in WORLD_SIZES:
        group = dist.new_group(list(range(world_size)))
        if dist.get_rank() >= world_size:
            continue
        for schedule, layout in CASES:
            a, b, c, d = (shard_sequence(x, layout=layout, group=group).requires_grad_() for x in (q, k, v, dout))
            out, lse = ring_attention(
                a, b, c, causal=True, layout=layout, schedule=schedule, group=group, return_lse=True
            )
            gradients = torch.autograd.grad(out, (a, b, c), d)
            results[schedule, layout, world_size] = [out.detach(), lse.detach(), *gradients]
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, str, int], dict[str, float]]:
    """Relative, against fp64 on the same bf16 inputs, by schedule, layout and world size."""
    seed = int(torch.randint(1 << 30, (1,)))
    shards = get_pool(16).run(at_every_world_size, seed, timeout=120)
    get_pool(16).stop()
    q, k, v, dout = inputs(seed)
    truth = attention_oracle(q, k, v, causal=True, dout=dout)
    found = {}
    for schedule, layout in CASES:
        for world_size in WORLD_SIZES:
            parts = [shards[rank][schedule, layout, world_size] for rank in range(world_size)]
            found[schedule, layout, world_size] = {
                name: compare(
                    join_shards([part[i] for part in parts], layout=layout, dim=2 if name == "lse" else 1),
                    getattr(truth, name),
                ).relative
                for i, name in enumerate(NAMES)
            }
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize(("schedule", "layout"), CASES)
def test_error_does_not_grow(
    errors: dict[tuple[str, str, int], dict[str, float]], schedule: str, layout: str, world_size: int
) -> None:
    alone, together = errors[schedule, layout, 1], errors[schedule, layout, world_size]
    for name in NAMES:
        if name == "lse":  # fp32, at rounding level: nothing to compare but that it stays there
            assert together[name] < 1e-6
        else:
            assert 1e-4 < alone[name] < 1e-2, f"{name}: not an error of bf16"
            assert together[name] <= 1.1 * alone[name], f"{name}: {alone[name]:.3e}, now {together[name]:.3e}"


def test_bf16_between_hops_would_be_noticed() -> None:
    """The control: the same sums, rounded to bf16 after each of 16 parts, have a larger error than the test allows."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(16, 4096, generator=generator)
    exact = parts.double().sum(0)
    rounded = torch.zeros(4096, dtype=torch.bfloat16)
    for part in parts:
        rounded = (rounded.float() + part).bfloat16()
    once = compare(parts.sum(0).bfloat16(), exact).relative
    assert compare(rounded, exact).relative > 1.5 * once
