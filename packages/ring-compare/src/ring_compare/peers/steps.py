"""A backend's calls by the contract on one rank: all keys at once, or in N accumulating steps as a ring makes them.

    steps-1[triton]     q against one piece of Sk keys                      FIRST | LAST
    steps-4[triton]     q against four pieces of Sk / 4 keys, one by one    FIRST │ · │ · │ LAST

Between steps a row lives in (state, lse). Nothing travels, tables and pieces are made before the clock starts: what
four steps take beyond one call is the price of accumulating, and the host's time for sixteen, divided by sixteen, the
time that it takes for one launch. The backward prepares once, adds a step's dk and dv, and finishes once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ring_compare.implementations import RingCoreBackend, Traits, display_name
from ring_compare.peers.sdpa import one_rank_alone
from ring_compare.suites import Cell
from ring_core.accumulate import accumulating
from ring_core.backend import Backend, DeviceTable, Params, accumulation_dtype, load_backend, on_device
from ring_core.segment import FIRST, LAST, Segment, Table


@dataclass(frozen=True, eq=False)
class _Steps:
    """What a cell's calls are made of."""

    backend: Backend
    params: Params
    tables: tuple[DeviceTable, ...]
    length: int  # keys a step
    writes_gradients: bool

    def pieces(self, x: Tensor) -> list[Tensor]:
        """(B, Sk, Hkv, D) as views (1, B, length, Hkv, D), one a step."""
        return [part[None] for part in x.split(self.length, dim=1)]


def step_tables(cell: Cell, count: int) -> list[Table]:
    """One strip of all queries and one segment each; causal masks are aligned bottom right, as everywhere here."""
    length, ahead = cell.Sk // count, cell.Sk - cell.Sq
    tables = []
    for step in range(count):
        start = step * length
        upper = min(max(ahead - start, -cell.Sq), length) if cell.causal else length
        flags = (FIRST if step == 0 else 0) | (LAST if step == count - 1 else 0)
        segment = Segment(0, cell.Sq, 0, 0, length, -cell.Sq, upper, ahead, start, 1, -1, flags)
        tables.append(Table(np.array([segment], dtype=np.int32), np.array([0, 1], dtype=np.int32)))
    return tables


def _forward(q: Tensor, ks: list[Tensor], vs: list[Tensor], steps: _Steps) -> tuple[Tensor, Tensor]:
    sums = accumulation_dtype(q.dtype)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=sums, device=q.device)  # (B, Hq, Sq)
    state = torch.empty(q.shape, dtype=sums, device=q.device) if len(steps.tables) > 1 else None
    for k, v, table in zip(ks, vs, steps.tables, strict=True):
        steps.backend.forward(q, k, v, out, lse, state, table, params=steps.params)
    return out, lse


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, steps: _Steps) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, steps.pieces(k), steps.pieces(v), steps)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.steps = steps
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        steps: _Steps = ctx.steps
        empty = torch.empty if steps.writes_gradients else torch.zeros
        dk, dv = (empty(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in (k, v))
        state = steps.backend.prepare(q, k.shape, out, dout, lse, None, params=steps.params)
        for *tensors, table in zip(*map(steps.pieces, (k, v, dk, dv)), steps.tables, strict=True):
            piece_k, piece_v, piece_dk, piece_dv = tensors
            steps.backend.backward(state, q, piece_k, piece_v, dout, piece_dk, piece_dv, table, params=steps.params)
        dq, _dsinks = steps.backend.finish(state, params=steps.params)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


class Steps:
    """N calls of a backend; the option names it: `steps-4[triton]`."""

    def __init__(self, count: int, option: str) -> None:
        self.name = f"steps-{count}[{option}]"
        self._count = count
        self._backend = RingCoreBackend(option)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        label = f"steps-{count}[{display_name(option, self._backend.provider(device))}]"
        self.traits = Traits(label=label)
        self._steps: dict[tuple[Cell, torch.device], _Steps] = {}
        self._pieces: tuple[tuple[int, int], list[Tensor], list[Tensor]] | None = None

    def provider(self, device: torch.device) -> str:
        """The backend's."""
        return self._backend.provider(device)

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """One sequence on one rank, its keys a multiple of N."""
        if reason := one_rank_alone(cell):
            return reason
        if cell.Sk % self._count:
            return f"{cell.Sk} keys do not divide into {self._count} steps"
        return self._backend.supports(cell, device)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """out, lse."""
        key = cell, q.device
        if key not in self._steps:
            self._steps[key] = self._make(cell, q.device)
        steps = self._steps[key]
        if torch.is_grad_enabled():
            out, lse = _Contract.apply(q, k, v, steps)  # type: ignore[no-untyped-call]
            return out, lse
        at = k.data_ptr(), v.data_ptr()
        if self._pieces is None or self._pieces[0] != at:
            self._pieces = at, steps.pieces(k), steps.pieces(v)
        return _forward(q, *self._pieces[1:], steps)

    def _make(self, cell: Cell, device: torch.device) -> _Steps:
        backend = accumulating(load_backend(self._backend.name), device)
        tables = tuple(on_device(table, device) for table in step_tables(cell, self._count))
        writes = backend.capabilities(device).writes_gradients
        return _Steps(backend, Params(scale=cell.D**-0.5), tables, cell.Sk // self._count, writes)


steps_1, steps_4, steps_8, steps_16 = (partial(Steps, count) for count in (1, 4, 8, 16))
"""Factories."""
