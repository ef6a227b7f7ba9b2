"""The whole path on several ranks: shard, `ring_attention` forward and backward over a process group, join, compare.

`run_ring_case` is what each rank of a `WorkerPool` executes; `check_ring_case` judges what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.backend import load_backend
from ring_core.comm import gather_through
from ring_core.interface import ScheduleName, ring_attention
from ring_core.layout import LayoutName, join_shards, multiple, shard_sequence
from ring_core.testing.conformance.case import (
    AttentionCase,
    check_gradients_refused,
    check_refused,
    check_results,
    make_tensors,
)

LAYOUTS: tuple[LayoutName, ...] = ("contiguous", "zigzag", "stripe")


@dataclass(frozen=True, kw_only=True)
class RingCase(AttentionCase):
    """A case of `world_size` ranks. through: what the schedule "gather" goes through, see
    `ring_core.comm.gather_through`."""

    through: str = "collectives"

    def __post_init__(self) -> None:
        for length in (self.q_length, self.k_length):
            assert length % multiple(self.layout, self.world_size) == 0, f"{self}: {length} does not divide"


def run_ring_case(case: RingCase, backend: str, seed: int, device: str = "cpu") -> dict[str, Tensor] | None:
    """This rank's part of a case: its local out, lse, dq, dk, dv and, with sinks, dsinks (on the CPU); out and lse
    alone where the backend has no gradients.

    None where the backend's Capabilities lack something and `ring_attention` has refused, as it must.
    """
    place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    chosen = load_backend(backend)
    can = chosen.capabilities(place)
    if not can.available:
        pytest.skip(f"backend {backend!r} is not available on {place}: {can.reason}")
    case = case.resolved(can)
    if case.missing(can):
        check_refused(case, chosen, place)
        return None
    if not case.gradients:
        check_gradients_refused(case, chosen, place)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    assert world_size == case.world_size, f"{case} is for {case.world_size} ranks, run on {world_size}"
    tensors = make_tensors(case, seed, place)
    layout, schedule = cast(LayoutName, case.layout), cast(ScheduleName, case.schedule)
    q_total, k_total = case.total_length

    def mine(x: Tensor, total: int, dim: int = 1) -> Tensor:
        """This rank's shard; what padding holds must not matter."""
        x = x.clone()
        x.narrow(dim, total, x.shape[dim] - total).fill_(torch.nan)
        return shard_sequence(x, layout=layout, dim=dim, rank=rank, world_size=world_size)

    q, k, v = (
        mine(x, n).requires_grad_(case.gradients)
        for x, n in ((tensors.q, q_total), (tensors.k, k_total), (tensors.v, k_total))
    )
    sinks = None if tensors.sinks is None else tensors.sinks.clone().requires_grad_(case.gradients)
    with gather_through(case.through):
        out, lse = ring_attention(
            q,
            k,
            v,
            causal=case.causal,
            window_size=case.window,
            softmax_scale=case.scale,
            layout=layout,
            schedule=schedule,
            backend=backend,
            return_lse=True,
            total_length=case.total_length,
            softcap=case.softcap,
            alibi_slopes=tensors.alibi_slopes,
            sinks=sinks,
            dropout_p=case.dropout_p,
            dropout_seed=tensors.dropout_seed if case.dropout_p else None,
            deterministic=case.deterministic,
        )
        if not case.gradients:
            return {"out": out.cpu(), "lse": lse.cpu()}
        results, grads = [out], [mine(tensors.dout, q_total)]
        if tensors.dlse is not None:
            results.append(lse)
            grads.append(mine(tensors.dlse, q_total, dim=2))
        torch.autograd.backward(results, grads)
    found = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        found["dsinks"] = sinks.grad
    for name, leaf in (("dq", q), ("dk", k), ("dv", v)):
        assert leaf.grad is not None, f"{case}: no {name}"
        assert leaf.grad.dtype == leaf.dtype, f"{case}: {name} is {leaf.grad.dtype}"
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


