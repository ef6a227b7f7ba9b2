"""How wrong is a result, how wrong may it be, and inputs that make it wrong.

The measure is the relative error in the 2-norm against float64. What is tolerated comes from torch's own attention in
the same dtype on the same inputs, never from the backend under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ring_core.testing.oracle import OracleResult, Problem, attention_oracle, blocks

BASELINE_FACTOR = 2.0

InputKind = Literal["randn", "large", "outlier", "constant"]
INPUT_KINDS: tuple[InputKind, ...] = ("randn", "large", "outlier", "constant")


@dataclass(frozen=True)
class Errors:
    """max_abs = max|x - ref|, relative = ||x - ref|| / ||ref||, rmse = root of the mean squared difference."""

    max_abs: float
    relative: float
    rmse: float


@dataclass(frozen=True)
class Tolerance:
    """Passes iff ||x - ref|| <= relative * ||ref|| + rms * sqrt(numel).

    `rms` is for results that cancel: where one key is seen the true dq is 0, and any rounding is infinitely wrong.
    """

    relative: float
    rms: float = 0.0


def compare(x: Tensor, reference: Tensor) -> Errors:
    """The errors of `x` against `reference` (same shape, any float dtypes; cast to float64).

    Infinite entries must coincide, else every error is inf; they count for nothing else. nan anywhere is inf. Empty
    tensors have no error. Against a zero reference the relative error is 0 or inf. Raises ValueError on other shapes.
    """
    if x.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(reference.shape)}")
    x, reference = x.detach().double(), reference.detach().double().to(x.device)
    if bool(x.isnan().any() | reference.isnan().any()):
        return Errors(math.inf, math.inf, math.inf)
    infinite = x.isinf() | reference.isinf()
    if not torch.equal(x[infinite], reference[infinite]):
        return Errors(math.inf, math.inf, math.inf)
    x, reference = x[~infinite], reference[~infinite]
    if x.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    difference = x - reference
    norm, size = float(difference.norm()), float(reference.norm())
    relative = norm / size if size > 0.0 else (0.0 if norm == 0.0 else math.inf)
    return Errors(float(difference.abs().max()), relative, norm / math.sqrt(x.numel()))


def baseline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    **options: Any,
) -> OracleResult:
    """Attention as plain PyTorch in the input dtype: matmul, softmax, matmul, autograd; arguments as the oracle's.

    Every step rounds to that dtype, and torch accumulates within a step as it likes. Gradients of k and v that several
    query heads or blocks share are summed in float64, then rounded once.
    """
    problem = Problem(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], **options)
    dtype = q.dtype
    root = math.sqrt(abs(problem.softmax_scale))
    with_gradients = dout is not None or dlse is not None
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full((problem.batch, problem.q_heads, problem.q_length), -math.inf)
    dout = torch.zeros_like(out) if dout is None else dout.detach().to(dtype)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.detach().to(dtype)
    slopes = None if alibi_slopes is None else alibi_slopes.detach().float().expand(problem.batch, problem.q_heads)
    dq = torch.zeros_like(q, dtype=torch.float64)
    dk, dv = torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float64)
    for block in blocks(problem, q.device):
        row_seen = block.visible.any(dim=1)
        for head in range(block.heads.start, block.heads.stop):
            inputs = [
                q[block.batch, block.rows, head],  # (rows, D)
                k[block.batch, block.keys, block.kv_head],  # (keys, D)
                v[block.batch, block.keys, block.kv_head],  # (keys, Dv)
            ]
            if sinks is not None:
                inputs.append(sinks[head].to(dtype))
            inputs = [tensor.detach().clone().requires_grad_(with_gradients) for tensor in inputs]
            with torch.enable_grad():
                # As torch's math attention does it: scaled on both sides, so that float16 does not overflow.
                scores = (inputs[0] * root) @ (inputs[1] * math.copysign(root, problem.softmax_scale)).T
                if problem.softcap > 0.0:
                    scores = problem.softcap * torch.tanh(scores / problem.softcap)
                if slopes is not None:
                    scores = (scores - slopes[block.batch, head] * block.distance).to(dtype)
                scores = scores.masked_fill(~block.visible, -math.inf)
                empty = ~row_seen if sinks is None else torch.zeros_like(row_seen)
                if sinks is not None:
                    scores = torch.cat((scores, inputs[3].expand(scores.shape[0], 1)), dim=1)
                scores = scores.masked_fill(empty[:, None], 0.0)  # a softmax over nothing would be nan
                block_lse = torch.logsumexp(scores, dim=1).masked_fill(empty, -math.inf)
                probabilities = torch.softmax(scores, dim=1)[:, : block.visible.shape[1]]
                probabilities = probabilities.masked_fill(empty[:, None], 0.0)
                if block.kept is not None:
                    kept = block.kept[head - block.heads.start]
                    probabilities = probabilities * kept / (1.0 - problem.dropout_p)
                block_out = probabilities @ inputs[2]
            out[block.batch, block.rows, head] = block_out.detach()
            lse[block.batch, head, block.rows] = block_lse.detach()
            if not with_gradients:
                continue
            upstream = dout[block.batch, block.rows, head].masked_fill(~row_seen[:, None], 0.0)
            upstream_lse = dlse[block.batch, head, block.rows].masked_fill(empty, 0.0)
            grads = torch.autograd.grad((block_out, block_lse), inputs, (upstream, upstream_lse))
            dq[block.batch, block.rows, head] = grads[0].double()
            dk[block.batch, block.keys, block.kv_head] += grads[1].double()
            dv[block.batch, block.keys, block.kv_head] += grads[2].double()
            if dsinks is not None:
                dsinks[head] += grads[3].double()
    if not with_gradients:
        return OracleResult(out, lse)
    return OracleResult(out, lse, dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks)


def baseline_errors(
    q: Tensor, k: Tensor, v: Tensor, *, reference: OracleResult | None = None, **options: Any
) -> dict[str, Errors]:
    """`compare` of `baseline` against the oracle (`reference`, if already computed), by name: out, lse, dq, ...

    options: as `attention_oracle`'s; gradients are there if `dout` or `dlse` is.
    """
    reference = attention_oracle(q, k, v, **options) if reference is None else reference
    plain = baseline(q, k, v, **options)
    return {name: compare(getattr(plain, name), truth) for name, truth in vars(reference).items() if truth is not None}


def tolerances(
    q: Tensor, k: Tensor, v: Tensor, *, reference: OracleResult | None = None, **options: Any
) -> dict[str, Tolerance]:
    """What a backend may be wrong by: BASELINE_FACTOR times the baseline's error, by name: out, lse, dq, ...

    Where the baseline happens to be exact (a handful of numbers is, by luck), what remains is `rounding`, and for
    gradients that cancel to nothing as many float32 roundings of what cancelled. Raises ValueError if the baseline
    itself overflowed: such inputs can tell nothing.
    """
    reference = attention_oracle(q, k, v, **options) if reference is None else reference
    errors = baseline_errors(q, k, v, reference=reference, **options)
    fine = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    result = {}
    for name, error in errors.items():
        if not math.isfinite(error.max_abs):
            raise ValueError(f"the {q.dtype} baseline of {name} is not finite")
        rms = 4 * fine * _uncancelled(name, q, k, v, options)
        relative = BASELINE_FACTOR * error.relative if math.isfinite(error.relative) else 0.0  # inf: the truth is 0
        result[name] = Tolerance(max(relative, rounding(name, q.dtype)), rms)
    return result


def rounding(name: str, dtype: torch.dtype) -> float:
    """The relative error of `name` (out, lse, dq, ...) that is tolerated however little the baseline is wrong by.

    A correct rounding to the inputs' `dtype`, or a few float32 roundings (float64 for float64 inputs): where few
    numbers are summed, by how many of these a sum is wrong is luck.
    """
    stored = 0.0 if name in ("lse", "dsinks") else torch.finfo(dtype).eps / 2  # those two are never stored coarsely
    return max(stored, 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps)


def assert_close_to_oracle(name: str, x: Tensor, reference: Tensor, tolerance: Tolerance | float) -> None:
    """Raise AssertionError unless `x` is as close to `reference` as `tolerance` (a float: relative) asks."""
    tolerance = tolerance if isinstance(tolerance, Tolerance) else Tolerance(tolerance)
    errors = compare(x, reference)
    finite = reference.detach().double()
    finite = finite[finite.isfinite()]
    scale = float(finite.norm()) / math.sqrt(max(1, finite.numel()))
    allowed = tolerance.relative * scale + tolerance.rms
    if errors.rmse <= allowed:  # false for nan and inf
        return
    lines = [
        f"{name}: relative error {errors.relative:.3e}, tolerance {tolerance.relative:.3e}",
        f"  rmse {errors.rmse:.3e} (allowed {allowed:.3e}), max abs {errors.max_abs:.3e}, rms of the truth {scale:.3e}",
        f"  shape {tuple(x.shape)}, {x.dtype}, {x.device}",
        *_worst(x.detach().double(), reference.detach().double().to(x.device)),
    ]
    raise AssertionError("\n".join(lines))


@dataclass(frozen=True)
class Inputs:
    """q, dout (B, Sq, Hq, D), k, v (B, Sk, Hkv, D) in one dtype; dlse (B, Hq, Sq), float32 or wider."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


