"""What a recording transport counts on the wire is what the plan predicted, byte for byte."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ring_core import ring_attention
from ring_core.comm import gather_through, record_traffic
from ring_core.layout import LAYOUTS, multiple
from ring_core.plan import Problem, make_plan, message_bytes
from ring_core.testing.plugin import RunRanks

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
CHUNK = 8

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "narrow window": {"causal": True, "window_size": (3, -1)},
    "wide window": {"causal": True, "window_size": (CHUNK + 5, -1)},
    "two-sided window": {"window_size": (2, 5)},
    "padded": {"causal": False, "padding": 5},
    "unequal": {"causal": True, "queries": CHUNK // 2},
    "nothing to send": {"causal": True, "window_size": (0, -1)},
}


def predicted(plan: Any, dtype: torch.dtype) -> dict[tuple[str, int], int]:
    shape = {"batch": BATCH, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    bytes_sent = {
        ("keys", peer): 2 * message_bytes(tokens, element_size=dtype.itemsize, **shape)  # forward and backward
        for peer, tokens in plan.key_tokens.items()
    }
    for peer, tokens in plan.gradient_tokens.items():
        bytes_sent["gradients", peer] = message_bytes(tokens, element_size=sums.itemsize, **shape)
    return bytes_sent


def attend_and_count(transport: str, layout: Any, mask: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(counted in the forward, counted in all, predicted for all) on each rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    queries, padding = mask.get("queries", CHUNK), mask.get("padding", 0)
    options = {name: value for name, value in mask.items() if name not in ("queries", "padding")}
    assert CHUNK * world_size % multiple(layout, world_size) == 0
    q = torch.randn(BATCH, queries, HEADS, HEAD_DIM, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(BATCH, CHUNK, KV_HEADS, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(2))
    lengths = [queries * world_size, CHUNK * world_size]
    totals = [length - padding for length in lengths]
    schedule = "ring" if transport == "ring" else "gather"
    left = options.get("window_size", (-1, -1))[0]
    right = 0 if options.get("causal") else options.get("window_size", (-1, -1))[1]
    problem = Problem(
        *lengths, *totals, None if left < 0 else left, None if right < 0 else right, layout, world_size
    )  # fmt: skip
    plan = make_plan(problem, rank, schedule)
    way = gather_through("shared_memory") if transport == "shared_memory" else nullcontext()
    with way, record_traffic() as traffic:
        out = ring_attention(q, k, v, layout=layout, schedule=schedule, total_length=(totals[0], totals[1]), **options)
        forward = dict(traffic.sent)
        out.backward(torch.randn_like(out))
    return forward, traffic.sent, predicted(plan, dtype)


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transport", ["ring", "gather", "shared_memory"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_are_those_of_the_plan(
    ranks: RunRanks, world_size: int, transport: str, layout: str, mask: dict[str, Any]
) -> None:
    dtype = torch.bfloat16 if world_size == 3 else torch.float32
    results = ranks(world_size, attend_and_count, transport, layout, mask, dtype)
    for rank, (forward, counted, expected) in enumerate(results):
        assert {peer: n for peer, n in counted.items() if n} == expected, f"rank {rank}"
        keys = {peer: n // 2 for peer, n in expected.items() if peer[0] == "keys"}
        assert {peer: n for peer, n in forward.items() if n} == keys, f"rank {rank}"
    if mask is MASKS["nothing to send"]:
        assert all(not expected for _, _, expected in results), "every query sees itself alone"


def test_recording_ends(ranks: RunRanks) -> None:
    assert ranks(2, record_nothing) == [True, True]


def record_nothing() -> bool:
    q = torch.randn(1, 4, 1, 8)
    with record_traffic() as outer:
        with record_traffic() as inner:
            ring_attention(q, q, q)
        ring_attention(q, q, q)
    ring_attention(q, q, q)
    (peer,) = inner.sent
    return outer.sent == {peer: 2 * inner.sent[peer]}
