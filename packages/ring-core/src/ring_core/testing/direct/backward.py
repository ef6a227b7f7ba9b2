"""A backward, called directly, against the contract's reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ring_core.backend import Params, departures_of, on_device
from ring_core.reference import ReferenceBackend
from ring_core.segment import Segment, Table
from ring_core.testing.direct.tables import keys_of, pieces_of, random_key_table, rank_plans, rows_of, table_of

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.2e-3}
"""Relative errors of dq, dk and dv: P and dS are rounded to the inputs' dtype before they are multiplied."""
ELSEWHERE = 7.0
"""What sums hold where no segment adds to them."""


class Functions(NamedTuple):
    """Of a backward, as `ring_core.backend.Backend` has them.

    prepare(q, out, dout, lse, dlse, *, params), backward(state, q, k, v, dout, dk, dv, table, *, params, departures,
    settings), finish(state, *, params).
    """

    prepare: Callable[..., Any]
    backward: Callable[..., None]
    finish: Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class BackwardCase:
    """The tables are computed one after another, over the same keys.

    final: dk and dv are in the inputs' dtype, written; repeat: so many times, for the same bits.
    """

    name: str
    tables: list[Table]
    q_len: int
    heads: tuple[int, int] = (2, 1)
    dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    settings: Any = None
    piece_length: int = 0
    scale: float = 0.0
    dlse: bool = False
    sinks: bool = False
    softcap: float = 0.0
    alibi: bool = False
    departures: bool = False
    final: bool = False
    deterministic: bool = False
    repeat: int = 1


@dataclass
class _Inputs:
    """What a case computes with; rows and keys that no segment names are NaN."""

    q: Tensor
    kv: Tensor  # (2, C, B, S, H, D)
    out: Tensor
    dout: Tensor
    lse: Tensor
    dlse: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    rows: Tensor  # (B, Sq) of some segment
    keys: Tensor  # (B, C * S) of some segment
    pieces: int
    length: int


def _inputs(case: BackwardCase, device: torch.device) -> _Inputs:
    """Random ones: lse and out need not belong to q, k, v, a backward takes them as they are."""
    torch.manual_seed(1)
    pieces, length = pieces_of(case.tables, case.piece_length)
    batch, (heads, kv_heads), dim = case.batch, case.heads, case.dim
    q, dout, out = (torch.randn(batch, case.q_len, heads, dim, device=device).to(case.dtype) for _ in range(3))
    memory = torch.randn(batch, pieces * length, 2, kv_heads, dim, device=device).to(case.dtype)
    lse = 4.0 + 0.3 * torch.randn(batch, heads, case.q_len, device=device)
    lse[..., ::37] = -torch.inf  # rows that have seen nothing
    dlse = torch.randn(batch, heads, case.q_len, device=device) if case.dlse else None
    rows = rows_of(case.tables, batch, case.q_len).to(device)
    keys = keys_of(case.tables, batch, pieces, length).to(device)
    for x in (q, dout, out):
        x[~rows] = torch.nan
    memory[~keys] = torch.nan
    kv = memory.unflatten(1, (pieces, length)).movedim((3, 1), (0, 1))
    sinks = torch.randn(heads, device=device) if case.sinks else None
    slopes = torch.rand(batch, heads, device=device) / 50 if case.alibi else None
    return _Inputs(q, kv, out, dout, lse, dlse, sinks, slopes, rows, keys, pieces, length)