def make_inputs(
    kind: InputKind,
    *,
    generator: torch.Generator,
    batch: int = 1,
    q_length: int,
    k_length: int | None = None,
    q_heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs; `generator` decides them all, whatever the device they end on (if it is itself a CPU generator).

    kind: "randn"; "large", q, k, v = 8 x randn, where the softmax is nearly one-hot; "outlier", one row of q and one of
    k is 64 times the others; "constant", rows repeat in runs of a quarter of the sequence, so that scores tie.
    k_length and kv_heads default to those of q.
    """
    if kind not in INPUT_KINDS:
        raise ValueError(f"kind must be one of {INPUT_KINDS}, got {kind!r}")
    k_length = q_length if k_length is None else k_length
    kv_heads = q_heads if kv_heads is None else kv_heads

    def randn(*shape: int) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return torch.randn(shape, generator=generator, device=generator.device, dtype=wide)

    q = randn(batch, q_length, q_heads, head_dim)
    k, v = (randn(batch, k_length, kv_heads, head_dim) for _ in range(2))
    dout, dlse = randn(*q.shape), randn(batch, q_heads, q_length)
    if kind == "large":
        q, k, v = 8 * q, 8 * k, 8 * v
    elif kind == "outlier":
        for tensor in (q, k):
            if tensor.shape[1]:
                row = int(torch.randint(tensor.shape[1], (1,), generator=generator, device=generator.device))
                tensor[:, row] *= 64
    elif kind == "constant":
        q, k, v = (_in_runs(tensor) for tensor in (q, k, v))
    q, k, v, dout = (tensor.to(device=device, dtype=dtype) for tensor in (q, k, v, dout))
    return Inputs(q, k, v, dout, dlse.to(device))


def _in_runs(x: Tensor) -> Tensor:
    """x (B, S, H, D) with each row replaced by the first of its quarter of the sequence."""
    run = max(1, x.shape[1] // 4)
    return x[:, torch.arange(x.shape[1], device=x.device) // run * run]


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.detach().double().square().sum()) / max(1, x.numel()))


def _uncancelled(name: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> float:
    """A result's size if nothing in its sum cancelled, for one key: what its rounding errors are proportional to."""
    dout, dlse, scale = options.get("dout"), options.get("dlse"), options.get("scale")
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else abs(float(scale))
    dscore = 0.0 if dout is None else _rms(dout) * _rms(v) * math.sqrt(v.shape[3])
    dscore += 0.0 if dlse is None else _rms(dlse)
    if name == "dq":
        return scale * dscore * _rms(k)
    if name == "dk":
        return scale * dscore * _rms(q)
    if name == "dsinks":
        return dscore
    return 0.0


def _worst(x: Tensor, reference: Tensor) -> list[str]:
    """Where the largest differences are, and how much of the tensor is wrong."""
    difference = (x - reference).abs()
    difference = torch.where(x == reference, 0.0, difference).nan_to_num(nan=math.inf)  # equal infinities differ by nan
    flat = difference.flatten()
    lines = [f"  {int(x.isnan().sum())} nan, {int(flat.isinf().sum())} infinite of {flat.numel()} differences"]
    for index in flat.topk(min(3, flat.numel())).indices.tolist():
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), x.shape))
        lines.append(f"  at {where}: {float(x[where]):.9g}, should be {float(reference[where]):.9g}")
    return lines
