"""A rank's kernels alone: what attention costs when every key is local already and nothing has to travel.

For one rank's share of a zigzag ring, exactly the backend calls of the gather schedule, on pieces that were filled
before the clock starts. What a ring takes beyond this is its overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_compare.implementations import RingCoreBackend, Traits, display_name
from ring_compare.suites import Cell
from ring_core.accumulate import accumulating
from ring_core.backend import Backend, Params, accumulation_dtype, load_backend, on_device
from ring_core.plan import GatherPlan, Problem, make_plan


@dataclass(frozen=True, eq=False)
class _Share:
    """A rank's keys, all of them, and what to do with them."""

    plan: GatherPlan
    backend: Backend
    params: Params
    k: Tensor  # (C, B, S_piece, Hkv, D)
    v: Tensor
    dk: Tensor  # fp32, never zeroed again: sums that nobody reads
    dv: Tensor


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, share: _Share) -> tuple[Tensor, Tensor]:
        sums = accumulation_dtype(q.dtype)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=sums, device=q.device)  # (B, Hq, Sq)
        table = on_device(share.plan.steps[0].forward, q.device)
        share.backend.forward(q, share.k, share.v, out, lse, None, table, params=share.params)
        ctx.save_for_backward(q, out, lse)
        ctx.share = share
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, None]:
        q, out, lse = ctx.saved_tensors
        share: _Share = ctx.share
        # As ring_core does it: `k_shape` is that of the local keys.
        local = torch.Size((q.shape[0], q.shape[1], *share.k.shape[3:]))
        state = share.backend.prepare(q, local, out, dout, lse, None, params=share.params)
        table = on_device(share.plan.steps[0].backward, q.device)
        share.backend.backward(state, q, share.k, share.v, dout, share.dk, share.dv, table, params=share.params)
        dq, _dsinks = share.backend.finish(state, params=share.params)
        return dq, None


class LocalKernels:
    """The backend calls of one rank's share; the option names the backend: `local[native[cudnn]]`."""

    def __init__(self, option: str = "native") -> None:
        self.name = f"local[{option}]"
        self._backend = RingCoreBackend(option)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        label = f"local[{display_name(option, self._backend.provider(device))}]"
        # dk and dv stay in the pieces, where other ranks would have to fetch them.
        self.traits = Traits(own_schedule=True, label=label, omits=frozenset(("dk", "dv")))
        self._shares: dict[tuple[Cell, int, int], _Share] = {}

    def provider(self, device: torch.device) -> str:
        """The backend's."""
        return self._backend.provider(device)

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """The zigzag layout, which gives every rank the same work, of one sequence."""
        if cell.documents:
            return "the kernels alone are compared on one sequence; local-varlen is for documents"
        if cell.layout != "zigzag":
            return "the kernels alone are compared on the zigzag layout, whose ranks have equal work"
        return self._backend.supports(cell, device)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """out, lse; the first call with these keys fetches everybody's, untimed."""
        key = cell, k.data_ptr(), v.data_ptr()
        if key not in self._shares:
            self._shares[key] = self._fill(k, v, cell, group)
        out, lse = _Kernels.apply(q, self._shares[key])  # type: ignore[no-untyped-call]
        return out, lse

    def _fill(self, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None) -> _Share:
        rank = dist.get_rank(group) if cell.world_size > 1 else 0
        left, right = cell.window_size
        if cell.causal:
            right = 0
        bounds = (None if left < 0 else left, None if right < 0 else right)
        problem = Problem(cell.Sq, cell.Sk, cell.Sq, cell.Sk, *bounds, cell.layout, cell.world_size)
        plan = make_plan(problem, rank, "gather")
        assert isinstance(plan, GatherPlan)
        pieces = [_pieces(plan, _everybodys(x.detach(), cell, group)) for x in (k, v)]
        sums = accumulation_dtype(k.dtype)
        gradients = [torch.zeros(x.shape, dtype=sums, device=k.device) for x in pieces]
        backend = accumulating(load_backend(self._backend.name), k.device)
        return _Share(plan, backend, Params(scale=cell.D**-0.5), *pieces, *gradients)


def _everybodys(x: Tensor, cell: Cell, group: dist.ProcessGroup | None) -> list[Tensor]:
    if cell.world_size == 1:
        return [x]
    shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(cell.world_size)]
    dist.all_gather(shards, x.contiguous(), group=group)
    return shards


def _pieces(plan: GatherPlan, chunks: list[Tensor]) -> Tensor:
    """(C, B, S_piece, Hkv, D), pieces side by side in memory along the sequence, as ring_core lays them out."""
    batch, _, heads, head_dim = chunks[0].shape
    buffer = chunks[0].new_zeros(batch, plan.piece_count, plan.piece_length, heads, head_dim).transpose(0, 1)
    for place in plan.placements:
        tokens = chunks[place.source][:, place.start : place.start + place.length]
        buffer[place.piece, :, place.offset : place.offset + place.length] = tokens
    return buffer