def _wanted(
    case: BackwardCase, x: _Inputs, params: Params, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dkv (2, B, C * S, Hkv, D) of the reference in fp64, and dsinks."""
    q, kv, out, dout = (torch.nan_to_num(given.double()) for given in (x.q, x.kv, x.out, x.dout))
    reference = ReferenceBackend()
    dlse = None if x.dlse is None else x.dlse.double()
    state = reference.prepare(q, kv[0].shape, out, dout, x.lse.double(), dlse, params=params)
    dkv = torch.zeros_like(kv)
    for table in case.tables:
        reference.backward(state, q, kv[0], kv[1], dout, dkv[0], dkv[1], on_device(table, device), params=params)
    dq, dsinks = reference.finish(state, params=params)
    return dq, dkv.movedim(2, 1).flatten(2, 3), dsinks


def run_backward(case: BackwardCase, functions: Functions, device: torch.device) -> tuple[str, bool]:
    """What came out, and whether that is right."""
    x = _inputs(case, device)
    batch, (_, kv_heads), dim = case.batch, case.heads, case.dim
    params = Params(
        case.scale or dim**-0.5, sinks=x.sinks, softcap=case.softcap, alibi_slopes=x.slopes,
        deterministic=case.deterministic,
    )  # fmt: skip
    results = []
    for _ in range(case.repeat):
        sums = torch.zeros(2, batch, x.pieces * x.length, kv_heads, dim, device=device)
        sums[:, ~x.keys] = ELSEWHERE
        if case.final:
            assert len(case.tables) == 1, "the whole backward of its keys"
            sums = torch.full_like(sums, torch.nan, dtype=case.dtype)
        dkv = sums.unflatten(2, (x.pieces, x.length)).movedim(2, 1)  # (2, C, B, S, H, D)
        counters = torch.zeros(x.pieces, dtype=torch.int32, device=device) if case.departures else None
        targets = [0] * x.pieces
        state = functions.prepare(x.q, x.out, x.dout, x.lse, x.dlse, params=params)
        for table in case.tables:
            on = on_device(table, device)
            functions.backward(
                state, x.q, x.kv[0], x.kv[1], x.dout, dkv[0], dkv[1], on, params=params, departures=counters,
                settings=case.settings,
            )  # fmt: skip
            added = departures_of(table, x.pieces, batch, kv_heads)
            targets = [a + b for a, b in zip(targets, added, strict=True)]
        dq, dsinks = functions.finish(state, params=params)
        if device.type == "cuda":
            torch.cuda.synchronize()
        results.append((dq, sums))
    if case.departures and counters is not None and counters.tolist() != targets:
        return f"departures {counters.tolist()}, not {targets}", False
    if not bool((sums[:, ~x.keys] == (0.0 if case.final else ELSEWHERE)).all()):
        return "keys outside every segment " + ("are not 0" if case.final else "were written"), False
    if not all(
        torch.equal(dq[x.rows], results[0][0][x.rows]) and torch.equal(sums, results[0][1]) for dq, sums in results
    ):
        return "not the same bits twice", False
    want_q, want_kv, want_sinks = _wanted(case, x, params, device)
    parts = {"dq": (dq[x.rows], want_q[x.rows])}
    parts |= {name: (sums[n][x.keys], want_kv[n][x.keys]) for n, name in enumerate(("dk", "dv"))}
    if dsinks is not None and want_sinks is not None:
        parts["dsinks"] = (dsinks, want_sinks)
    errors = {name: _relative(*pair) for name, pair in parts.items() if pair[1].numel() and pair[1].norm() > 0}
    fine = all(error < LIMITS[case.dtype] for error in errors.values())
    message = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not fine:
        for name, (got, want) in parts.items():
            wrong = ~((got.double() - want).abs().flatten(1 if got.dim() > 1 else 0).amax(-1) < 0.05)
            message += f"; {name}: wrong rows {int(wrong.sum())} of {wrong.numel()}, first"
            message += f" {wrong.nonzero()[:6].flatten().tolist()}"
    return message, fine


def _relative(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-20)
    return float(error) if bool(torch.isfinite(error)) else math.inf


def backward_plans(dim: int, **more: Any) -> Iterator[BackwardCase]:
    """Of ranks of every layout and schedule; more: fields of each."""
    for rank in rank_plans():
        tables = [step.backward for step in rank.plan.steps if len(step.backward)]
        fields = {"piece_length": rank.piece_length, "heads": (4, 2), **more}
        yield BackwardCase(f"{rank.name} D{dim}", tables, rank.q_len, dim=dim, **fields)


def causal_keys(q_len: int, k_len: int, *, causal: bool = False, offset: int = 0) -> Table:
    """One segment; with causal, query i sees keys up to i + offset."""
    return table_of([Segment(0, q_len, 0, 0, k_len, -q_len, offset if causal else k_len, 0, 0, 1, -1, 3)])


def simple_backward(dim: int, **more: Any) -> Iterator[BackwardCase]:
    """One segment each, of whole tiles and of parts; more: fields of each."""
    for q_len, k_len, causal, offset in (
        (64, 128, False, 0),
        (128, 128, False, 0),
        (512, 512, False, 0),
        (512, 512, True, 0),
        (300, 333, True, 33),
        (333, 300, True, -33),
        (200, 17, False, 0),
        (5, 700, False, 0),
        (2048, 2048, True, 0),
    ):
        label = f"{q_len}x{k_len} {'causal' if causal else 'full'} {offset} D{dim}"
        yield BackwardCase(label, [causal_keys(q_len, k_len, causal=causal, offset=offset)], q_len, dim=dim, **more)


def key_steps(dim: int, **more: Any) -> BackwardCase:
    """Four steps, each over a quarter of the keys, causal, the last keys first."""
    parts = [table_of([Segment(0, 1000, n, 0, 250, -1000, -250 * n, 0, 250 * n, 1, -1, 3)]) for n in (3, 2, 1, 0)]
    return BackwardCase(f"four steps D{dim}", parts, 1000, dim=dim, **{"batch": 2, "heads": (4, 2), **more})


def key_batches(dim: int, **more: Any) -> BackwardCase:
    """Strips of one of two batch entries each, and of both."""
    table = table_of(
        [Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, 0, 3)],
        [Segment(50, 100, 0, 0, 77, -100, 5, 0, 0, 1, 1, 3)],
        [Segment(0, 60, 1, 0, 90, -100, 90, 0, 0, 1, -1, 3)],
    )
    return BackwardCase(f"batch entries of their own D{dim}", [table], 256, dim=dim, batch=2, **more)


def random_keys(seed: int, dim: int, **more: Any) -> BackwardCase:
    """Strips of keys; more: fields of it."""
    table, q_len = random_key_table(seed)
    heads = ((2, 1), (1, 1), (4, 2), (6, 1))[seed % 4]
    fields = {"heads": heads, "batch": 1 + seed % 2, "dlse": seed % 3 == 0, **more}
    return BackwardCase(f"random {seed} D{dim}", [table], q_len, dim=dim, **fields)
