"""Inputs of a cell, and how far an implementation's results are from expected ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ring_compare.documents import boundaries, document_lengths
from ring_compare.places import Positions, take
from ring_compare.ranks import Ranks
from ring_compare.single import single_call
from ring_compare.suites import Cell
from ring_core.testing.measure import BASELINE_FACTOR, baseline, rounding
from ring_core.testing.oracle import OracleResult, attention_oracle

TENSORS = ("out", "lse", "dq", "dk", "dv")
_GRADIENTS = ("dq", "dk", "dv")
PHASE_TENSORS = {"fwd": ("out", "lse"), "bwd": _GRADIENTS, "fwd+bwd": _GRADIENTS}
ErrorTable = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of out: whole sequences or shards."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def shard(self, cell: Cell, ranks: Ranks, positions: Positions) -> Inputs:
        """This rank's part."""
        parts = ((x, positions(cell, ranks.rank, x.shape[1])) for x in (self.q, self.k, self.v, self.dout))
        return Inputs(*(take(x, place, 1) for x, place in parts))


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
    dimensions: out, dq (1, S, G, D), lse (1, G, S), dk, dv (1, S, 1, D); None: the implementation does not give it."""

    out: torch.Tensor | None
    lse: torch.Tensor | None
    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None


def _my_heads(cell: Cell, ranks: Ranks, limit: int) -> list[tuple[int, int]]:
    """(batch, key head) pairs whose comparison is this rank's job: heads are independent, so ranks share them out.

    limit > 0: as many at most, spread evenly over all from the first to the last."""
    pairs = [(batch, head) for batch in range(cell.B) for head in range(cell.Hkv)]
    wanted = limit * ranks.world_size
    if 0 < wanted < len(pairs):
        spread = max(1, wanted - 1)
        pairs = [pairs[index * (len(pairs) - 1) // spread] for index in range(wanted)]
    return pairs[ranks.rank :: ranks.world_size]


def gather_results(
    results: Mapping[str, torch.Tensor | None],
    cell: Cell,
    ranks: Ranks,
    positions: Positions,
    *,
    limit: int = 0,
    keep: bool = False,
) -> list[HeadResults]:
    """Local out, lse, dq, dk, dv of all ranks, cut into the heads this rank compares; `keep` copies them out."""
    group = cell.Hq // cell.Hkv
    whole: dict[str, torch.Tensor] = {}
    for name, x in results.items():
        if x is not None:
            length = cell.Sk if name in ("dk", "dv") else cell.Sq
            places = [positions(cell, rank, length) for rank in range(ranks.world_size)]
            whole[name] = ranks.join(x, places, dim=2 if name == "lse" else 1)
    heads = []
    for batch, head in _my_heads(cell, ranks, limit):
        one, mine, kv = slice(batch, batch + 1), slice(head * group, (head + 1) * group), slice(head, head + 1)
        parts: dict[str, torch.Tensor | None] = dict.fromkeys(TENSORS)
        for name, x in whole.items():
            part = x[one, mine] if name == "lse" else x[one, :, kv] if name in ("dk", "dv") else x[one, :, mine]
            parts[name] = part.clone() if keep else part
        heads.append(HeadResults(**parts))
    return heads


def difference(results: Sequence[HeadResults], expected: Sequence[HeadResults], ranks: Ranks) -> ErrorTable:
    """max abs, relative (L2) and RMSE of each tensor that both give, over all ranks' heads; NaN anywhere makes all
    three NaN."""
    largest: list[float] = []
    sums: list[float] = []
    for name in TENSORS:
        top = squares = norm = count = 0.0
        for result, reference in zip(results, expected, strict=True):
            x, ref = getattr(result, name), getattr(reference, name)
            if x is None or ref is None:
                continue
            x, ref = x.double(), ref.double()
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
        if not count:
            continue
        # Maxima drop NaN, in Python and in some collectives; sums keep it.
        bad = math.isnan(squares)
        relative = math.sqrt(squares / norm) if norm else (0.0 if squares == 0 else math.inf)
        table[name] = {
            "max_abs": math.nan if bad else largest[index],
            "relative": math.nan if bad else relative,
            "rmse": math.nan if bad else math.sqrt(squares / count),
        }
    return table


def _head_inputs(cell: Cell, inputs: Inputs, ranks: Ranks, limit: int) -> Iterator[Inputs]:
    """Views of the inputs, head by head of this rank, so that float64 copies stay small."""
    group = cell.Hq // cell.Hkv
    for batch, head in _my_heads(cell, ranks, limit):
        one, mine, kv = slice(batch, batch + 1), slice(head * group, (head + 1) * group), slice(head, head + 1)
        k, v = inputs.k[one, :, kv], inputs.v[one, :, kv]
        yield Inputs(inputs.q[one, :, mine], k, v, inputs.dout[one, :, mine])


def _with_gradients(result: OracleResult) -> HeadResults:
    return HeadResults(result.out, result.lse, result.dq, result.dk, result.dv)


class Expectation:
    """Expected results of one problem, this rank's heads, and the tolerance that follows from plain torch attention.

    single: the errors of one call of a ready-made kernel on the whole sequence (`ring_compare.single`), by tensor;
    single_provider: whose kernel that was, "" where there is none for this problem."""

    def __init__(self, cell: Cell, inputs: Inputs, ranks: Ranks, *, limit: int = 0) -> None:
        self._ranks = ranks
        self._heads: list[HeadResults] = []
        plain: list[HeadResults] = []
        once: list[HeadResults] = []
        mask: dict[str, Any] = {"causal": cell.causal, "window_size": cell.window_size}
        if cell.documents:
            mask["cu_seqlens_q"] = boundaries(document_lengths(cell.documents, cell.Sq))
        call = single_call(cell, inputs.q.device)
        for part in _head_inputs(cell, inputs, ranks, limit):
            q, k, v = part.q, part.k, part.v
            self._heads.append(_with_gradients(attention_oracle(q, k, v, dout=part.dout, **mask)))
            plain.append(_with_gradients(baseline(q, k, v, dout=part.dout, **mask)))
            if call is not None:
                out, dq, dk, dv = call.run(q, k, v, part.dout)
                once.append(HeadResults(out, None, dq, dk, dv))
        errors = difference(plain, self._heads, ranks)
        self.single_provider = call.provider if call is not None else ""
        self.single = difference(once, self._heads, ranks) if call is not None else {}
        # lse is in float32 whatever the inputs are
        stored = {name: torch.float32 if name == "lse" else inputs.q.dtype for name in errors}
        self.tolerance = {
            name: max(BASELINE_FACTOR * errors[name]["relative"], rounding(name, dtype))
            for name, dtype in stored.items()
        }

    def errors(self, results: Sequence[HeadResults]) -> ErrorTable:
        """Errors against the oracle, each with the tolerance for its relative error."""
        table = difference(results, self._heads, self._ranks)
        return {name: {**values, "tolerance": self.tolerance[name]} for name, values in table.items()}


def complaint(errors: ErrorTable) -> str:
    """What lies beyond tolerance, in words; "" when nothing does."""
    parts = [
        f"{name} relative error {values['relative']:.3g} beyond {values['tolerance']:.3g}"
        for name, values in errors.items()
        if not values["relative"] <= values["tolerance"]  # so that NaN complains
    ]
    return "; ".join(parts)
