"""Packed documents on several ranks: plan, deal out, `ring_attention_packed` forward and backward, join, compare.

`run_packed_case` is what each rank of a `WorkerPool` executes; `check_packed_case` judges what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.backend import load_backend
from ring_core.comm import gather_through
from ring_core.interface import ScheduleName
from ring_core.packed import PackedPlan, plan_packed
from ring_core.packed_attention import ring_attention_packed
from ring_core.plan import PACKED_LAYOUTS, PackedLayoutName
from ring_core.testing.conformance.case import (
    AttentionCase,
    check_gradients_refused,
    check_refused,
    check_results,
    make_tensors,
    oracle_options,
)


@dataclass(frozen=True, kw_only=True)
class PackedCase(AttentionCase):
    """Documents of those lengths (k_lengths: of their keys, where they differ) on `world_size` ranks. through: see
    `ring_core.comm.gather_through`."""

    lengths: tuple[int, ...]
    k_lengths: tuple[int, ...] | None = None
    through: str = "collectives"

    @staticmethod
    def of(name: str, lengths: tuple[int, ...], k_lengths: tuple[int, ...] | None = None, **options: Any) -> PackedCase:
        return PackedCase(
            name=name,
            lengths=lengths,
            k_lengths=k_lengths,
            batch=1,
            q_length=sum(lengths),
            k_length=sum(lengths if k_lengths is None else k_lengths),
            **options,
        )

    @property
    def features(self) -> frozenset[str]:
        return super().features | {"packed"}

    @property
    def cu_seqlens(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))

    @property
    def cu_seqlens_k(self) -> list[int] | None:
        return None if self.k_lengths is None else list(accumulate(self.k_lengths, initial=0))

    def plan(self, rank: int | None = None) -> PackedPlan:
        """A rank's plan; None: this process's."""
        return plan_packed(
            self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens_k,
            layout=cast(PackedLayoutName, self.layout),
            causal=self.causal,
            window_size=self.window,
            rank=rank,
            world_size=None if rank is None else self.world_size,
        )


def run_packed_case(case: PackedCase, backend: str, seed: int, device: str = "cpu") -> dict[str, Tensor] | None:
    """This rank's part of a case: its local out, lse, dq, dk, dv and, with sinks, dsinks (on the CPU); out and lse
    alone where the backend has no gradients.

    None where the backend's Capabilities lack something and `ring_attention_packed` has refused, as it must.
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
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert world_size == case.world_size, f"{case} is for {case.world_size} ranks, run on {world_size}"
    x = make_tensors(case, seed, place)
    plan = case.plan()
    q = plan.shard(x.q[0]).clone().requires_grad_(case.gradients)
    k, v = (plan.shard(whole[0], keys=True).clone().requires_grad_(case.gradients) for whole in (x.k, x.v))
    sinks = None if x.sinks is None else x.sinks.clone().requires_grad_(case.gradients)
    with gather_through(case.through):
        out, lse = ring_attention_packed(
            q,
            k,
            v,
            plan,
            softmax_scale=case.scale,
            schedule=cast(ScheduleName, case.schedule),
            backend=backend,
            return_lse=True,
            softcap=case.softcap,
            alibi_slopes=x.alibi_slopes,
            sinks=sinks,
            dropout_p=case.dropout_p,
            dropout_seed=x.dropout_seed if case.dropout_p else None,
            deterministic=case.deterministic,
        )
        if not case.gradients:
            return {"out": out.cpu(), "lse": lse.cpu()}
        results, grads = [out], [plan.shard(x.dout[0])]
        if x.dlse is not None:
            results.append(lse)
            grads.append(plan.shard(x.dlse[0], dim=1))
        torch.autograd.backward(results, grads)
    found = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        found["dsinks"] = sinks.grad
    for name, leaf in (("dq", q), ("dk", k), ("dv", v)):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape, f"{case}: {name}"
        assert leaf.grad.dtype == leaf.dtype, f"{case}: {name} is {leaf.grad.dtype}"
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


