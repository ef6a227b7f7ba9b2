"""Attention of packed documents, each to itself, over the ranks of a group."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, cast, overload

from torch import Tensor

from ring_core import autograd
from ring_core.checks import (
    Form,
    check_backend,
    check_schedule,
    check_scores,
    check_tensors,
    check_window,
    form_of,
    scale_of,
    seed_of,
)
from ring_core.group import Group, process_group
from ring_core.interface import ScheduleName
from ring_core.packed import CuSeqlens, PackedPlan, plan_packed
from ring_core.plan import PackedLayoutName, PackedProblem

TOKENS = "(tokens, heads, head_dim)"


@overload
def ring_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: PackedPlan | CuSeqlens,
    *,
    cu_seqlens_k: CuSeqlens | None = ...,
    causal: bool | None = ...,
    window_size: tuple[int, int] | None = ...,
    softmax_scale: float | None = ...,
    layout: PackedLayoutName | None = ...,
    schedule: ScheduleName = ...,
    backend: str | None = ...,
    group: Group | None = ...,
    return_lse: Literal[False] = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    deterministic: bool = ...,
) -> Tensor: ...
@overload
def ring_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: PackedPlan | CuSeqlens,
    *,
    cu_seqlens_k: CuSeqlens | None = ...,
    causal: bool | None = ...,
    window_size: tuple[int, int] | None = ...,
    softmax_scale: float | None = ...,
    layout: PackedLayoutName | None = ...,
    schedule: ScheduleName = ...,
    backend: str | None = ...,
    group: Group | None = ...,
    return_lse: Literal[True],
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    deterministic: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def ring_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: PackedPlan | CuSeqlens,
    *,
    cu_seqlens_k: CuSeqlens | None = None,
    causal: bool | None = None,
    window_size: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    layout: PackedLayoutName | None = None,
    schedule: ScheduleName = "auto",
    backend: str | None = None,
    group: Group | None = None,
    return_lse: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of documents packed into one stream, which is dealt out over the ranks of a group: each
    document attends to itself alone.

    Every rank must call it, with the same plan (or cu_seqlens) and arguments; RING_CHECK=1 in the environment makes
    sure of that. Only keys of documents that a rank holds, as far as its queries see them, travel to it.

    Args:
        q: (T_local, Hq, D) this rank's queries, as `PackedPlan.shard` deals them out.
        k, v: (T_local_k, Hkv, D) this rank's keys and values.
        cu_seqlens: a plan from `plan_packed`, which says everything about documents, mask, layout and group; or the
            global cu_seqlens, from which a plan is made (and remembered) in each call: a list or CPU tensor costs no
            synchronisation, a CUDA tensor one a call.
        cu_seqlens_k: of the keys' stream, where it is another one; not with a plan.
        causal, window_size, layout: as in `plan_packed`. With a plan: nothing, or what the plan says.
        group: as in `ring_core.ring_attention`; with a plan, by default the plan's.
        alibi_slopes: (Hq,), fp32 or fp64: distances are those inside a document.
        dropout_p, dropout_seed: as in `ring_core.ring_attention`; the mask depends on positions in the packed stream.
        softmax_scale, schedule, backend, return_lse, softcap, sinks, deterministic: as in `ring_core.ring_attention`.

    Returns:
        out (T_local, Hq, D) in q's dtype; with `return_lse` also lse (Hq, T_local), natural logarithm, fp32 (fp64 for
        fp64), which is differentiable. Rows that see nothing: out 0, lse -inf (with `sinks` that of the sink alone).

    Raises:
        TypeError, ValueError: an argument is wrong, or contradicts the plan; the message says what is needed.
        UnsupportedError: the backend cannot do this call (a ValueError, naming those that can).
        RingCommError: a rank did not answer in time.
    """
    plan = plan_of(cu_seqlens, cu_seqlens_k, causal, window_size, layout, group)
    out, lse = attend_packed(
        q,
        k,
        v,
        plan,
        softmax_scale=softmax_scale,
        schedule=schedule,
        backend=backend,
        group=group,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def plan_of(
    cu_seqlens: PackedPlan | CuSeqlens,
    cu_seqlens_k: CuSeqlens | None,
    causal: bool | None,
    window_size: tuple[int, int] | None,
    layout: str | None,
    group: Group | None,
) -> PackedPlan:
    """The plan given, with which whatever else is given must agree, or one made from cu_seqlens."""
    unsaid = cu_seqlens_k is None and causal is None and window_size is None and layout is None
    if unsaid and isinstance(cu_seqlens, PackedPlan):
        return cu_seqlens
    window = (-1, -1) if window_size is None else window_size
    left, right = check_window(window, bool(causal))
    if not isinstance(cu_seqlens, PackedPlan):
        return plan_packed(
            cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            layout=cast(PackedLayoutName, layout or "contiguous"),
            causal=bool(causal),
            window_size=window,
            group=group,
        )
    plan = cu_seqlens
    contradictions = []
    if cu_seqlens_k is not None:
        contradictions.append("cu_seqlens_k is part of a plan")
    if layout is not None and layout != plan.layout:
        contradictions.append(f"layout={layout!r}, the plan's is {plan.layout!r}")
    if causal is not None and causal != plan.causal:
        contradictions.append(f"causal={causal}, the plan's is {plan.causal}")
    if window_size is not None and (left, 0 if plan.causal else right) != plan.window_size:
        contradictions.append(f"window_size={window_size}, the plan's is {plan.window_size}")
    if contradictions:
        raise ValueError(
            f"the call contradicts its plan: {'; '.join(contradictions)}. Who holds and needs what depends on them: "
            f"give them to ring_core.plan_packed alone"
        )
    return plan


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackedPlan,
    *,
    softmax_scale: float | None,
    schedule: str,
    backend: str | None,
    group: Group | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    deterministic: bool,
    heads_at_once: int = 0,
) -> tuple[Tensor, Tensor]:
    """`ring_attention_packed` with everything given; what all functions on packed documents end in."""
    forms = form_of("q", q), form_of("k", k), form_of("v", v)
    check_schedule(schedule)
    if heads_at_once and (heads_at_once < 0 or k.shape[1] % heads_at_once):
        raise ValueError(f"heads_k_stride must divide the number of key heads, got {heads_at_once} and {k.shape[1]}")
    members = process_group(plan.group if group is None else group)
    eager = autograd.plain(q)
    call = (_call if eager else _make_call)(
        *forms,
        plan.problem if eager else None,
        plan.layout,
        plan.window_size,
        None if softmax_scale is None else float(softmax_scale),
        schedule,
        check_backend(backend),
        autograd.NO_GROUP if members is None else members.group_name,
        float(softcap),
        float(dropout_p),
        dropout_seed is not None,
        bool(deterministic),
        heads_at_once,
        autograd.needs_gradients(q, k, v, sinks),
    )
    check_scores(q, softcap, alibi_slopes, sinks)
    return autograd.attention(q, k, v, alibi_slopes, sinks, seed_of(q, dropout_p, dropout_seed), call, plan)


def _make_call(
    q: Form,
    k: Form,
    v: Form,
    problem: PackedProblem | None,
    layout: str,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    schedule: str,
    backend: str,
    group_name: str,
    softcap: float,
    dropout_p: float,
    shared_seed: bool,
    deterministic: bool,
    heads_at_once: int,
    gradients: bool,
) -> autograd.Call:
    """Checks the tensors' forms; problem: None where it gets into the call by a tensor. Not the plan, which knows its
    group: what is remembered here must not keep that, nor the memory that its ranks share."""
    check_tensors(q, k, v, TOKENS)
    left, right = window_size
    return autograd.Call(
        scale=scale_of(q, softmax_scale),
        softcap=softcap,
        dropout_p=dropout_p,
        left=left,
        right=right,
        q_total=autograd.UNPADDED,
        k_total=autograd.UNPADDED,
        deterministic=deterministic,
        shared_seed=shared_seed,
        heads_at_once=heads_at_once,
        layout=layout,
        schedule=schedule,
        backend=backend,
        group_name=group_name,
        packed=problem,
        gradients=gradients,
    )


_call = lru_cache(maxsize=256)(_make_call)
"""Layers of a model make the same one: once checked, it is known."""
