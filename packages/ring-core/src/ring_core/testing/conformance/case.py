"""What kernel cases and ring cases have in common: one attention problem as data, its inputs, its truth, and how exact
is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.backend import (
    Backend,
    Capabilities,
    UnsupportedError,
    accumulation_dtype,
    backend_names,
    check_supported,
)
from ring_core.interface import ring_attention
from ring_core.packed_attention import ring_attention_packed
from ring_core.testing.measure import InputKind, Tolerance, assert_close_to_oracle, make_inputs, tolerances
from ring_core.testing.oracle import OracleResult, attention_oracle

FINEST_FIRST = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT = Tolerance(1e-10, 1e-12)
"""For float64: what any correct order of summation stays within, and no float32 intermediate does."""

REDRAWS = 4

Case = TypeVar("Case", bound="AttentionCase")


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One attention call over whole sequences; lengths are global and include padding.

    dtype: None is the finest that the backend has. q_total, k_total: true lengths, None without padding. alibi: slopes
    (Hq,) for "head", (B, Hq) for "batch". dlse: whether lse has a gradient (where the backend can do that). gradients:
    whether anything has; without them out and lse are compared alone.
    """

    name: str
    world_size: int = 1
    layout: str = "contiguous"
    schedule: str = "ring"
    batch: int = 2
    q_length: int = 60
    k_length: int = 60
    q_total: int | None = None
    k_total: int | None = None
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype | None = None
    inputs: InputKind = "randn"
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: str = ""
    dropout_p: float = 0.0
    dlse: bool = True
    gradients: bool = True
    deterministic: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def features(self) -> frozenset[str]:
        """What a backend must be able to do, in the words of `ring_core.backend.FEATURES`."""
        asked = {
            "alibi": bool(self.alibi),
            "ring_alibi": bool(self.alibi) and self.world_size > 1,
            "window": self.window[0] >= 0 or self.window[1] > 0,
            "deterministic": self.deterministic,
            "dropout": self.dropout_p > 0,
            "gqa": self.q_heads != self.kv_heads,
            "sinks": self.sinks,
            "softcap": self.softcap > 0,
        }
        return frozenset(feature for feature, wanted in asked.items() if wanted)

    @property
    def total_length(self) -> tuple[int, int]:
        """True lengths (of q, of k)."""
        return (
            self.q_length if self.q_total is None else self.q_total,
            self.k_length if self.k_total is None else self.k_total,
        )

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right), None for unbounded, with the causal mask in `right`."""
        left, right = self.window
        right = 0 if self.causal else right
        return None if left < 0 else left, None if right < 0 else right

    def resolved(self: Case, can: Capabilities) -> Case:
        """The case with what depends on the backend filled in: the finest dtype, and no gradients, or none of lse,
        where it has none."""
        dtype = self.dtype or next((dtype for dtype in FINEST_FIRST if dtype in can.dtypes), torch.float32)
        gradients = self.gradients and can.takes(self.head_dim, gradients=True)
        dlse = gradients and self.dlse and "lse_grad" in can.features
        return replace(self, dtype=dtype, dlse=dlse, gradients=gradients)

    def missing(self, can: Capabilities) -> set[str]:
        """What the case (resolved) asks and the backend cannot do, in words that its error message must have."""
        lacking = set(self.features - can.features)
        if self.dtype not in can.dtypes:
            lacking.add(str(self.dtype))
        if self.head_dim not in can.head_dims:
            lacking.add(str(self.head_dim))
        return lacking


@dataclass(frozen=True)
class Tensors:
    """Global inputs: q, dout (B, Sq, Hq, D), k, v (B, Sk, Hkv, D) in the case's dtype; dlse (B, Hq, Sq) or None, sinks
    (Hq,) or None in the accumulation dtype; alibi_slopes fp32 (Hq,), (B, Hq) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: int


