"""Ring attention as custom ops: opaque to torch.compile, differentiable once, with nothing but tensors, numbers and strings as
arguments, fresh outputs and no aliases. Plans are made (and cached) inside, from true sizes, so that dynamic shapes need no guards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core import backward as orchestration_backward
from ring_core import forward as orchestration_forward
from ring_core._torch import group_by_name
from ring_core.accumulate import accumulating
from ring_core.backend import Dropout, Params, accumulation_dtype, check_supported, choose_backend, load_backend
from ring_core.comm import transport
from ring_core.plan import Plan, Problem, make_plan, message_bytes

NO_GROUP = ""
UNPADDED = -1
GATHER_BYTES = 2 << 30
"""schedule="auto" gathers while the keys and values of all ranks together take no more than this: one launch over everything and
no merges, at the price of holding them all. Beyond, the ring holds two chunks."""


@torch.library.custom_op("ring_core::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    shared_seed: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    q_total: int,
    k_total: int,
    deterministic: bool,
    layout: str,
    schedule: str,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the dropout seed that all ranks used ((0,) without dropout). left, right: -1 is unbounded; q_total, k_total: -1
    is no padding; seed int64 (1,), taken from the first rank unless `shared_seed` says that all have the same."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    group = _group(group_name)
    if dropout_p and seed is not None:
        seed = seed.clone()
        if group is not None and not shared_seed:
            dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    plan = _plan(q, k, left, right, q_total, k_total, layout, schedule, group)
    name = _checked(q, k, backend, alibi_slopes, sinks, softcap, dropout_p, deterministic, left, right)
    params = _params(scale, softcap, alibi_slopes, sinks, dropout_p, seed, deterministic)
    out, lse = orchestration_forward.forward(
        q, k, v,
        plan=plan,
        transport=transport(plan, group),
        backend=accumulating(load_backend(name), q.device),
        params=params,
    )  # fmt: skip
    return out, lse, q.new_empty(0, dtype=torch.int64) if not dropout_p or seed is None else seed


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_len, num_heads, _ = q.shape
    lse = q.new_empty(batch, num_heads, q_len, dtype=accumulation_dtype(q.dtype))
    dropout_p = args[6]
    return q.new_empty(q.shape), lse, q.new_empty(1 if dropout_p else 0, dtype=torch.int64)


@torch.library.custom_op("ring_core::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    q_total: int,
    k_total: int,
    deterministic: bool,
    layout: str,
    schedule: str,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and this rank's part of dsinks ((0,) without sinks)."""
    q, k, v, dout = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, dout))
    group = _group(group_name)
    plan = _plan(q, k, left, right, q_total, k_total, layout, schedule, group)
    lse_grad = dlse is not None
    name = _checked(q, k, backend, alibi_slopes, sinks, softcap, dropout_p, deterministic, left, right, lse_grad)
    dq, dk, dv, dsinks = orchestration_backward.backward(
        dout, dlse, q, k, v, out, lse,
        plan=plan,
        transport=transport(plan, group),
        backend=accumulating(load_backend(name), q.device),
        params=_params(scale, softcap, alibi_slopes, sinks, dropout_p, seed, deterministic),
    )  # fmt: skip
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    alibi_slopes: Tensor | None, sinks: Tensor | None, *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, alibi_slopes, sinks, _, _, *rest = inputs
    out, lse, seed = output
    ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, sinks, seed)
    ctx.rest = rest
    ctx.mark_non_differentiable(seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, alibi_slopes, sinks, seed = ctx.saved_tensors
    if dout is None:  # only lse was used
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, alibi_slopes, sinks, seed, *ctx.rest)
    return dq, dk, dv, None, None if sinks is None else dsinks, *[None] * 14


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "ring attention is differentiable once; its gradient is not differentiable again (gradients of gradients, as with "
        "create_graph=True, are not supported)"
    )


attention.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def _group(group_name: str) -> ProcessGroup | None:
    return None if group_name == NO_GROUP else group_by_name(group_name)


def _plan(
    q: Tensor,
    k: Tensor,
    left: int,
    right: int,
    q_total: int,
    k_total: int,
    layout: str,
    schedule: str,
    group: ProcessGroup | None,
) -> Plan:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    q_length, k_length = q.shape[1] * world_size, k.shape[1] * world_size
    problem = Problem(
        q_length,
        k_length,
        q_length if q_total == UNPADDED else q_total,
        k_length if k_total == UNPADDED else k_total,
        None if left < 0 else left,
        None if right < 0 else right,
        layout,
        world_size,
    )
    if world_size == 1:
        schedule = "ring"  # of one step, on the keys as they lie
    elif schedule == "auto":
        batch, _, num_kv_heads, head_dim = k.shape
        gathered = message_bytes(
            k_length, batch=batch, num_kv_heads=num_kv_heads, head_dim=head_dim, element_size=k.element_size()
        )
        schedule = "gather" if gathered <= GATHER_BYTES else "ring"
    return make_plan(problem, rank, schedule)


def _checked(
    q: Tensor,
    k: Tensor,
    backend: str,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    left: int,
    right: int,
    lse_grad: bool = False,
) -> str:
    """The backend's name, after making sure that it can do this call."""
    asked = {
        "alibi": alibi_slopes is not None,
        "band": left >= 0 or right > 0,
        "deterministic": deterministic,
        "dropout": dropout_p > 0,
        "gqa": q.shape[2] != k.shape[2],
        "lse_grad": lse_grad,
        "sinks": sinks is not None,
        "softcap": softcap > 0,
    }
    features = frozenset(feature for feature, wanted in asked.items() if wanted)
    head_dim = q.shape[3]
    if not backend:
        return choose_backend(q.device, q.dtype, head_dim, features)
    check_supported(backend, q.device, q.dtype, head_dim, features)
    return backend


def _params(
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    deterministic: bool,
) -> Params:
    dropout = Dropout(dropout_p, seed) if dropout_p and seed is not None else None
    return Params(scale, softcap, alibi_slopes, sinks, dropout, deterministic)
