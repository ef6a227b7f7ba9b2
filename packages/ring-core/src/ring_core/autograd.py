"""Ring attention as a differentiable operator, once for eager mode and once for compilers.

Eager calls go through `torch.autograd.Function`. Under torch.compile, with tensor subclasses and under dispatch modes
(selective checkpointing, say) the same two functions are custom ops: opaque, with nothing but tensors, numbers and
strings as arguments, fresh outputs and no aliases. Those cost some 400 µs a call on the host, mostly schema handling,
and the Function a tenth of it.

Plans are made (and cached) inside, from true sizes, so that dynamic shapes need no guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_core import agreement
from ring_core import backward as orchestration_backward
from ring_core import forward as orchestration_forward
from ring_core._torch import dispatch_mode_active, group_by_name, transforms_active
from ring_core.accumulate import accumulating
from ring_core.backend import (
    Backend,
    Capabilities,
    Dropout,
    Params,
    StagedBackend,
    accumulation_dtype,
    check_supported,
    choose_backend,
    load_backend,
    of_backends,
)
from ring_core.comm import transport
from ring_core.packed import PackedPlan
from ring_core.plan import PackedProblem, Plan, Problem, make_plan, message_bytes

NO_GROUP = ""
UNPADDED = -1
GATHER_BYTES = 2 << 30
"""schedule="auto" gathers while the keys and values of all ranks together take no more than this: one launch over
everything and no merges, at the price of holding them all. Beyond, the ring holds two chunks."""


class Call(NamedTuple):
    """Everything about a call but its tensors. Hashed in every pass, as how it is computed is remembered by it: a
    dataclass takes several times as long to do that."""

    scale: float
    softcap: float
    dropout_p: float
    left: int  # -1: unbounded
    right: int  # -1: unbounded; 0: causal
    q_total: int  # UNPADDED, or the true global length
    k_total: int
    deterministic: bool
    shared_seed: bool  # all ranks passed the same; else the first rank's counts
    heads_at_once: int  # key heads in a group of the gather schedule; 0: chosen
    layout: str
    schedule: str
    backend: str  # "": chosen by capability
    group_name: str  # NO_GROUP: this process alone
    packed: PackedProblem | None = None
    gradients: bool = False  # an input requires them: part of what the backend must be able to do

    @property
    def numbers(self) -> list[float]:
        return [self.scale, self.softcap, self.dropout_p]

    @property
    def integers(self) -> list[int]:
        flags = [int(self.deterministic), int(self.shared_seed), int(self.gradients)]
        return [self.left, self.right, self.q_total, self.k_total, *flags, self.heads_at_once]

    @property
    def names(self) -> tuple[str, str, str, str]:
        return self.layout, self.schedule, self.backend, self.group_name

    @staticmethod
    def of(code: Tensor | None, numbers: Sequence[float], integers: Sequence[int], *names: str) -> Call:
        scale, softcap, dropout_p = numbers
        left, right, q_total, k_total, deterministic, shared_seed, gradients, heads_at_once = integers
        bounds = left, right, q_total, k_total
        flags = bool(deterministic), bool(shared_seed)
        layout, schedule, backend, group_name = names
        packed = None if code is None else _problem(code.numpy().tobytes())
        where = layout, schedule, backend, group_name
        return Call(scale, softcap, dropout_p, *bounds, *flags, heads_at_once, *where, packed, bool(gradients))


def needs_gradients(*inputs: Tensor | None) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def plain(x: Tensor) -> bool:
    """Whether it is a tensor with numbers in it, and no compiler looks on."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


