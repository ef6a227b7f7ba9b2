"""What a call costs besides its kernels: the Python path at world size 1, a small ring of two processes. Recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import backend, ring_attention
from ring_core.comm import gather_through
from ring_core.reference import ReferenceBackend
from ring_core.testing import get_pool


class NoOp(ReferenceBackend):
    """Computes nothing: what remains is ring-core, torch's dispatcher and autograd."""

    name = "no-op"

    def forward(self, *args: Any, **options: Any) -> None:
        pass

    def prepare(self, q: Tensor, *args: Any, **options: Any) -> Any:
        return q

    def backward(self, *args: Any, **options: Any) -> None:
        pass

    def finish(self, state: Any, **options: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(state), None


@pytest.fixture(autouse=True)
def no_op() -> Iterator[None]:
    backend.register_backend("no-op", NoOp())
    yield
    backend._registered().pop("no-op")
    for known in (backend.load_backend, backend.check_supported, backend.choose_backend):
        known.cache_clear()


def tensors(grad: bool) -> list[Tensor]:
    return [torch.randn(1, 8, heads, 16, requires_grad=grad) for heads in (4, 2, 2)]


def test_python_path_forward(benchmark: Any) -> None:
    q, k, v = tensors(grad=False)
    benchmark(lambda: ring_attention(q, k, v, causal=True, backend="no-op"))


def test_python_path_forward_and_backward(benchmark: Any) -> None:
    q, k, v = tensors(grad=True)
    dout = torch.randn(1, 8, 4, 16)
    benchmark(lambda: torch.autograd.grad(ring_attention(q, k, v, causal=True, backend="no-op"), (q, k, v), dout))


def test_python_path_all_options(benchmark: Any) -> None:
    q, k, v = tensors(grad=False)
    options: dict[str, Any] = {
        "window_size": (4, 0), "softcap": 2.0, "sinks": torch.zeros(4), "alibi_slopes": torch.ones(4),
        "dropout_p": 0.1, "dropout_seed": torch.tensor([3]), "total_length": 7, "return_lse": True,
    }  # fmt: skip
    benchmark(lambda: ring_attention(q, k, v, backend="no-op", **options))


CALLS = 10


def attend(transport: str) -> float:
    """Seconds of CALLS forward and backward passes."""
    schedule: Any = "ring" if transport == "ring" else "gather"
    q, k, v = (torch.randn(1, 256, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    dout = torch.randn(1, 256, 4, 32)
    with gather_through("shared_memory" if transport == "shared_memory" else "collectives"):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(CALLS):
            out = ring_attention(q, k, v, causal=True, layout="zigzag", schedule=schedule)
            torch.autograd.grad(out, (q, k, v), dout)
        return time.perf_counter() - start


@pytest.mark.parametrize("transport", ["ring", "gather", "shared_memory"])
def test_two_gloo_ranks(benchmark: Any, transport: str) -> None:
    pool = get_pool(2)
    pool.run(attend, transport)  # connects
    inside = []
    benchmark.pedantic(lambda: inside.append(max(pool.run(attend, transport))), rounds=5)
    benchmark.extra_info["milliseconds_a_call_on_the_ranks"] = 1e3 * min(inside) / CALLS