def make_tensors(case: AttentionCase, seed: int, device: torch.device | str = "cpu") -> Tensors:
    """The inputs of a resolved case: the same from the same seed on every rank and device."""
    assert case.dtype is not None
    generator = torch.Generator().manual_seed(seed)
    x = make_inputs(
        case.inputs,
        generator=generator,
        batch=case.batch,
        q_length=case.q_length,
        k_length=case.k_length,
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        device=device,
    )
    sums = accumulation_dtype(case.dtype)
    sinks = torch.randn(case.q_heads, generator=generator, dtype=sums).to(device) if case.sinks else None
    slopes = None
    if case.alibi:
        shape = (case.q_heads,) if case.alibi == "head" else (case.batch, case.q_heads)
        slopes = (0.02 + torch.rand(shape, generator=generator) / 2).to(device)
    # All 64 bits of the key count, also the high word.
    dropout_seed = int(torch.randint(2**62, (), generator=generator)) if case.dropout_p else 0
    dlse = x.dlse.to(sums) if case.dlse else None
    return Tensors(x.q, x.k, x.v, x.dout, dlse, sinks, slopes, dropout_seed)


def oracle_options(case: AttentionCase, tensors: Tensors) -> dict[str, Any]:
    """Keyword arguments of `attention_oracle`."""
    return {
        "causal": case.causal,
        "window_size": case.window,
        "scale": case.scale,
        "softcap": case.softcap,
        "alibi_slopes": tensors.alibi_slopes,
        "sinks": tensors.sinks,
        "dropout_p": case.dropout_p,
        "dropout_seed": tensors.dropout_seed,
        "total_length": case.total_length,
        "dout": tensors.dout if case.gradients else None,
        "dlse": tensors.dlse,
    }


def check_results(
    case: AttentionCase,
    tensors: Tensors,
    results: dict[str, Tensor],
    options: dict[str, Any] | None = None,
    slack: dict[str, float] | None = None,
) -> OracleResult:
    """Raises AssertionError unless the global results (out, lse, dq, dk, dv and, with sinks, dsinks) are the oracle's.

    slack: further root mean square error granted, by name: what adding into a buffer that was not zero costs.
    """
    options = oracle_options(case, tensors) if options is None else options
    x = (tensors.q, tensors.k, tensors.v)
    truth = attention_oracle(*x, **options)
    expected = {name: value for name, value in vars(truth).items() if value is not None}
    assert set(results) == set(expected), f"{case}: got {sorted(results)}, should be {sorted(expected)}"
    exact = case.dtype == torch.float64
    allowed = dict.fromkeys(expected, EXACT) if exact else tolerances(*x, reference=truth, **options)
    if case.inputs in ("outlier", "large") and not exact:
        allowed = _at_least(allowed, tensors, options)
    granted = [slack or {}]
    if not exact:
        granted += [_rounded_out(case, tensors, truth, options), _handed_on(case, truth)]
    for name, value in expected.items():
        more = sum(grant.get(name, 0.0) for grant in granted)
        limit = replace(allowed[name], rms=allowed[name].rms + more)
        assert_close_to_oracle(f"{case}: {name}", results[name], value, limit)
    return truth


