"""What users call. Every argument is checked here, once, on the host, without waiting for the GPU."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ring_core import autograd
from ring_core.checks import (
    BATCHED,
    check_backend,
    check_schedule,
    check_scores,
    check_tensors,
    check_window,
    form_of,
    is_whole,
    scale_of,
    seed_of,
)
from ring_core.group import Group, process_group
from ring_core.layout import LAYOUTS, LayoutName, multiple

ScheduleName = Literal["auto", "ring", "gather"]


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softmax_scale: float | None = ...,
    layout: LayoutName = ...,
    schedule: ScheduleName = ...,
    backend: str | None = ...,
    group: Group | None = ...,
    return_lse: Literal[False] = ...,
    total_length: int | tuple[int, int] | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    deterministic: bool = ...,
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softmax_scale: float | None = ...,
    layout: LayoutName = ...,
    schedule: ScheduleName = ...,
    backend: str | None = ...,
    group: Group | None = ...,
    return_lse: Literal[True],
    total_length: int | tuple[int, int] | None = ...,
    softcap: float = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ...,
    deterministic: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    layout: LayoutName = "contiguous",
    schedule: ScheduleName = "auto",
    backend: str | None = None,
    group: Group | None = None,
    return_lse: bool = False,
    total_length: int | tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of a sequence dealt out over the ranks of a group: each passes its own part and gets its own
    rows back.

    Every rank must call it, with equal shapes and arguments (RING_CHECK=1 in the environment makes sure of that).
    Gradients flow to q, k, v and sinks (of the latter each rank gets its part: sum them over the group, as one does
    with any replicated parameter).

    Args:
        q: (B, Sq, Hq, D) local queries. fp16, bf16, fp32 or fp64, as the backend allows; any strides with the last
            dimension dense.
        k, v: (B, Sk, Hkv, D) local keys and values; Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
        causal: query i sees no key after its own position. Where the global lengths differ, the last query sits at the
            last key (bottom-right alignment, as in flash-attn).
        window_size: (left, right): how many positions before and after its own a query sees, over the whole sequence;
            -1: all.
        softmax_scale: of q·k; 1 / sqrt(D) by default.
        layout: how the sequence was dealt out, see `shard_sequence`: "contiguous", "zigzag" or "stripe" (the last two
            give all ranks equal work under a causal mask).
        schedule: "ring" (neighbour to neighbour, two chunks in memory), "gather" (every rank takes all it will see,
            some heads at a time) or "auto" (gather while all keys and values take at most 2 GiB).
        backend: name of an installed backend; None: the fastest that can do the call on CUDA, the reference elsewhere.
        group: a process group or a mesh of one axis; None: the default group if one is initialised, else this process
            alone.
        return_lse: also return the log-sum-exp of the scores.
        total_length: true global length of a padded sequence (see `pad_sequence`), or (of q, of k) where they differ:
            later keys are seen by nobody, later rows are 0.
        softcap: > 0: scores s become softcap * tanh(s / softcap).
        alibi_slopes: (Hq,) or (B, Hq), fp32 or fp64: subtracts slope * |distance in positions| from the scores. Not
            differentiable.
        sinks: (Hq,), floating point: one more logit a head, in the denominator only (attention sinks as in gpt-oss).
        dropout_p: in [0, 1): probability of dropping an attention weight. The mask depends on the seed and on global
            positions only, not on layout, schedule or number of ranks.
        dropout_seed: an int or an int64 tensor (1,) on the device, the same on all ranks; None: drawn from the first
            rank's generator.
        deterministic: gradients bitwise equal from run to run, where that costs speed.

    Returns:
        out (B, Sq, Hq, D) in q's dtype; with `return_lse` also lse (B, Hq, Sq), natural logarithm, fp32 (fp64 for
        fp64), which is differentiable. Rows that see nothing: out 0, lse -inf (with `sinks` that of the sink alone;
        padding -inf).

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was given and what is needed.
        UnsupportedError: the backend cannot do this call (a ValueError, naming those that can).
        RingCommError: a rank did not answer in time.
    """
    out, lse = attend(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        layout=layout,
        schedule=schedule,
        backend=backend,
        group=group,
        total_length=total_length,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
    )
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    layout: str,
    schedule: str,
    backend: str | None,
    group: Group | None,
    total_length: int | tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    deterministic: bool,
    heads_at_once: int = 0,
) -> tuple[Tensor, Tensor]:
    """`ring_attention` with everything given; what all public functions end in."""
    check_tensors(form_of("q", q), form_of("k", k), form_of("v", v), BATCHED)
    members = process_group(group)
    world_size = 1 if members is None else members.size()
    _check_layout(q, k, layout, schedule, world_size)
    left, right = check_window(window_size, causal)
    q_total, k_total = _check_total(total_length, q.shape[1] * world_size, k.shape[1] * world_size)
    check_scores(q, softcap, alibi_slopes, sinks)
    call = autograd.Call(
        scale=scale_of(q, softmax_scale),
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        left=left,
        right=right,
        q_total=q_total,
        k_total=k_total,
        deterministic=bool(deterministic),
        shared_seed=dropout_seed is not None,
        heads_at_once=heads_at_once,
        layout=layout,
        schedule=schedule,
        backend=check_backend(backend),
        group_name=autograd.NO_GROUP if members is None else members.group_name,
        gradients=autograd.needs_gradients(q, k, v, sinks),
    )
    seed = seed_of(q, dropout_p, dropout_seed)
    return autograd.attention(q, k, v, alibi_slopes, sinks, seed, call)


def _check_layout(q: Tensor, k: Tensor, layout: str, schedule: str, world_size: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; there are {', '.join(map(repr, LAYOUTS))}")
    check_schedule(schedule)
    share = multiple(layout, world_size) // world_size
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] % share:
            raise ValueError(
                f"the {layout} layout deals out two half-chunks a rank, but the local length of {name} is "
                f"{x.shape[1]}, which is odd: pad the whole sequence with ring_core.pad_sequence before sharding it, "
                f"and pass its true length as total_length"
            )


def _check_total(total_length: int | tuple[int, int] | None, q_length: int, k_length: int) -> tuple[int, int]:
    if total_length is None:
        return autograd.UNPADDED, autograd.UNPADDED
    if isinstance(total_length, (tuple, list)):
        if len(total_length) != 2:
            raise ValueError(f"total_length must be one length or a pair (of q, of k), got {total_length!r}")
        q_total, k_total = total_length
    elif q_length != k_length:
        raise ValueError(
            f"total_length must be a pair (of q, of k) where the global lengths differ, got {total_length} for "
            f"{q_length} queries and {k_length} keys"
        )
    else:
        q_total = k_total = total_length
    for name, total, length in (("queries", q_total, q_length), ("keys", k_total, k_length)):
        if not is_whole(total):
            raise TypeError(f"total_length must be one int or a pair (of q, of k), got {total_length!r}")
        if not 0 <= total <= length:
            raise ValueError(
                f"total_length says {total} {name}, but the ranks hold {length} together: it is the true global "
                f"length, at most the padded one"
            )
    return q_total, k_total