def check_ring_case(
    case: RingCase, backend: str, results: Sequence[dict[str, Tensor] | None], seed: int, device: str = "cpu"
) -> None:
    """Raises AssertionError unless the ranks' results, by rank, are together what the oracle says of the whole
    sequence."""
    if all(part is None for part in results):
        return  # refused on every rank
    parts = [part for part in results if part is not None]
    assert len(parts) == case.world_size, f"{case}: some ranks refused the call and others did not"
    case = case.resolved(load_backend(backend).capabilities(torch.device(device)))
    layout = cast(LayoutName, case.layout)
    joined = {
        name: join_shards([part[name] for part in parts], layout=layout, dim=2 if name == "lse" else 1)
        for name in (("out", "lse", "dq", "dk", "dv") if case.gradients else ("out", "lse"))
    }
    if case.sinks and case.gradients:  # each rank has its part of it
        joined["dsinks"] = torch.stack([part["dsinks"].double() for part in parts]).sum(0)
    check_results(case, make_tensors(case, seed), joined)


def ring_cases(
    world_sizes: Sequence[int] = (1, 2, 3, 4), *, scale: int = 1, through: Sequence[str] = ("collectives",)
) -> list[RingCase]:
    """The ring-level cases for those world sizes; `str(case)` is a test id.

    scale: multiplies lengths and windows. through: what "gather" goes through; add "shared_memory" on CPUs.
    """
    ways = [("ring", "collectives"), *(("gather", way) for way in through)]
    cases = [case for world_size in world_sizes for case in _cases(world_size, ways)]
    return [case if scale == 1 else _scaled(case, scale) for case in cases]


def _cases(world_size: int, ways: Sequence[tuple[str, str]]) -> list[RingCase]:
    """Every layout by every mask by every way, as those three decide together what travels where; what a kernel does
    with it (features, head dims, dtypes, inputs, shapes) is dealt out over that grid in turn: each appears with several
    layouts and ways. A rank alone has no layout and no way: one of each."""
    masks: list[tuple[str, dict[str, Any]]] = [
        ("full", {}),
        ("causal", {"causal": True}),
        ("narrow", {"causal": True, "window": (5, 0)}),  # narrower than a chunk
        ("wide", {"window": (27, 21)}),  # wider than a chunk, on both sides
    ]
    extras: list[tuple[str, dict[str, Any]]] = [
        ("gqa", {"q_heads": 6}),
        ("dim40", {"head_dim": 40}),
        ("padded", {"pad": 3}),
        ("longer-k", {"k_chunks": 2}),
        ("bf16", {"dtype": torch.bfloat16}),
        ("sinks", {"sinks": True, "q_heads": 6}),
        ("dim128-fp32", {"head_dim": 128, "dtype": torch.float32}),
        ("longer-q", {"q_chunks": 2}),
        ("dropout", {"dropout_p": 0.2}),
        ("fp16-large", {"dtype": torch.float16, "inputs": "large"}),
        ("alibi-softcap", {"alibi": "batch", "softcap": 2.0}),
        ("padded-longer-k-sinks", {"pad": 5, "k_chunks": 2, "sinks": True}),
        ("deterministic", {"deterministic": True}),
    ]
    layouts, ways = (LAYOUTS, list(ways)) if world_size > 1 else (LAYOUTS[:1], [ways[0]] * 3)
    grid = list(product(layouts, masks, ways))
    cases = []
    for number, (layout, (mask, mask_options), (schedule, through)) in enumerate(grid):
        # 13 extras and a grid of 36 (24 without the double): coprime steps, other pairs for each world size.
        extra, options = extras[(number * 5 + world_size) % len(extras)]
        options = dict(options)
        chunk = 18 if layout == "zigzag" else 17
        pad = options.pop("pad", 0) * (world_size > 1)
        q_length = chunk * world_size * options.pop("q_chunks", 1)
        k_length = chunk * world_size * options.pop("k_chunks", 1)
        totals = {"q_total": q_length - pad, "k_total": k_length - pad} if pad else {}
        way = schedule if through == "collectives" else f"{schedule}[{through}]"
        cases.append(
            RingCase(
                name=f"{world_size}-{layout}-{mask}-{way}-{extra}" + (f"-{number}" if world_size == 1 else ""),
                world_size=world_size,
                layout=layout,
                schedule=schedule,
                through=through,
                q_length=q_length,
                k_length=k_length,
                **totals,
                **mask_options,
                **options,
            )
        )
    return cases


def _scaled(case: RingCase, scale: int) -> RingCase:
    """All lengths times `scale`; unbounded windows stay."""
    left, right = (bound * scale if bound > 0 else bound for bound in case.window)
    return replace(
        case,
        q_length=case.q_length * scale,
        k_length=case.k_length * scale,
        q_total=None if case.q_total is None else case.q_total * scale,
        k_total=None if case.k_total is None else case.k_total * scale,
        window=(left, right),
    )
