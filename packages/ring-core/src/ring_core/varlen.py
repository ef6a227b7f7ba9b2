"""The functions of flash-attn and ring-flash-attn for packed documents, made for one backend from one signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ring_core.group import Group
from ring_core.interface import ScheduleName
from ring_core.packed import CuSeqlens, PackedPlan, plan_packed
from ring_core.packed_attention import TOKENS, attend_packed, plan_of

Result = Tensor | tuple[Tensor, Tensor, None]


class VarlenFunction(Protocol):
    """Attention of packed documents; what it takes is in its docstring and signature."""

    __name__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Result: ...


_LAYOUTS = (
    ("ring_flash_attn_varlen", "contiguous", "rank r passes tokens r T / W up to (r + 1) T / W of the stream"),
    ("zigzag_ring_flash_attn_varlen", "zigzag", "rank r passes half-chunks r and 2W-1-r of the stream"),
    ("balanced_ring_flash_attn_varlen", "balanced", "rank r passes what `plan_packed(..., layout='balanced')` says"),
)
_HEADS = {
    "func": "q (T_local, Hq, D), k, v (T_local, Hkv, D)",
    "kvpacked_func": "q (T_local, Hq, D), kv (T_local, 2, Hkv, D)",
    "qkvpacked_func": "qkv (T_local, 3, H, D)",
}
_RETURNS = """Returns:
        out (T_local, Hq, D), or with return_attn_probs=True (out, softmax_lse, None), softmax_lse (Hq, T_local) as in
        flash-attn from 2.6 on, natural logarithm, fp32 (fp64 for fp64): never the probabilities.

    Raises:
        As `ring_core.ring_attention_packed`; ValueError also where a document is longer than it was said to be."""
_DOC = """Ring attention of packed documents in the {layout} layout, called as flash-attn and ring-flash-attn are.

    Local tensors: {head}; {share} (`ring_core.plan_packed(...).shard` does it).

    Args:
        cu_seqlens: of the *global* packed stream, which documents cross as they like; a list, a CPU tensor, a CUDA
            tensor (waited for in each call) or a plan from `ring_core.plan_packed`, with whose causal and window_size
            those given here must agree. (ring-flash-attn splits every document over all ranks instead:
            `ring_core.global_cu_seqlens`.)
        max_seqlen: the longest document, or more; only checked. With cu_seqlens_k, of either stream.
        causal, window_size: inside each document.

    The other arguments are those of `ring_core.ring_attention_packed`.

    {returns}
    """
_LLAMA3_DOC = """Ring attention of packed documents in the contiguous layout, called as ring-flash-attn's function is.

    Local tensors: {head}; rank r passes tokens r T / W up to (r + 1) T / W of the stream.

    Args:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice: what
            `ring_core.llama3_flash_attn_prepare_cu_seqlens` returned on this rank, unchanged: max_seqlen_q knows the
            whole stream, so that ranks know what others need and only that travels.
        heads_k_stride: key heads gathered at a time; must divide their number.
        causal: as it was given to the preparation.
        window_size: inside each document.

    The other arguments are those of `ring_core.ring_attention_packed`.

    {returns}
    """


def varlen_functions(backend: str | None) -> list[Any]:
    """All of them, in the order of `ring_core.AttentionFunctions`, with names and docstrings."""
    made = []
    for family, layout, share in _LAYOUTS:
        for (kind, head), (form, tail) in zip(_HEADS.items(), _FORMS.items(), strict=True):
            function = _form(_varlen(backend, layout), form, tail)
            function.__doc__ = _DOC.format(layout=layout, share=share, head=head, returns=_RETURNS)
            made.append(_named(function, f"{family}_{kind}"))
    for (kind, head), (form, tail) in zip(_HEADS.items(), _FORMS.items(), strict=True):
        function = _form(_llama3(backend), form, tail)
        function.__doc__ = _LLAMA3_DOC.format(head=head, returns=_RETURNS)
        made.append(_named(function, f"llama3_flash_attn_varlen_{kind}"))
    return made


_FORMS: dict[str, tuple[str, ...]] = {"": ("q", "k", "v"), "kv": ("q", "kv"), "qkv": ("qkv",)}


def _named(function: Any, name: str) -> Any:
    function.__name__ = name
    return function


def _form(plain: Any, packed: str, heads: tuple[str, ...]) -> Any:
    """The function itself, or that with k and v, or q, k and v, in one tensor."""
    if not packed:
        return plain
    if packed == "kv":

        def kv_function(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
            result: Result = plain(q, *unpack(kv, 2, "kv", TOKENS), *args, **kwargs)
            return result

        return with_tail(kv_function, plain, 3, *heads)

    def qkv_function(qkv: Tensor, *args: Any, **kwargs: Any) -> Result:
        if "cu_seqlens_k" in kwargs and "max_seqlen" in inspect.signature(plain).parameters:
            raise TypeError("qkv is one stream: there is no cu_seqlens_k")
        result: Result = plain(*unpack(qkv, 3, "qkv", TOKENS), *args, **kwargs)
        return result

    return with_tail(qkv_function, plain, 3, *heads, without=("cu_seqlens_k",) if "max_seqlen" in _names(plain) else ())


def _names(function: Callable[..., Any]) -> Sequence[str]:
    return list(inspect.signature(function).parameters)


def with_tail(function: Any, plain: Any, count: int, *heads: str, without: tuple[str, ...] = ()) -> Any:
    """Gives `function` the signature of `plain` with other tensors for the first `count`."""
    signature = inspect.signature(plain)
    parameters = list(signature.parameters.values())
    tail = [parameter for parameter in parameters[count:] if parameter.name not in without]
    first = parameters[0]
    function.__signature__ = signature.replace(parameters=[*(first.replace(name=head) for head in heads), *tail])
    return function


def unpack(packed: Tensor, count: int, name: str, form: str) -> tuple[Tensor, ...]:
    """Tensors of the dimensions that `form` names, from one that holds `count` of them before the heads."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(packed).__name__}")
    dims = form.count(",") + 2
    if packed.dim() != dims or packed.shape[-3] != count:
        raise ValueError(f"{name} must be {form.replace('heads', f'{count}, heads')}, got shape {tuple(packed.shape)}")
    return packed.unbind(dim=-3)


