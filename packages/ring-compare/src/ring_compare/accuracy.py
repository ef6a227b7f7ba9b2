"""Inputs of a cell, and how far an implementation's results are from expected ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ring_compare.ranks import Ranks
from ring_compare.suites import Cell
from ring_core import shard_sequence
from ring_core.testing.measure import BASELINE_FACTOR, baseline
from ring_core.testing.oracle import OracleResult, attention_oracle

TENSORS = ("out", "lse", "dq", "dk", "dv")
PHASE_TENSORS = {"fwd": ("out", "lse"), "fwd+bwd": ("dq", "dk", "dv")}
ErrorTable = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of out: whole sequences or shards."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def shard(self, cell: Cell, ranks: Ranks) -> Inputs:
        """This rank's part."""
        parts = (
            shard_sequence(x, layout=cell.layout, dim=1, rank=ranks.rank, world_size=ranks.world_size).contiguous()
            for x in (self.q, self.k, self.v, self.dout)
        )
        return Inputs(*parts)


def make_inputs(cell: Cell, seed: int, device: torch.device) -> Inputs:
    """The same standard normal inputs on every rank, since ranks hold devices of one kind."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, cell.dtype)

    def draw(length: int, heads: int) -> torch.Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn((cell.B, length, heads, cell.D), generator=generator, device=device, dtype=wide).to(dtype)

    q, k, v = draw(cell.Sq, cell.Hq), draw(cell.Sk, cell.Hkv), draw(cell.Sk, cell.Hkv)
    return Inputs(q, k, v, draw(cell.Sq, cell.Hq))


@dataclass(frozen=True)
class HeadResults:
    """Results of one batch entry and one key head with its G query heads, of the whole sequence, batch and head kept as
    dimensions: out, dq (1, S, G, D), lse (1, G, S), dk, dv (1, S, 1, D)."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def _my_heads(cell: Cell, ranks: Ranks) -> list[tuple[int, int]]:
    """(batch, key head) pairs whose comparison is this rank's job: heads are independent, so ranks share them out."""
    pairs = [(batch, head) for batch in range(cell.B) for head in range(cell.Hkv)]
    return pairs[ranks.rank :: ranks.world_size]


def gather_results(
    results: dict[str, torch.Tensor], cell: Cell, ranks: Ranks, *, keep: bool = False
) -> list[HeadResults]:
    """Local out, lse, dq, dk, dv of all ranks, cut into the heads this rank compares; `keep` copies them out."""
    group = cell.Hq // cell.Hkv
    whole = {name: ranks.join(x, layout=cell.layout, dim=2 if name == "lse" else 1) for name, x in results.items()}
    heads = []
    for batch, head in _my_heads(cell, ranks):
        one, mine, kv = slice(batch, batch + 1), slice(head * group, (head + 1) * group), slice(head, head + 1)
        result = HeadResults(
            whole["out"][one, :, mine],
            whole["lse"][one, mine],
            whole["dq"][one, :, mine],
            whole["dk"][one, :, kv],
            whole["dv"][one, :, kv],
        )
        heads.append(HeadResults(*(getattr(result, name).clone() for name in TENSORS)) if keep else result)
    return heads


def difference(results: Sequence[HeadResults], expected: Sequence[HeadResults], ranks: Ranks) -> ErrorTable:
    """max abs, relative (L2) and RMSE of each tensor over all ranks' heads; NaN anywhere makes all three NaN."""
    largest: list[float] = []
    sums: list[float] = []
    for name in TENSORS:
        top = squares = norm = count = 0.0
        for result, reference in zip(results, expected, strict=True):
            x, ref = getattr(result, name).double(), getattr(reference, name).double()
            # Rows that see nothing have lse -inf on both sides: equal, though inf - inf is not a number.
            gap = torch.where(x == ref, 0.0, x - ref)
            finite = torch.where(ref.isinf(), 0.0, ref)
            top = max(top, float(gap.abs().max()) if gap.numel() else 0.0)
            squares += float(gap.square().sum())
            norm += float(finite.square().sum())
            count += gap.numel()
        largest.append(top)
        sums += (squares, norm, count)
    largest, sums = ranks.maximum(largest), ranks.total(sums)
    table = {}
    for index, name in enumerate(TENSORS):
        squares, norm, count = sums[3 * index : 3 * index + 3]
        # Maxima drop NaN, in Python and in some collectives; sums keep it.
        bad = math.isnan(squares)
        relative = math.sqrt(squares / norm) if norm else (0.0 if squares == 0 else math.inf)
        table[name] = {
            "max_abs": math.nan if bad else largest[index],
            "relative": math.nan if bad else relative,
            "rmse": math.nan if bad else math.sqrt(squares / count) if count else 0.0,
        }
    return table


def _head_inputs(cell: Cell, inputs: Inputs, ranks: Ranks) -> Iterator[Inputs]:
    """Views of the inputs, head by head of this rank, so that float64 copies stay small."""
    group = cell.Hq // cell.Hkv
    for batch, head in _my_heads(cell, ranks):
        one, mine, kv = slice(batch, batch + 1), slice(head * group, (head + 1) * group), slice(head, head + 1)
        k, v = inputs.k[one, :, kv], inputs.v[one, :, kv]
        yield Inputs(inputs.q[one, :, mine], k, v, inputs.dout[one, :, mine])


def _with_gradients(result: OracleResult) -> HeadResults:
    assert result.dq is not None
    assert result.dk is not None
    assert result.dv is not None
    return HeadResults(result.out, result.lse, result.dq, result.dk, result.dv)


class Expectation:
    """Expected results of one cell, this rank's heads, and the tolerance that follows from plain torch attention."""

    def __init__(self, cell: Cell, inputs: Inputs, ranks: Ranks) -> None:
        self._ranks = ranks
        self._heads: list[HeadResults] = []
        plain: list[HeadResults] = []
        for part in _head_inputs(cell, inputs, ranks):
            q, k, v = part.q, part.k, part.v
            mask: dict[str, Any] = {"causal": cell.causal, "window_size": cell.window_size}
            self._heads.append(_with_gradients(attention_oracle(q, k, v, dout=part.dout, **mask)))
            plain.append(_with_gradients(baseline(q, k, v, dout=part.dout, **mask)))
        errors = difference(plain, self._heads, ranks)
        dtype = inputs.q.dtype
        self.tolerance = {
            name: max(BASELINE_FACTOR * errors[name]["relative"], _rounding(name, dtype)) for name in TENSORS
        }

    def errors(self, results: Sequence[HeadResults]) -> ErrorTable:
        """Errors against the oracle, each with the tolerance for its relative error."""
        table = difference(results, self._heads, self._ranks)
        return {name: {**values, "tolerance": self.tolerance[name]} for name, values in table.items()}


def _rounding(name: str, dtype: torch.dtype) -> float:
    """What is always tolerated, should the baseline be exact by luck: lse is fp32, the rest is stored in the dtype."""
    return torch.finfo(torch.float32).eps if name == "lse" else torch.finfo(dtype).eps / 2


def complaint(errors: ErrorTable) -> str:
    """What lies beyond tolerance, in words; "" when nothing does."""
    parts = [
        f"{name} relative error {values['relative']:.3g} beyond {values['tolerance']:.3g}"
        for name, values in errors.items()
        if not values["relative"] <= values["tolerance"]  # so that NaN complains
    ]
    return "; ".join(parts)