def check_packed_case(
    case: PackedCase, backend: str, results: Sequence[dict[str, Tensor] | None], seed: int, device: str = "cpu"
) -> None:
    """Raises AssertionError unless the ranks' results, by rank, are together what the oracle says of the documents."""
    if all(part is None for part in results):
        return  # refused on every rank
    parts = [part for part in results if part is not None]
    assert len(parts) == case.world_size, f"{case}: some ranks refused the call and others did not"
    case = case.resolved(load_backend(backend).capabilities(torch.device(device)))
    plan = case.plan(0)
    joined = {
        name: plan.join([part[name] for part in parts], dim=1 if name == "lse" else 0, keys=name in ("dk", "dv"))[None]
        for name in (("out", "lse", "dq", "dk", "dv") if case.gradients else ("out", "lse"))
    }
    if case.sinks and case.gradients:  # each rank has its part of it
        joined["dsinks"] = torch.stack([part["dsinks"].double() for part in parts]).sum(0)
    tensors = make_tensors(case, seed)
    options = oracle_options(case, tensors)
    options |= {"cu_seqlens_q": case.cu_seqlens, "cu_seqlens_k": case.cu_seqlens_k, "total_length": None}
    check_results(case, tensors, joined, options)


MIXED = (0, 1, 23, 0, 40, 7, 1, 29)
"""Empty ones, of one token, and in all a number of tokens that no world size divides."""


def packed_cases(
    world_sizes: Sequence[int] = (1, 2, 4), *, scale: int = 1, through: Sequence[str] = ("collectives",)
) -> list[PackedCase]:
    """The cases of packed documents for those world sizes; `str(case)` is a test id.

    scale: multiplies lengths and windows. through: what "gather" goes through; add "shared_memory" on CPUs.
    """
    ways = [("ring", "collectives"), *(("gather", way) for way in through)]
    cases = [case for world_size in world_sizes for case in _cases(world_size, ways)]
    return [case if scale == 1 else _scaled(case, scale) for case in cases]


def _cases(world_size: int, ways: Sequence[tuple[str, str]]) -> list[PackedCase]:
    """Every layout by every mask by every way; what documents there are and what a kernel does with them is dealt out
    over that grid in turn, as for ring cases."""
    masks: list[tuple[str, dict[str, Any]]] = [
        ("full", {}),
        ("causal", {"causal": True}),
        ("narrow", {"causal": True, "window": (5, 0)}),
        ("wide", {"window": (21, 13)}),
    ]
    unequal = {"lengths": (5, 0, 20, 1, 30, 12), "k_lengths": (9, 4, 11, 1, 0, 25)}
    extras: list[tuple[str, dict[str, Any]]] = [
        ("mixed", {}),
        ("giant-gqa", {"lengths": (3, 90, 5, 1), "q_heads": 6}),
        ("other-keys", unequal),
        ("few-tokens", {"lengths": (1, 0, 2)}),
        ("equal-bf16", {"lengths": (12,) * 8, "dtype": torch.bfloat16}),
        ("sinks", {"sinks": True, "q_heads": 6}),
        ("fp16-large", {"dtype": torch.float16, "inputs": "large"}),
        ("other-keys-sinks", {**unequal, "sinks": True}),
        ("one-dim128-fp32", {"lengths": (67,), "head_dim": 128, "dtype": torch.float32}),
        ("other-keys-dropout-alibi", {**unequal, "dropout_p": 0.2, "alibi": "head"}),
        ("alibi-softcap", {"alibi": "head", "softcap": 2.0}),
        ("no-documents", {"lengths": (0, 0)}),
        ("deterministic-dropout", {"deterministic": True, "dropout_p": 0.2}),
    ]
    layouts, ways = (PACKED_LAYOUTS, list(ways)) if world_size > 1 else (PACKED_LAYOUTS[:1], [ways[0]] * 3)
    cases = []
    for number, (layout, (mask, mask_options), (schedule, through)) in enumerate(product(layouts, masks, ways)):
        # 13 extras and a grid of 36 (24 without the double): coprime steps, other pairs for each world size.
        extra, options = extras[(number * 5 + world_size) % len(extras)]
        way = schedule if through == "collectives" else f"{schedule}[{through}]"
        name = f"{world_size}-{layout}-{mask}-{way}-{extra}" + (f"-{number}" if world_size == 1 else "")
        where = {"world_size": world_size, "layout": layout, "schedule": schedule, "through": through}
        cases.append(PackedCase.of(name, **{"lengths": MIXED, **where, **mask_options, **options}))
    return cases


def _scaled(case: PackedCase, scale: int) -> PackedCase:
    """All lengths times `scale`; unbounded windows stay."""
    left, right = (bound * scale if bound > 0 else bound for bound in case.window)
    return replace(
        case,
        lengths=tuple(scale * length for length in case.lengths),
        k_lengths=None if case.k_lengths is None else tuple(scale * length for length in case.k_lengths),
        q_length=case.q_length * scale,
        k_length=case.k_length * scale,
        window=(left, right),
    )
