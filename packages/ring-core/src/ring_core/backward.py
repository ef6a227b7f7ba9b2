"""Walks a plan backward: the keys travel again, their gradients follow. Knows no kernel and no layout."""

from __future__ import annotations

from torch import Tensor

from ring_core.backend import Backend, Params, on_device
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
    state = backend.prepare(q, k.shape, out, dout, lse, dlse, params=params)
    homeward = transport.gradients(k)
    for number, (step, keys) in enumerate(zip(plan.steps, transport.keys(k, v), strict=True)):
        dk, dv = homeward.buffers(number)
        if len(step.backward):
            table = on_device(step.backward, q.device)
            backend.backward(state, q, keys.k, keys.v, dout, dk, dv, table, params=params, flags=keys.flags)
        homeward.depart(number)
    dq, dsinks = backend.finish(state, params=params)
    dk, dv = homeward.collect()
    return dq, dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True), dsinks  # copies: both lie in one buffer
