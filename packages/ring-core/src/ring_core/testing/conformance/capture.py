"""Calls in CUDA graphs: whatever is replayed, in whatever order, gives what the calls give."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.interface import ring_attention
from ring_core.testing.measure import compare

_LENGTHS = (300, 3000)
_GARBAGE = 7
_WORDS = (1, 1 << 7, 1 << 18, 1 << 24)  # of memory of every size that torch's allocator keeps apart


def check_capture(backend: str, *, dtype: torch.dtype = torch.bfloat16, seed: int, limit: float = 1e-2) -> None:
    """Captures a forward and its backward of two lengths, called before on another stream, in memory that holds
    garbage, and replays them in either order, the one captured last first.

    backend: of `ring_core.ring_attention`, on the current GPU. limit: of a difference's norm, relative (sums in any
    order differ).

    Raises AssertionError.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(seed)
    inputs = [
        [torch.randn(2, length, heads, 64, generator=generator, device=device).to(dtype) for heads in (16, 4, 4, 16)]
        for length in _LENGTHS
    ]
    wanted = [_call(backend, *x) for x in inputs]
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    first = torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, pool=pool, stream=stream):
        garbage = [torch.full((words,), _GARBAGE, dtype=torch.int32, device=device) for words in _WORDS]
    first.replay()
    del garbage
    graphs, results = [], []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            results.append(_call(backend, *x))
        graphs.append(graph)
    for number in (1, 0, 0, 1, 1):
        for result in results[number]:
            result.fill_(torch.nan)
        graphs[number].replay()
        for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results[number], wanted[number], strict=True):
            difference = compare(got, want).relative
            assert difference <= limit, f"{name} of {_LENGTHS[number]} tokens differs by {difference:.2e} in a graph"


def _call(backend: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = ring_attention(*leaves, causal=True, backend=backend, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
