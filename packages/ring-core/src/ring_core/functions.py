"""The functions of flash-attn and ring-flash-attn, for one backend: made here from one signature, named in the backend
packages."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from ring_core.checks import BATCHED
from ring_core.group import Group
from ring_core.interface import ScheduleName, attend
from ring_core.layout import LayoutName
from ring_core.varlen import Result, VarlenFunction, unpack, varlen_functions, with_tail


class AttentionFunction(Protocol):
    """Attention over separate q, k and v."""

    __name__: str

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
        total_length: int | tuple[int, int] | None = None,
    ) -> Result: ...


class KVPackedFunction(Protocol):
    """Attention over q and packed keys and values."""

    __name__: str

    def __call__(
        self,
        q: Tensor,
        kv: Tensor,
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
        total_length: int | tuple[int, int] | None = None,
    ) -> Result: ...


class QKVPackedFunction(Protocol):
    """Attention over packed queries, keys and values."""

    __name__: str

    def __call__(
        self,
        qkv: Tensor,
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
        total_length: int | tuple[int, int] | None = None,
    ) -> Result: ...


class AttentionFunctions(NamedTuple):
    """The family of one backend, under the names of ring-flash-attn."""

    ring_flash_attn_func: AttentionFunction
    ring_flash_attn_kvpacked_func: KVPackedFunction
    ring_flash_attn_qkvpacked_func: QKVPackedFunction
    zigzag_ring_flash_attn_func: AttentionFunction
    zigzag_ring_flash_attn_kvpacked_func: KVPackedFunction
    zigzag_ring_flash_attn_qkvpacked_func: QKVPackedFunction
    stripe_flash_attn_func: AttentionFunction
    stripe_flash_attn_kvpacked_func: KVPackedFunction
    stripe_flash_attn_qkvpacked_func: QKVPackedFunction
    ring_flash_attn_varlen_func: VarlenFunction
    ring_flash_attn_varlen_kvpacked_func: VarlenFunction
    ring_flash_attn_varlen_qkvpacked_func: VarlenFunction
    zigzag_ring_flash_attn_varlen_func: VarlenFunction
    zigzag_ring_flash_attn_varlen_kvpacked_func: VarlenFunction
    zigzag_ring_flash_attn_varlen_qkvpacked_func: VarlenFunction
    balanced_ring_flash_attn_varlen_func: VarlenFunction
    balanced_ring_flash_attn_varlen_kvpacked_func: VarlenFunction
    balanced_ring_flash_attn_varlen_qkvpacked_func: VarlenFunction
    llama3_flash_attn_varlen_func: VarlenFunction
    llama3_flash_attn_varlen_kvpacked_func: VarlenFunction
    llama3_flash_attn_varlen_qkvpacked_func: VarlenFunction


_FAMILIES: tuple[tuple[str, LayoutName, str], ...] = (
    ("ring_flash_attn", "contiguous", "rank r passes chunk r of the sequence"),
    ("zigzag_ring_flash_attn", "zigzag", "rank r passes half-chunks r and 2W-1-r, one after the other"),
    ("stripe_flash_attn", "stripe", "rank r passes tokens r, r+W, r+2W, …"),
)
_HEADS = {
    "func": "q (B, S, Hq, D), k, v (B, S, Hkv, D)",
    "kvpacked_func": "q (B, S, Hq, D), kv (B, S, 2, Hkv, D)",
    "qkvpacked_func": "qkv (B, S, 3, H, D)",
}


def flash_attn_functions(backend: str | None, *, prefix: str = "", module: str = __name__) -> AttentionFunctions:
    """The whole family for one backend.

    Args:
        backend: its name; None: chosen for each call as in `ring_core.ring_attention`.
        prefix: before every name, as in "triton_".
        module: where the names are going to live, for tracebacks and pickling.
    """
    functions: list[Any] = []
    for family, layout, share in _FAMILIES:
        for (kind, head), make in zip(_HEADS.items(), (_plain, _kvpacked, _qkvpacked), strict=True):
            function: Any = make(backend, layout)
            function.__name__ = f"{family}_{kind}"
            function.__doc__ = _DOC.format(layout=layout, share=share, head=head)
            functions.append(function)
    functions += varlen_functions(backend)
    for function in functions:
        function.__name__ = function.__qualname__ = prefix + function.__name__
        function.__module__ = module
    return AttentionFunctions(*functions)


_DOC = """Ring attention in the {layout} layout, called as flash-attn and ring-flash-attn are.

    Local tensors: {head}; {share} (`ring_core.shard_sequence` does it). The other arguments are those of
    `ring_core.ring_attention`; causal and window_size mean positions in the whole sequence.

    Returns:
        out (B, S, Hq, D), or with return_attn_probs=True (out, softmax_lse, None), softmax_lse (B, Hq, S), natural
        logarithm, fp32 (fp64 for fp64): like ring-flash-attn, never the probabilities.

    Raises:
        As `ring_core.ring_attention`.
    """


def _plain(backend: str | None, layout: LayoutName) -> AttentionFunction:
    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
        total_length: int | tuple[int, int] | None = None,
    ) -> Result:
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
        return (out, lse, None) if return_attn_probs else out

    return function


def _kvpacked(backend: str | None, layout: LayoutName) -> KVPackedFunction:
    plain = _plain(backend, layout)

    def function(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
        k, v = unpack(kv, 2, "kv", BATCHED)
        return plain(q, k, v, *args, **kwargs)

    return cast(KVPackedFunction, with_tail(function, plain, 3, "q", "kv"))


def _qkvpacked(backend: str | None, layout: LayoutName) -> QKVPackedFunction:
    plain = _plain(backend, layout)

    def function(qkv: Tensor, *args: Any, **kwargs: Any) -> Result:
        q, k, v = unpack(qkv, 3, "qkv", BATCHED)
        return plain(q, k, v, *args, **kwargs)

    return cast(QKVPackedFunction, with_tail(function, plain, 3, "qkv"))
