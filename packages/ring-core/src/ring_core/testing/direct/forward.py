"""A forward, called directly, against the contract's reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Params, on_device
from ring_core.reference import ReferenceBackend
from ring_core.segment import Table
from ring_core.testing.direct.tables import keys_of, pieces_of, random_table, rank_plans, rows_of

SENTINEL = 12345.0
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 8e-4}
"""Relative errors of the output: P is rounded to the inputs' dtype before it is multiplied."""
LSE_LIMIT = 2e-3

Forward = Callable[..., None]
"""forward(q, k, v, out, lse, state, table, *, params, settings), as `ring_core.backend.Backend.forward`."""


@dataclass(frozen=True)
class ForwardCase:
    """The tables are computed one after another, each over keys of its own, and add up."""

    name: str
    tables: list[Table]
    q_len: int
    heads: tuple[int, int] = (4, 2)
    dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    settings: Any = None
    piece_length: int = 0
    sinks: bool = False
    softcap: float = 0.0
    alibi: bool = False


def run_forward(case: ForwardCase, forward: Forward, device: torch.device) -> tuple[str, bool]:
    """What came out, and whether that is right."""
    torch.manual_seed(0)
    q = torch.randn(case.batch, case.q_len, case.heads[0], case.dim, device=device).to(case.dtype)
    rows = rows_of(case.tables, case.batch, case.q_len).to(device)
    q[~rows] = torch.nan
    out = torch.full_like(q, SENTINEL)
    lse = torch.full((case.batch, case.heads[0], case.q_len), SENTINEL, device=device)
    state = torch.full(q.shape, torch.nan, device=device) if len(case.tables) > 1 else None
    sinks = 3 * torch.randn(case.heads[0], device=device) if case.sinks else None
    slopes = torch.rand(case.batch, case.heads[0], device=device) / 8 if case.alibi else None
    exact = (out.double(), lse.double(), None if state is None else state.double())
    params = Params(case.dim**-0.5, sinks=sinks, softcap=case.softcap, alibi_slopes=slopes)
    for table in case.tables:
        if not len(table):
            continue
        k, v = _keys(table, case, device)
        on = on_device(table, device)
        forward(q, k, v, out, lse, state, on, params=params, settings=case.settings)
        wide = (q.double(), k.double(), v.double())
        ReferenceBackend().forward(*wide, *exact, on, params=params)
    untouched = bool((out[~rows] == SENTINEL).all() and (lse.transpose(1, 2)[~rows] == SENTINEL).all())
    got, want = out[rows].double(), exact[0][rows]
    error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if want.numel() else 0.0
    got_lse, want_lse = lse.transpose(1, 2)[rows].double(), exact[1].transpose(1, 2)[rows]
    finite = want_lse != -torch.inf
    lse_error = (got_lse - want_lse)[finite].abs().max().item() if finite.any() else 0.0
    empty = torch.equal(got_lse == -torch.inf, ~finite) and bool((got[~finite] == 0).all())
    fine = untouched and empty and error < LIMITS[case.dtype] and lse_error < LSE_LIMIT  # false for nan
    message = f"rel {error:.2e} lse {lse_error:.1e}"
    if not fine:
        wrong = ~((got - want).abs().amax(-1) < 0.05)
        message += f" untouched={untouched} empty rows={empty} wrong rows {int(wrong.sum())} of {wrong.numel()},"
        message += f" first {wrong.nonzero()[:6].tolist()}"
    return message, fine


def _keys(table: Table, case: ForwardCase, device: torch.device) -> Tensor:
    """(2, C, B, S, H, D) with k and v of a token side by side; NaN wherever no segment of the table looks."""
    pieces, length = pieces_of([table], case.piece_length)
    x = torch.randn(case.batch, pieces * length, 2, case.heads[1], case.dim, device=device).to(case.dtype)
    x[~keys_of([table], case.batch, pieces, length).to(device)] = torch.nan
    kv: Tensor = x.unflatten(1, (pieces, length)).movedim((3, 1), (0, 1))
    return kv


def forward_plans(**more: Any) -> Iterator[ForwardCase]:
    """Of ranks of every layout and schedule; more: fields of each."""
    for rank in rank_plans():
        tables = [step.forward for step in rank.plan.steps]
        yield ForwardCase(rank.name, tables, rank.q_len, **{"piece_length": rank.piece_length, **more})


def random_queries(seed: int, **more: Any) -> ForwardCase:
    """Strips of queries; more: fields of it."""
    table, q_len = random_table(seed)
    return ForwardCase(f"random {seed}", [table], q_len, **{"batch": 1 + seed % 2, **more})
