"""What users call. Every argument is checked here, once, on the host, without waiting for the GPU."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ring_core import autograd
from ring_core.group import Group, process_group
from ring_core.layout import LAYOUTS, LayoutName, multiple
from ring_core.plan import SCHEDULES

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
        schedule: "ring" (neighbour to neighbour, two chunks in memory), "gather" (every rank takes all it will see, one
            launch) or "auto" (gather while all keys and values take at most 2 GiB).
        backend: name of an installed backend; None: the fastest that can do the call on CUDA, the reference elsewhere.
        group: a process group or a mesh of one axis; None: the default group if one is initialised, else this process
            alone.
        return_lse: also return the log-sum-exp of the scores.
        total_length: true global length of a padded sequence (see `pad_sequence`), or (of q, of k) where they differ:
            later keys are seen by nobody, later rows are 0.
        softcap: > 0: scores s become softcap * tanh(s / softcap).
        alibi_slopes: (Hq,) or (B, Hq) fp32: subtracts slope * |distance in positions| from the scores. Not
            differentiable.
        sinks: (Hq,): one more logit a head, in the denominator only (attention sinks as in gpt-oss).
        dropout_p: in [0, 1): probability of dropping an attention weight. The mask depends on the seed and on global
            positions only, not on layout, schedule or number of ranks.
        dropout_seed: an int or an int64 tensor (1,) on the device, the same on all ranks; None: drawn from the first
            rank's generator.
        deterministic: gradients bitwise equal from run to run, where that costs speed.

    Returns:
        out (B, Sq, Hq, D) in q's dtype; with `return_lse` also lse (B, Hq, Sq), natural logarithm, fp32 (fp64 for
        fp64), which is differentiable. Rows that see nothing: out 0, lse -inf.

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
        backend="" if backend is None else backend,
        group_name=autograd.NO_GROUP if members is None else members.group_name,
        gradients=autograd.needs_gradients(q, k, v, sinks),
    )
    seed = seed_of(q, dropout_p, dropout_seed)
    return autograd.attention(q, k, v, alibi_slopes, sinks, seed, call)


BATCHED = "(batch, sequence, heads, head_dim)"


class Form(NamedTuple):
    """What checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def form_of(name: str, x: Tensor) -> Form:
    """Raises TypeError unless it is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    return Form(x.shape, x.dtype, x.device)


def check_tensors(q: Form, k: Form, v: Form, form: str) -> None:
    """Raises TypeError or ValueError unless q, k and v fit together and have the dimensions that `form` names."""
    dims = form.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != dims:
            raise ValueError(f"{name} must be {form}, got shape {tuple(x.shape)}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q, k, v must be floating point, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them with .to(dtype)")
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}: move them with .to(device)"
        )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if (dims == 4 and q.shape[0] != k.shape[0]) or q.shape[-1] != k.shape[-1]:
        agree = "batch and head_dim" if dims == 4 else "head_dim"
        raise ValueError(f"q and k must agree in {agree}, got shapes {tuple(q.shape)} and {tuple(k.shape)} {form}")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, got {q.shape[-2]} and "
            f"{k.shape[-2]}"
        )


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


def check_schedule(schedule: str) -> None:
    """Raises ValueError unless there is such a schedule."""
    if schedule != "auto" and schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are 'auto', {', '.join(map(repr, SCHEDULES))}")


def check_window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """Left and right, -1 for unbounded, with the causal mask in `right`. Raises TypeError or ValueError."""
    message = f"window_size must be (left, right), two ints, each >= 0 or -1 for unbounded, got {window_size!r}"
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(message)
    if len(window_size) != 2:
        raise ValueError(message)
    left, right = window_size
    if not isinstance(left, int) or not isinstance(right, int):
        raise TypeError(message)
    if left < -1 or right < -1:
        raise ValueError(message)
    return left, 0 if causal else right


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
        if not 0 <= total <= length:
            raise ValueError(
                f"total_length says {total} {name}, but the ranks hold {length} together: it is the true global "
                f"length, at most the padded one"
            )
    return q_total, k_total


def check_scores(q: Tensor, softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    """Raises ValueError unless what changes the scores of q (B, Sq, Hq, D), or without B, has the right shapes."""
    if not softcap >= 0:
        raise ValueError(f"softcap must be >= 0 (0 is none), got {softcap}")
    batch, num_heads = q.shape[0] if q.dim() == 4 else 1, q.shape[-2]
    if alibi_slopes is not None:
        if alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
            raise ValueError(
                f"alibi_slopes must be ({num_heads},) or ({batch}, {num_heads}), got {tuple(alibi_slopes.shape)}"
            )
        if alibi_slopes.dtype not in (torch.float32, torch.float64) or alibi_slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes must be fp32 on {q.device}, got {alibi_slopes.dtype} on {alibi_slopes.device}"
            )
    if sinks is not None and (sinks.shape != (num_heads,) or sinks.device != q.device):
        raise ValueError(f"sinks must be ({num_heads},) on {q.device}, got {tuple(sinks.shape)} on {sinks.device}")


def scale_of(q: Tensor | Form, softmax_scale: float | None) -> float:
    """The scale of q·k: 1 / sqrt(head_dim) where none is given."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    return float(softmax_scale)


def seed_of(q: Tensor, dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor | None:
    """int64 (1,) on q's device, without waiting for it."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if dropout_seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1 or dropout_seed.device != q.device:
            raise ValueError(
                f"dropout_seed must be an int or one int64 on {q.device}, got {dropout_seed.numel()} "
                f"{dropout_seed.dtype} on {dropout_seed.device}"
            )
        return dropout_seed.reshape(1)
    if not isinstance(dropout_seed, int):
        raise TypeError(f"dropout_seed must be an int or one int64 on {q.device}, got {type(dropout_seed).__name__}")
    if not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed must be an int that fits into 64 bits, with its sign, got {dropout_seed}")
    return torch.full((1,), dropout_seed, dtype=torch.int64, device=q.device)