def _varlen(backend: str | None, layout: str) -> VarlenFunction:
    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: PackedPlan | CuSeqlens,
        max_seqlen: int | None = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group | None = None,
        *,
        cu_seqlens_k: CuSeqlens | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        dropout_seed: int | Tensor | None = None,
        schedule: ScheduleName = "auto",
    ) -> Result:
        if isinstance(cu_seqlens, PackedPlan):  # the defaults say nothing against a plan
            mask = causal or None, None if tuple(window_size) == (-1, -1) else window_size
            plan = plan_of(cu_seqlens, cu_seqlens_k, *mask, layout, group)
        else:
            plan = plan_of(cu_seqlens, cu_seqlens_k, causal, window_size, layout, group)
        _check_longest(plan, max_seqlen)
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
        return (out, lse, None) if return_attn_probs else out

    return function


def _check_longest(plan: PackedPlan, max_seqlen: int | None) -> None:
    if isinstance(max_seqlen, int) and max_seqlen < plan.max_seqlen:
        raise ValueError(
            f"max_seqlen is {max_seqlen}, but the longest document of the global stream has {plan.max_seqlen} tokens"
        )


def _llama3(backend: str | None) -> VarlenFunction:
    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        heads_k_stride: int,
        local_k_slice: slice,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group | None = None,
        *,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        dropout_seed: int | Tensor | None = None,
        schedule: ScheduleName = "auto",
    ) -> Result:
        if not isinstance(max_seqlen_q, _Prepared):
            raise ValueError(
                "these cu_seqlens and max_seqlen do not say what other ranks hold: pass, unchanged, what "
                "ring_core.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal, rank, world_size) returns"
            )
        if heads_k_stride < 1:
            raise ValueError(f"heads_k_stride must be at least 1, got {heads_k_stride}")
        out, lse = attend_packed(
            q,
            k,
            v,
            max_seqlen_q.plan(causal, window_size, group),
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
            heads_at_once=heads_k_stride,
        )
        return (out, lse, None) if return_attn_probs else out

    return function


class _Prepared(int):
    """max_seqlen_q, which also knows the stream that it was prepared from."""

    cu_seqlens: tuple[int, ...]
    causal: bool
    rank: int
    world_size: int

    def plan(self, causal: bool, window_size: tuple[int, int], group: Group | None) -> PackedPlan:
        if causal != self.causal:
            raise ValueError(
                f"causal={causal}, but llama3_flash_attn_prepare_cu_seqlens was given causal={self.causal}, which "
                f"decides what local_k_slice holds"
            )
        made = plan_of(self.cu_seqlens, None, causal, window_size, "contiguous", group)
        if (made.rank, made.world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"prepared for rank {self.rank} of {self.world_size}, called on rank {made.rank} of {made.world_size}"
            )
        return made


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: CuSeqlens, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What the llama3 functions take, as ring-flash-attn's function of this name returns it.

    Args:
        cu_seqlens: of the global stream; a list or a CPU tensor costs no synchronisation, a CUDA tensor one.
        causal: whether keys after the local queries are left out.

    Returns:
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice): the documents of this rank's chunk,
        counted from the chunk's first token; the same of the stretch of the stream's keys that they see, counted from
        its first; their longest; that stretch. Tensors in the dtype and on the device of cu_seqlens (int32 on the CPU
        for a list). The stream's length need not divide.
    """
    plan = plan_packed(cu_seqlens, causal=causal, rank=rank, world_size=world_size)
    ends = plan.problem.documents.cu_q
    total = int(ends[-1])
    start, stop = rank * total // world_size, (rank + 1) * total // world_size
    left, right = (int(np.searchsorted(ends, edge)) for edge in (start, stop))
    if ends[left] != start:
        left -= 1
    cu_q = np.clip(ends[left : right + 1], start, stop) - start
    first, last = int(ends[left]), stop if causal else int(ends[right])
    cu_k = np.minimum(ends[left : right + 1], last) - first
    prepared = _Prepared(np.diff(cu_q).max(initial=0))
    prepared.cu_seqlens = tuple(ends.tolist())
    prepared.causal, prepared.rank, prepared.world_size = bool(causal), rank, world_size
    like = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.empty(0, dtype=torch.int32, device="cpu")
    q_ends, k_ends = (torch.from_numpy(cu).to(like) for cu in (cu_q, cu_k))
    return q_ends, k_ends, prepared, int(np.diff(cu_k).max(initial=0)), slice(first, last)