def _at_least(allowed: dict[str, Tolerance], tensors: Tensors, options: dict[str, Any]) -> dict[str, Tolerance]:
    """The tolerances, or those of the same problem with its products summed in another order where they are larger.

    A few scores of an outlier, or the few rows of large inputs whose softmax is not one-hot, decide the error of the
    whole tensor, so that a single baseline may be exact by luck.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(REDRAWS):
        order = torch.randperm(tensors.q.shape[3], generator=generator).to(tensors.q.device)
        drawn = tolerances(tensors.q[..., order], tensors.k[..., order], tensors.v, **options)
        allowed = {
            name: Tolerance(max(limit.relative, drawn[name].relative), max(limit.rms, drawn[name].rms))
            for name, limit in allowed.items()
        }
    return allowed


def _handed_on(case: AttentionCase, truth: OracleResult) -> dict[str, float]:
    """What it costs, by name, that a row goes from step to step as (state, lse), as the contract has it: lse is rounded
    to fp32, and the weight of all that came before with it. The baseline, in one piece, never rounds there; it shows
    with fp32 inputs, where nothing else is rounded coarsely."""
    if case.schedule != "ring" or case.world_size == 1:
        return {}
    lse = truth.lse[truth.lse.isfinite()]
    shift = torch.finfo(torch.float32).eps / 4 * float(lse.norm()) / max(1, lse.numel()) ** 0.5
    gradients = {"dq": truth.dq, "dk": truth.dk, "dv": truth.dv}
    sizes = {name: x for name, x in {"out": truth.out, **gradients}.items() if x is not None and x.numel()}
    return {name: shift * float(x.square().mean().sqrt()) for name, x in sizes.items()}


def _rounded_out(
    case: AttentionCase, tensors: Tensors, truth: OracleResult, options: dict[str, Any]
) -> dict[str, float]:
    """What it costs, by name, that delta is made from the out that is handed over, rounded to its dtype, as the
    contract has it; the baseline never rounds there. It shows where nothing else is wrong: in a sum over all rows, and
    where one key has all the weight, so that truth cancels, and is 64 times the others."""
    q, k, v, dout = (float(x.double().square().mean().sqrt()) for x in (tensors.q, tensors.k, tensors.v, tensors.dout))
    delta = torch.finfo(tensors.q.dtype).eps / 4 * dout * v * case.head_dim**0.5
    costs = {}
    if tensors.sinks is not None:
        share = torch.exp(tensors.sinks.double()[:, None] - truth.lse)
        share = share.masked_fill(truth.lse == -torch.inf, 0.0)  # (B, Hq, Sq)
        costs["dsinks"] = delta * float(share.square().sum(dim=(0, 2)).mean().sqrt())
    if case.inputs == "outlier":
        scale = case.head_dim**-0.5 if options["scale"] is None else options["scale"]
        costs |= {"dq": scale * delta * k, "dk": scale * delta * q}
    return costs


def check_refused(case: AttentionCase, backend: Backend, device: torch.device | str = "cpu") -> None:
    """Raises AssertionError unless `ring_attention(..., backend=its name)` (or `ring_attention_packed`) refuses the
    (resolved) case in words that help.

    Nothing is ignored and nothing falls back in silence: what a backend cannot do is an error that names the backend,
    each thing that it cannot do, and who can.
    """
    device = torch.device(device)
    missing = case.missing(backend.capabilities(device))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        missing -= {"ring_alibi"}  # of simulated ranks, or of a table that no plan makes: a call here asks for none
        if not missing:
            _check_named(case, backend, {"ring_alibi"}, partial(_ask, case, backend, device))
            return
    x = make_tensors(case, 0, device)
    options: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window,
        "backend": backend.name,
        "softcap": case.softcap,
        "alibi_slopes": x.alibi_slopes,
        "sinks": x.sinks,
        "dropout_p": case.dropout_p,
        "dropout_seed": x.dropout_seed,
        "deterministic": case.deterministic,
    }
    if "packed" in case.features:
        if x.alibi_slopes is not None:
            options["alibi_slopes"] = x.alibi_slopes.reshape(-1, case.q_heads)[0]
        options["cu_seqlens_k"] = [0, case.k_length]
        call = partial(ring_attention_packed, x.q[0], x.k[0], x.v[0], [0, case.q_length], **options)
    else:
        call = partial(ring_attention, x.q, x.k, x.v, **options)
    _check_named(case, backend, missing, call)


def check_gradients_refused(case: AttentionCase, backend: Backend, device: torch.device) -> None:
    """Raises AssertionError unless a (resolved) case, with gradients where the backend has none, would be refused in
    words that help."""
    assert case.dtype is not None and not case.gradients
    ask = partial(check_supported, backend.name, device, case.dtype, case.head_dim, case.features, True)
    _check_named(case, backend, {"gradients"}, ask)


def _ask(case: AttentionCase, backend: Backend, device: torch.device) -> None:
    """What a call on several ranks would ask of the backend before it does anything."""
    assert case.dtype is not None
    check_supported(backend.name, device, case.dtype, case.head_dim, case.features)


def _check_named(case: AttentionCase, backend: Backend, missing: set[str], call: Callable[[], object]) -> None:
    """Raises AssertionError unless the call is refused, naming the backend, all that is missing, and who can."""
    try:
        call()
    except UnsupportedError as error:
        message = str(error)
        absent = [word for word in (*missing, repr(backend.name)) if word not in message]
        assert not absent, f"{case}: the refusal does not name {absent}: {message}"
        others = [name for name in backend_names() if name != backend.name]
        named = any(name in message.split("; ")[-1] for name in others)
        assert named or "no backend installed here can" in message, f"{case}: no alternative in: {message}"
    else:
        raise AssertionError(f"{case}: backend {backend.name!r} lacks {sorted(missing)} but did not refuse")
