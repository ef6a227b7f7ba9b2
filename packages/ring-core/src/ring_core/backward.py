"""Walks a plan backward: the keys travel again, their gradients follow. Knows no kernel and no layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Backend, HeadPart, Params, of_heads, on_device
from ring_core.comm import Transport, Turns, compute_after
from ring_core.plan import Plan


def backward(
    dout: Tensor,
    dlse: Tensor | None,
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
    writes_gradients: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dsinks, in the dtypes of q, k, v and the sinks, from the gradients of out and lse."""
    num_kv_heads, num_heads, device = k.shape[2], q.shape[2], q.device
    states: list[tuple[HeadPart, Any, torch.Event | None]] = []

    def prepared(part: HeadPart) -> Any:
        shape = torch.Size((*k.shape[:2], part.kv.stop - part.kv.start, k.shape[3]))
        rows = (part.rows(q), shape, part.rows(out), part.rows(dout))
        some_dlse = None if dlse is None else part.lse(dlse)
        return backend.prepare(*rows, part.lse(lse), some_dlse, params=part.params(params))

    if transport.gathered is not None and transport.head_groups == 1:  # no keys are sent first: all may wait for it
        whole = of_heads(slice(0, num_kv_heads), num_kv_heads, num_heads)
        states.append((whole, prepared(whole), None))
    turns = Turns(device, several=transport.side_by_side, lane=transport.urgent)
    written = writes_gradients or transport.final_gradients  # by the backend: buffers may hold anything before
    homeward = transport.gradients(k, zeroed=not written)
    dq = dsinks = None
    if transport.head_groups > 1:  # each group is a backward of its own, and writes its part of these
        dq = torch.empty(q.shape, dtype=q.dtype, device=device)
        dsinks = None if params.sinks is None else torch.empty_like(params.sinks)
    for keys in transport.keys(k, v):
        part = of_heads(keys.heads, num_kv_heads, num_heads)
        given = part.params(params)
        with turns.turn(keys.turn):
            if not states or states[-1][0] is not part:
                states.append((part, prepared(part), turns.now()))
            else:
                compute_after(states[-1][2])
            state = states[-1][1]
            compute_after(keys.arrived)
            to = homeward.buffers(keys)
            table = plan.steps[keys.step].backward
            if len(table.rows):
                backend.backward(
                    state,
                    part.rows(q),
                    keys.k,
                    keys.v,
                    part.rows(dout),
                    to.dk,
                    to.dv,
                    on_device(table, device),
                    params=given,
                    flags=keys.flags,
                    departures=to.departures,
                )
            elif written:
                to.dk.zero_()
                to.dv.zero_()
            keys.read()
            homeward.depart(keys)
            if dq is not None and keys.alone:  # here and now: its memory is the next but one's
                states.pop()
                _keep(part, dq, dsinks, *backend.finish(state, params=given))
    turns.join()
    if dq is None:
        dq, dsinks = backend.finish(states[0][1], params=params)
    else:
        for part, state, _ in states:
            _keep(part, dq, dsinks, *backend.finish(state, params=part.params(params)))
    return dq, *homeward.collect(), dsinks


def _keep(part: HeadPart, dq: Tensor, dsinks: Tensor | None, dq_part: Tensor, dsinks_part: Tensor | None) -> None:
    """Puts a head group's dq (B, Sq, h, D) and dsinks (h,) among those of all heads."""
    part.rows(dq).copy_(dq_part)
    if dsinks is not None and dsinks_part is not None:
        dsinks[part.q].copy_(dsinks_part)