@lru_cache(maxsize=256)
def _problem(code: bytes) -> PackedProblem:
    return PackedProblem.decode(code)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    call: Call,
    plan: PackedPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, D) and lse (B, Hq, Sq), differentiable in q, k, v and sinks; seed: int64 (1,) where there is
    dropout; plan: of packed documents, without B everywhere. Custom ops get it as a tensor, so that new documents need
    no new graph."""
    if not plain(q) or dispatch_mode_active():
        code = None
        if plan is not None:
            q, k, v, code = q[None], k[None], v[None], plan.code
        out, lse, _ = _attention_op(q, k, v, alibi_slopes, sinks, seed, code, call.numbers, call.integers, *call.names)
        if plan is not None:
            out, lse = out.squeeze(0), lse.squeeze(0)  # whose gradients are views, unlike those of an index
        return out, lse
    arguments = q, k, v, alibi_slopes, sinks, seed, call
    if call.gradients or transforms_active():
        out, lse = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        out, lse, *_ = _forward(*arguments)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        out, lse, seed, gathered = _forward(q, k, v, alibi_slopes, sinks, seed, call)
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, sinks, seed, gathered)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, alibi_slopes, sinks, seed, gathered = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        with torch.no_grad():
            saved = q, k, v, out, lse, alibi_slopes, sinks, seed
            dq, dk, dv, dsinks = _backward(dout, dlse, *saved, ctx.call, gathered)
        if torch.is_grad_enabled():  # create_graph=True
            sources = (q, k, v, dout, *(x for x in (dlse, sinks) if x is not None))
            dq, dk, dv, dsinks = _Once.apply(dq, dk, dv, dsinks, *sources)  # type: ignore[no-untyped-call]
        return dq, dk, dv, None, dsinks, None, None


class _Once(torch.autograd.Function):
    """Gradients that depend on what follows them, but refuse to be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dsinks: Tensor | None, *sources: Tensor
    ) -> tuple[Tensor | None, ...]:
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv), None if dsinks is None else dsinks.view_as(dsinks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse()


@torch.library.custom_op("ring_core::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    code: Tensor | None,
    numbers: Sequence[float],
    integers: Sequence[int],
    layout: str,
    schedule: str,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the dropout seed that all ranks used ((0,) without dropout)."""
    call = Call.of(code, numbers, integers, layout, schedule, backend, group_name)
    out, lse, seed, _ = _forward(q, k, v, alibi_slopes, sinks, seed, call)
    return out, lse, q.new_empty(0, dtype=torch.int64) if seed is None else seed.clone()


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None, sinks: Tensor | None, seed: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_len, num_heads, _ = q.shape
    lse = q.new_empty(batch, num_heads, q_len, dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse, q.new_empty(0 if seed is None else 1, dtype=torch.int64)


@torch.library.custom_op("ring_core::attention_backward", mutates_args=())
def _attention_backward_op(
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
    code: Tensor | None,
    numbers: Sequence[float],
    integers: Sequence[int],
    layout: str,
    schedule: str,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and this rank's part of dsinks ((0,) without sinks)."""
    call = Call.of(code, numbers, integers, layout, schedule, backend, group_name)
    used = seed if seed.numel() else None
    dq, dk, dv, dsinks = _backward(dout, dlse, q, k, v, out, lse, alibi_slopes, sinks, used, call)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@_attention_backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, alibi_slopes, sinks, _, code, *rest = inputs
    out, lse, seed = output
    ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, sinks, seed, code)
    ctx.rest = rest
    ctx.mark_non_differentiable(seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, sinks, seed, code = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[3])
    dq, dk, dv, dsinks = _attention_backward_op(dout, dlse, *tensors, sinks, seed, code, *ctx.rest)
    return dq, dk, dv, None, None if sinks is None else dsinks, *[None] * 8


def _refuse(*_: Any) -> Any:
    raise RuntimeError(
        "ring attention is differentiable once; its gradient is not differentiable again (gradients of gradients, "
        "as with create_graph=True, are not supported)"
    )


_attention_op.register_autograd(_differentiate, setup_context=_save)
_attention_backward_op.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """out, lse, the seed that all ranks use, and gathered keys that the backward may be given. Inputs without B give
    results without: what has it is made of them here, where autograd looks at no views."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    *batch, length, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*batch, num_heads, length), dtype=accumulation_dtype(q.dtype), device=q.device)
    results = out, lse
    if q.dim() == 3:
        q, k, v, out, lse = [x.unsqueeze(0) for x in (q, k, v, out, lse)]
    group = _group(call)
    if group is not None and agreement.wanted():
        with _device_of(q):
            agreement.check_agreement(group, _description(q, k, call))
    way = _prepare(q, k, call, group, alibi=alibi_slopes is not None, sinks=sinks is not None)
    if seed is not None and group is not None and not call.shared_seed:
        seed = seed.clone()
        dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    params = _params(call, alibi_slopes, sinks, seed)
    staged = way.staged(q, None, params)
    with _device_of(q):
        _keep_captured(way.plan, q)
        moving = transport(way.plan, group, q.shape[2], k, "forward", call.heads_at_once, staged=staged)
        orchestration_forward.forward(
            q,
            k,
            v,
            out,
            lse,
            plan=way.plan,
            transport=moving,
            backend=way.backend,
            params=params,
        )
    return *results, seed, moving.gathered


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    call: Call,
    gathered: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dsinks."""
    q, k, v, dout = _dense(q), _dense(k), _dense(v), _dense(dout)
    flat = q.dim() == 3
    if flat:
        q, k, v, dout, out, lse = [x.unsqueeze(0) for x in (q, k, v, dout, out, lse)]
        dlse = None if dlse is None else dlse.unsqueeze(0)
    group = _group(call)
    asked = {"alibi": alibi_slopes is not None, "sinks": sinks is not None, "lse_grad": dlse is not None}
    way = _prepare(q, k, call, group, **asked)
    params = _params(call, alibi_slopes, sinks, seed)
    staged = way.staged(q, dout, params)
    with _device_of(q):
        _keep_captured(way.plan, q)
        moving = transport(
            way.plan,
            group,
            q.shape[2],
            k,
            "backward",
            call.heads_at_once,
            staged=staged,
            final_gradients=way.can.final_gradients,
            rounds_gradients=way.can.rounds_gradients,
            gathered=gathered,
        )
        dq, dk, dv, dsinks = orchestration_backward.backward(
            dout,
            dlse,
            q,
            k,
            v,
            out,
            lse,
            plan=way.plan,
            transport=moving,
            backend=way.backend,
            params=params,
            writes_gradients=way.can.writes_gradients,
        )
    if flat:
        dq, dk, dv = dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)
    return dq, dk, dv, dsinks


