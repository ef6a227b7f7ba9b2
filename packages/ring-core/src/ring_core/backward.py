"""Walks a plan backward: the keys travel again, their gradients follow. Knows no kernel and no layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Backend, HeadPart, Params, of_heads, on_device
from ring_core.comm import Transport
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dsinks, in the dtypes of q, k, v and the sinks, from the gradients of out and lse."""
    done: list[tuple[HeadPart, Tensor, Tensor | None]] = []
    part: HeadPart | None = None
    state: Any = None
    homeward = transport.gradients(k)
    for number, keys in enumerate(transport.keys(k, v)):
        if part is None or part.kv != keys.heads:  # every head group is a backward of its own
            if part is not None:
                done.append((part, *backend.finish(state, params=part.params(params))))
            part = of_heads(keys.heads, k.shape[2], q.shape[2])
            given = None if dlse is None else part.lse(dlse)
            shape = torch.Size((*k.shape[:2], keys.k.shape[3], k.shape[3]))
            rows = (part.rows(q), shape, part.rows(out), part.rows(dout))
            state = backend.prepare(*rows, part.lse(lse), given, params=part.params(params))
        dk, dv = homeward.buffers(number)
        step = plan.steps[keys.step]
        if len(step.backward):
            table = on_device(step.backward, q.device)
            backend.backward(
                state,
                part.rows(q),
                keys.k,
                keys.v,
                part.rows(dout),
                dk,
                dv,
                table,
                params=part.params(params),
                flags=keys.flags,
            )
        homeward.depart(number)
    assert part is not None, "a transport yields keys at least once"
    done.append((part, *backend.finish(state, params=part.params(params))))
    dq, dsinks = _joined(done, q, params)
    return dq, *homeward.collect(), dsinks


def _joined(
    done: list[tuple[HeadPart, Tensor, Tensor | None]], q: Tensor, params: Params
) -> tuple[Tensor, Tensor | None]:
    """dq (B, Sq, Hq, D) and dsinks (Hq,) of all heads."""
    if len(done) == 1:
        return done[0][1:]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dsinks = None if params.sinks is None else torch.empty_like(params.sinks)
    for part, dq_part, dsinks_part in done:
        part.rows(dq).copy_(dq_part)
        if dsinks is not None and dsinks_part is not None:
            dsinks[part.q].copy_(dsinks_part)
    return dq, dsinks
