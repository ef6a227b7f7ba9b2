"""What surrounds a call does not change it: default devices, autocast, inference mode, other backends, ended groups."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import (
    llama3_flash_attn_prepare_cu_seqlens,
    plan_packed,
    ring_attention,
    ring_attention_packed,
)
from ring_core.backend import Params, on_device, register_backend
from ring_core.comm import channel, gather_through
from ring_core.plan import Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.testing.plugin import RunRanks


def inputs(seed: int, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def everything(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    out, lse = ring_attention(q, k, v, causal=True, return_lse=True, **options)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))]


def among_meta_tensors(seed: int) -> bool:
    """With a transport that has words of its own on the host."""
    x = inputs(seed)
    with gather_through("shared_memory"):
        want = everything(*x, schedule="gather")
        with torch.device("meta"):
            got = everything(*x, schedule="gather")
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_default_device_is_for_users(ranks: RunRanks, seed: int) -> None:
    assert ranks(2, among_meta_tensors, seed) == [True, True]
    with torch.device("meta"):
        prepared = llama3_flash_attn_prepare_cu_seqlens([0, 5, 12], True, 0, 1)
    assert prepared[0].tolist() == [0, 5, 12]


def test_autocast_is_for_other_operators(seed: int) -> None:
    x = inputs(seed)
    want = everything(*x)
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(*x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_plan_made_under_inference_mode_serves_training(seed: int) -> None:
    with torch.inference_mode():
        plan = plan_packed([0, 5, 12], causal=True)
    q, k, v = (x.detach()[0].requires_grad_() for x in inputs(seed))
    layer = torch.compile(ring_attention_packed, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(layer(q, k, v, plan).square().sum(), q)
    (want,) = torch.autograd.grad(ring_attention_packed(q, k, v, plan).square().sum(), q)
    assert torch.equal(got, want)


def test_windows_may_vary_in_one_graph(seed: int) -> None:
    q, k, v = inputs(seed)
    layer = torch.compile(
        lambda left: ring_attention(q, k, v, window_size=(left, 0)), fullgraph=True, backend="aot_eager"
    )
    for left in (3, 4, 5):
        assert torch.equal(layer(left), ring_attention(q, k, v, window_size=(left, 0)))


@pytest.mark.parametrize("window", [(sys.maxsize, 0), (sys.maxsize, -1), (1 << 62, 1 << 62)], ids=str)
def test_windows_beyond_any_length_are_none(window: tuple[int, int], seed: int) -> None:
    x = inputs(seed)
    unbounded = (-1, 0 if window[1] == 0 else -1)
    assert torch.equal(ring_attention(*x, window_size=window), ring_attention(*x, window_size=unbounded))
    q, k, v = (y[0] for y in x)
    packed = [ring_attention_packed(q, k, v, [0, 5, 12], window_size=size) for size in (window, unbounded)]
    assert torch.equal(*packed)


def test_shapes_alone() -> None:
    """Meta tensors have nothing but that, and autocast does not know them."""
    q, k, v = (torch.empty(1, 12, heads, 8, device="meta") for heads in (4, 2, 2))
    assert ring_attention(q, k, v).shape == q.shape


def test_tables_go_with_their_plan() -> None:
    """At once: where garbage is collected by hand, a cycle would hold a GPU's memory."""
    table = make_plan(Problem(11, 11, 11, 11, None, 0, "contiguous", 1), 0, "gather").steps[0].forward
    rows = weakref.ref(on_device(table, torch.device("cpu")).rows)
    assert on_device(table, torch.device("cpu")).rows is rows()
    gone = weakref.ref(table)
    gc.disable()
    try:
        make_plan.cache_clear()
        del table
        assert gone() is None and rows() is None
    finally:
        gc.enable()


class Padded(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, window_size=(q.shape[1] // 2, 0), total_length=q.shape[1])


def test_exported_lengths_are_symbols(seed: int) -> None:
    small, large = ([x.detach() for x in inputs(seed, length)] for length in (12, 30))
    length = torch.export.Dim("length", min=4, max=64)
    graph = torch.export.export(Padded(), tuple(small), dynamic_shapes=[{1: length}] * 3, strict=False).module()
    assert torch.equal(graph(*large), Padded()(*large))


def test_numbers_of_numpy_are_whole(seed: int) -> None:
    x = inputs(seed)
    got = ring_attention(*x, window_size=(np.int64(3), np.int32(-1)), total_length=np.int64(9))  # type: ignore[arg-type]
    assert torch.equal(got, ring_attention(*x, window_size=(3, -1), total_length=9))


class Counting(ReferenceBackend):
    def __init__(self) -> None:
        self.calls = 0

    def forward(self, *arguments: Any, **options: Any) -> None:
        self.calls += 1
        super().forward(*arguments, **options)


def test_a_name_means_the_backend_registered_last(seed: int) -> None:
    q, k, v = inputs(seed)
    first, second = Counting(), Counting()
    for counting in (first, second):
        register_backend("counting", counting)
        ring_attention(q, k, v, backend="counting")
    assert (first.calls, second.calls) == (1, 1)


class Reading(ReferenceBackend):
    """Kernels read the h-th number of the sinks, wherever they came from."""

    def forward(self, *arguments: Any, params: Params, **options: Any) -> None:
        assert params.sinks is not None and params.sinks.is_contiguous()
        super().forward(*arguments, params=params, **options)


@pytest.mark.parametrize("sinks", [torch.arange(8.0)[::2], torch.ones(1).expand(4)], ids=["strided", "expanded"])
def test_sinks_may_lie_anyhow(sinks: Tensor, seed: int) -> None:
    register_backend("reading", Reading())
    want = everything(*inputs(seed), sinks=sinks.clone(), backend="reference")
    got = everything(*inputs(seed), sinks=sinks, backend="reading")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("which", range(4))
def test_no_gradient_of_a_gradient_is_taken_for_a_constant(which: int, seed: int) -> None:
    sinks = torch.zeros(4, requires_grad=True)
    x = [*inputs(seed), sinks]
    out = ring_attention(*x[:3], sinks=sinks, causal=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), x[which], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_no_heads_are_refused() -> None:
    none, some = torch.zeros(1, 4, 0, 8), torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="must be a positive multiple of the number of key heads, got 0 and 1"):
        ring_attention(none, some, some)


def of_an_ended_group(seed: int) -> tuple[int, int, int]:
    """Channels of groups: before, with one more, and after its end."""

    def channels() -> int:
        gc.collect()
        return sum(map(len, channel._channels.values()))

    before = channels()
    group = dist.new_group([0, 1])
    everything(*inputs(seed), schedule="ring", group=group)
    during = channels()
    dist.destroy_process_group(group)
    del group
    return before, during, channels()


def test_channels_end_with_their_group(ranks: RunRanks, seed: int) -> None:
    for before, during, after in ranks(2, of_an_ended_group, seed):
        assert during == before + 2 and after == before