def _dense(x: Tensor) -> Tensor:
    """With its last dimension dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(q: Tensor) -> AbstractContextManager[object]:
    """Makes the tensors' GPU the current one, whose streams are meant everywhere below, where it is not."""
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(q.device)


_captured: dict[int, Plan] = {}


def _keep_captured(plan: Plan, q: Tensor) -> None:
    """What a CUDA graph reads of a plan, its tables on the device, stays for good: the graph may be replayed when the
    plan has long been forgotten."""
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(plan)] = plan


def _description(q: Tensor, k: Tensor, call: Call) -> dict[str, Any]:
    """What all ranks must have in common."""
    described = call._asdict() | {"dtype": q.dtype}
    del described["group_name"], described["packed"]  # names of one group may differ
    if call.packed is None:
        return described | {"q.shape": tuple(q.shape), "k.shape": tuple(k.shape)}
    return described | call.packed.description | {"q heads": q.shape[2], "k heads": k.shape[2], "head_dim": q.shape[3]}


class _Way(NamedTuple):
    """How a kind of call is computed."""

    plan: Plan
    backend: Backend
    can: Capabilities

    def staged(self, q: Tensor, dout: Tensor | None, params: Params) -> bool:
        """Whether the backend takes flags on this call: `takes_flags`, without asking anew what it can do."""
        return self.can.flags and cast(StagedBackend, self.backend).stages(q, dout, params=params)


def _group(call: Call) -> ProcessGroup | None:
    return None if call.group_name == NO_GROUP else group_by_name(call.group_name)


def _prepare(
    q: Tensor, k: Tensor, call: Call, group: ProcessGroup | None, *, alibi: bool, sinks: bool, lse_grad: bool = False
) -> _Way:
    place = (0, 1) if group is None else (group.rank(), group.size())
    return _way(q.shape, k.shape, q.dtype, q.device, alibi, sinks, lse_grad, *place, call)


@of_backends
@lru_cache(maxsize=256)
def _way(
    q_shape: torch.Size,
    k_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    alibi: bool,
    sinks: bool,
    lse_grad: bool,
    rank: int,
    world_size: int,
    call: Call,
) -> _Way:
    asked = {
        "alibi": alibi,
        "ring_alibi": alibi and world_size > 1,
        "window": call.left >= 0 or call.right > 0,
        "deterministic": call.deterministic,
        "dropout": call.dropout_p > 0,
        "gqa": q_shape[2] != k_shape[2],
        "lse_grad": lse_grad,
        "packed": call.packed is not None,
        "sinks": sinks,
        "softcap": call.softcap > 0,
    }
    features = frozenset(feature for feature, wanted in asked.items() if wanted)
    head_dim = q_shape[3]
    asked_for = device, dtype, head_dim, features, call.gradients
    name = call.backend or choose_backend(*asked_for)
    check_supported(name, *asked_for)

    problem = _problem_of(q_shape, k_shape, rank, world_size, call)
    schedule = call.schedule
    if not problem.travels:
        schedule = "ring"  # whose first step is on the keys as they lie, and the only one that sees any
    elif schedule == "auto":
        batch, _, num_kv_heads, _ = k_shape
        tokens = problem.most_needed if isinstance(problem, PackedProblem) else problem.k_length
        gathered = message_bytes(
            tokens, batch=batch, num_kv_heads=num_kv_heads, head_dim=head_dim, element_size=dtype.itemsize
        )
        schedule = "gather" if gathered <= GATHER_BYTES else "ring"
    backend = accumulating(load_backend(name), device)
    return _Way(make_plan(problem, rank, schedule), backend, backend.capabilities(device))


def _problem_of(
    q_shape: torch.Size, k_shape: torch.Size, rank: int, world_size: int, call: Call
) -> Problem | PackedProblem:
    if call.packed is not None:
        call.packed.check_lengths(rank, world_size, q_shape[1], k_shape[1])
        return call.packed
    q_length, k_length = q_shape[1] * world_size, k_shape[1] * world_size
    return Problem(
        q_length,
        k_length,
        q_length if call.q_total == UNPADDED else call.q_total,
        k_length if call.k_total == UNPADDED else call.k_total,
        None if call.left < 0 else call.left,
        None if call.right < 0 else call.right,
        call.layout,
        world_size,
    )


def _params(call: Call, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None) -> Params:
    if alibi_slopes is None and sinks is None and seed is None:
        return _plain_params(call.scale, call.softcap, call.deterministic)
    sinks = None if sinks is None else sinks.contiguous()  # kernels read the h-th number
    dropout = None if seed is None else Dropout(call.dropout_p, seed)
    return Params(call.scale, call.softcap, alibi_slopes, sinks, dropout, call.deterministic)


@lru_cache(maxsize=64)
def _plain_params(scale: float, softcap: float, deterministic: bool) -> Params:
    return Params(scale, softcap, deterministic=deterministic)
