"""Walks a plan forward: start a transfer, compute a step, hand on. Knows no kernel and no layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.backend import Backend, Params, accumulation_dtype, of_heads, on_device
from ring_core.comm import Transport, Turns, compute_after
from ring_core.plan import Plan


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, transport: Transport, backend: Backend, params: Params
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq), natural log, in the accumulation dtype, for local q, k,
    v."""
    sums = accumulation_dtype(q.dtype)
    batch, q_len, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, q_len, dtype=sums, device=q.device)
    state = torch.empty(q.shape, dtype=sums, device=q.device) if plan.spans_steps else None
    turns = Turns(q.device, several=transport.side_by_side)
    for keys in transport.keys(k, v):
        step = plan.steps[keys.step]
        with turns.turn(keys.turn):
            compute_after(keys.arrived)
            if len(step.forward):
                part = of_heads(keys.heads, k.shape[2], num_heads)
                backend.forward(
                    part.rows(q),
                    keys.k,
                    keys.v,
                    part.rows(out),
                    part.lse(lse),
                    None if state is None else part.rows(state),
                    on_device(step.forward, q.device),
                    params=part.params(params),
                    flags=keys.flags,
                )
            keys.read()
    turns.join()
    _void_padding(plan, lse, params)
    return out, lse


def _void_padding(plan: Plan, lse: Tensor, params: Params) -> None:
    """Rows of padding see nothing, not even the sink that every true row has."""
    if params.sinks is not None:
        for start, stop in plan.problem.padding_rows(plan.rank):
            lse[:, :, start:stop] = -torch.inf
