"""Walks a plan forward: start a transfer, compute a step, hand on. Knows no kernel and no layout."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.backend import Backend, Params, of_heads, on_device
from ring_core.comm import Transport, Turns, compute_after
from ring_core.plan import Plan


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    plan: Plan,
    transport: Transport,
    backend: Backend,
    params: Params,
) -> None:
    """Writes out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq), natural log, in the accumulation dtype, for local q,
    k, v."""
    num_heads, device = q.shape[2], q.device
    state = torch.empty(q.shape, dtype=lse.dtype, device=device) if plan.spans_steps else None
    turns = Turns(device, several=transport.side_by_side, lane=transport.urgent)
    for keys in transport.keys(k, v):
        table = plan.steps[keys.step].forward
        with turns.turn(keys.turn):
            compute_after(keys.arrived)
            if len(table.rows):
                part = of_heads(keys.heads, k.shape[2], num_heads)
                backend.forward(
                    part.rows(q),
                    keys.k,
                    keys.v,
                    part.rows(out),
                    part.lse(lse),
                    None if state is None else part.rows(state),
                    on_device(table, device),
                    params=part.params(params),
                    flags=keys.flags,
                )
            keys.read()
    turns.join()
    _void_padding(plan, lse, params)


def _void_padding(plan: Plan, lse: Tensor, params: Params) -> None:
    """Rows of padding see nothing, not even the sink that every true row has."""
    if params.sinks is not None:
        for start, stop in plan.problem.padding_rows(plan.rank):
            lse[:, :, start:stop] = -torch.inf
