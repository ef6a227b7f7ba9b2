"""Calls of one group on several streams and in CUDA graphs, and what is left of a group that has ended."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import RingCommError, ring_attention
from ring_core.backend import register_backend
from ring_core.comm import arena_bytes, gather_through
from ring_core.reference import ReferenceBackend
from ring_core.testing.plugin import RunRanks

CYCLES = 40_000_000
"""Some 20 ms: longer than all that is enqueued behind them takes."""


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed + dist.get_rank())
    shapes = [(1, 128, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def everything(x: list[Tensor], **options: Any) -> list[Tensor]:
    q, k, v, dout = x
    out, lse = ring_attention(q, k, v, causal=True, layout="zigzag", return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


class Slow(ReferenceBackend):
    """Begins late on whatever stream it is called."""

    def forward(self, *arguments: Any, **options: Any) -> None:
        torch.cuda._sleep(CYCLES)
        super().forward(*arguments, **options)

    def backward(self, *arguments: Any, **options: Any) -> None:
        torch.cuda._sleep(CYCLES)
        super().backward(*arguments, **options)


def on_two_streams(seed: int, schedule: str) -> bool:
    """The first call has hardly begun when the second one is made, on a stream that knows nothing of it."""
    register_backend("slow", Slow())
    several = [inputs(seed), inputs(seed + 10)]
    wanted = [everything(x, schedule=schedule, backend="reference") for x in several]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in several]
    got = []
    for x, stream, backend in zip(several, streams, ("slow", "reference"), strict=True):
        with torch.cuda.stream(stream):
            got.append(everything(x, schedule=schedule, backend=backend))
    torch.cuda.synchronize()
    return all(
        torch.equal(a, b) for mine, theirs in zip(got, wanted, strict=True) for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_calls_on_two_streams(ranks: RunRanks, seed: int, schedule: str) -> None:
    assert ranks(2, on_two_streams, seed, schedule) == [True, True]


def capture_of_something_else(seed: int) -> bool:
    """While the watchdog looks at the waits of the call before."""
    x = inputs(seed)
    for _ in range(3):
        want = everything(x, schedule="gather", backend="reference")
        number, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            number += 1
            time.sleep(0.5)
        graph.replay()
        assert number.item() == 1
    got = everything(x, schedule="gather", backend="reference")
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.multi_gpu(2)
def test_a_capture_beside_the_watchdog(ranks: RunRanks, seed: int) -> None:
    assert ranks(2, capture_of_something_else, seed) == [True, True]


def captured(seed: int) -> tuple[str, bool]:
    """What a capture says whose communicators have not been made; whether one is right where they have."""
    group = dist.new_group([0, 1])
    options: dict[str, Any] = {"schedule": "gather", "backend": "reference", "group": group}
    x, other = inputs(seed), inputs(seed + 10)
    want = everything(other, **options)
    graph, message = torch.cuda.CUDAGraph(), ""
    with torch.cuda.graph(graph):
        try:
            everything(x, **options)
        except RingCommError as error:
            message = str(error)
    with gather_through("collectives"):
        everything(x, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(x, **options)
    with torch.no_grad():
        for mine, theirs in zip(x, other, strict=True):
            mine.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    return message, all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.multi_gpu(2)
def test_a_captured_gather(ranks: RunRanks, seed: int) -> None:
    for message, right in ranks(2, captured, seed):
        assert "while a CUDA graph is captured no communicator can be made" in message
        assert right


def arenas_of_an_ended_group(seed: int) -> tuple[int, int, int]:
    before = arena_bytes()
    group = dist.new_group([0, 1])
    with gather_through("peer_memory"):
        everything(inputs(seed), schedule="gather", backend="reference", group=group)
    during = arena_bytes()
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return before, during, arena_bytes()


@pytest.mark.multi_gpu(2)
def test_arenas_end_with_their_group(ranks: RunRanks, seed: int) -> None:
    for before, during, after in ranks(2, arenas_of_an_ended_group, seed):
        assert during > before == after


def after_another_current_device(seed: int) -> bool:
    """RING_CHECK compares on the tensors' GPU, though another is current."""
    x = inputs(seed)
    want = everything(x, schedule="ring", backend="reference")
    mine = torch.cuda.current_device()
    with torch.cuda.device((mine + 1) % 2):
        got = everything(x, schedule="ring", backend="reference")
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.multi_gpu(2)
def test_ranks_are_compared_on_their_gpus(ranks: RunRanks, seed: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("ranks share the only GPU: there is no other device")
    assert ranks(2, after_another_current_device, seed, env={"RING_CHECK": "1"}) == [True, True]
