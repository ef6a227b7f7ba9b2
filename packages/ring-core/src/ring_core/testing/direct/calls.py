"""What probes time: one kernel on randn inputs in bf16, and cuDNN on the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_core.backend import Params, on_device
from ring_core.testing.direct.backward import Functions, causal_keys
from ring_core.testing.direct.forward import Forward
from ring_core.testing.direct.tables import causal_table

Shape = tuple[int, int, tuple[int, int], int]
"""Batch, tokens, heads of queries and of keys, head dim."""
Work = Callable[[], object]


class _Call:
    def __init__(self, shape: Shape, causal: bool) -> None:
        batch, length, heads, dim = shape
        self.title = f"B{batch} S{length} H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full'}"
        self.causal, self.params = causal, Params(dim**-0.5)
        self.q = torch.randn(batch, length, heads[0], dim, device="cuda", dtype=torch.bfloat16)
        self.kv = torch.randn(2, 1, batch, length, heads[1], dim, device="cuda", dtype=torch.bfloat16)
        self._products = batch * heads[0] * length * length * dim * (1.0 if causal else 2.0)  # FLOPs of each
        # (B, H, S, D), repeated as ring-compare does: not every release's cuDNN path takes fewer key heads
        repeated = (x[0].repeat_interleave(heads[0] // heads[1], dim=2) for x in self.kv)
        self._leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (self.q, *repeated)]


class ForwardCall(_Call):
    """A forward over all keys in one call."""

    def __init__(self, forward: Forward, shape: Shape, causal: bool) -> None:
        super().__init__(shape, causal)
        self.flops = 2 * self._products
        self._forward = forward
        self._out, self._lse = (
            torch.empty_like(self.q),
            self.q.new_empty(self.q.shape[0], *self.q.shape[2:0:-1]).float(),
        )
        length = self.q.shape[1]
        self._table = on_device(causal_table(length, length, causal=causal), self.q.device)

    def kernel(self, settings: Any = None) -> Work:
        given = (self.q, self.kv[0], self.kv[1], self._out, self._lse, None, self._table)
        return lambda: self._forward(*given, params=self.params, settings=settings)

    def cudnn(self) -> Work:
        q, k, v = (x.detach() for x in self._leaves)

        def go() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

        return go


class BackwardCall(_Call):
    """A backward of one call over all keys, dk and dv written in the inputs' dtype; params may be replaced."""

    def __init__(self, functions: Functions, shape: Shape, causal: bool) -> None:
        super().__init__(shape, causal)
        self.flops = 5 * self._products
        self._functions = functions
        self._dout, self._dkv = torch.randn_like(self.q), torch.empty_like(self.kv)
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = torch.ops.aten._scaled_dot_product_flash_attention(*self._leaves, 0.0, causal)
        self._out, self._lse = flash[0].transpose(1, 2).contiguous(), flash[1].float()
        length = self.q.shape[1]
        self._table = on_device(causal_keys(length, length, causal=causal), self.q.device)
        self._state = self.prepare()

    def prepare(self) -> Any:
        return self._functions.prepare(self.q, self._out, self._dout, self._lse, None, params=self.params)

    def main(self, settings: Any = None) -> Work:
        """The main kernel alone."""
        params, state = self.params, self.prepare()
        return lambda: self._main(state, params, settings)

    def _main(self, state: Any, params: Params, settings: Any) -> None:
        given: tuple[Tensor, ...] = (self.q, self.kv[0], self.kv[1], self._dout, self._dkv[0], self._dkv[1])
        self._functions.backward(state, *given, self._table, params=params, departures=None, settings=settings)

    def finish(self) -> None:
        self._functions.finish(self._state, params=self.params)

    def whole(self) -> None:
        state = self.prepare()
        self._main(state, self.params, None)
        self._functions.finish(state, params=self.params)

    def cudnn(self) -> Work:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = self._leaves
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        grad = self._dout.transpose(1, 2)
        return lambda: torch.autograd.grad(out, self._leaves, grad, retain_graph=True)


def forward_calls(forward: Forward, shape: Shape) -> Iterator[ForwardCall]:
    """Causal and full."""
    return (ForwardCall(forward, shape, causal) for causal in (True, False))


def backward_calls(functions: Functions, shape: Shape) -> Iterator[BackwardCall]:
    """Causal and full."""
    return (BackwardCall(functions, shape, causal) for causal in (True, False))
