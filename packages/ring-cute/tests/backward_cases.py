"""Cases of the backward, each against the contract's reference in fp64. Run on a GPU, or on the emulated one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ring_core.backend import DeviceTable, Params, departures_of, on_device
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.segment import COLUMNS, Segment, Table
from ring_cute.hopper import backward_launch
from ring_cute.hopper.backward_settings import BackwardSettings

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.2e-3}
"""Relative errors of dq, dk and dv: P and dS are rounded to the inputs' dtype before they are multiplied."""


def table_of(*strips: list[Segment]) -> Table:
    """Strips of keys, each a list of its segments."""
    rows = [segment for strip in strips for segment in strip]
    groups = np.cumsum([0] + [len(strip) for strip in strips])
    return Table(np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS)), groups.astype(np.int32))


def one(q_len: int, k_len: int, *, causal: bool = False, offset: int = 0) -> Table:
    """One segment; with causal, query i sees keys up to i + offset."""
    return table_of([Segment(0, q_len, 0, 0, k_len, -q_len, offset if causal else k_len, 0, 0, 1, -1, 3)])


@dataclass(frozen=True)
class Case:
    name: str
    tables: list[Table]
    q_len: int
    heads: tuple[int, int] = (2, 1)
    dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    settings: BackwardSettings | None = None
    piece_length: int = 0
    dlse: bool = False
    sinks: bool = False
    softcap: float = 0.0
    alibi: bool = False
    departures: bool = False
    final: bool = False  # dk, dv in the inputs' dtype, written
    deterministic: bool = False
    repeat: int = 1


@dataclass
class Inputs:
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


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """Random ones: lse and out need not belong to q, k, v, a backward takes them as they are."""
    torch.manual_seed(1)
    segments = [s for t in case.tables for s in t.segments]
    pieces = 1 + max((s.piece for s in segments), default=0)
    length = max(case.piece_length, max((s.k_start + s.k_len for s in segments), default=1))
    batch, (heads, kv_heads), dim = case.batch, case.heads, case.dim
    q, dout, out = (torch.randn(batch, case.q_len, heads, dim, device=device).to(case.dtype) for _ in range(3))
    memory = torch.randn(batch, pieces * length, 2, kv_heads, dim, device=device).to(case.dtype)
    lse = 4.0 + 0.3 * torch.randn(batch, heads, case.q_len, device=device)
    lse[..., ::37] = -torch.inf  # rows that have seen nothing
    dlse = torch.randn(batch, heads, case.q_len, device=device) if case.dlse else None
    rows = torch.zeros(batch, case.q_len, dtype=torch.bool)
    keys = torch.zeros(batch, pieces * length, dtype=torch.bool)
    for g in segments:
        entries = slice(None) if g.batch < 0 else slice(g.batch, g.batch + 1)
        rows[entries, g.q_start : g.q_start + g.q_len] = True
        keys[entries, g.piece * length + g.k_start : g.piece * length + g.k_start + g.k_len] = True
    rows, keys = rows.to(device), keys.to(device)
    for x in (q, dout, out):
        x[~rows] = torch.nan
    memory[~keys] = torch.nan
    kv = memory.unflatten(1, (pieces, length)).movedim((3, 1), (0, 1))
    sinks = torch.randn(heads, device=device) if case.sinks else None
    slopes = torch.rand(batch, heads, device=device) / 50 if case.alibi else None
    return Inputs(q, kv, out, dout, lse, dlse, sinks, slopes, rows, keys, pieces, length)


def wanted(case: Case, x: Inputs, params: Params, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dkv (2, B, C * S, Hkv, D) of the reference in fp64, and dsinks."""
    clean = lambda t: torch.nan_to_num(t.double())  # noqa: E731
    q, kv, out, dout = clean(x.q), clean(x.kv), clean(x.out), clean(x.dout)
    lse = x.lse.double()
    reference = ReferenceBackend()
    dlse = None if x.dlse is None else x.dlse.double()
    state = reference.prepare(q, kv[0].shape, out, dout, lse, dlse, params=params)
    dkv = torch.zeros_like(kv)
    for table in case.tables:
        reference.backward(state, q, kv[0], kv[1], dout, dkv[0], dkv[1], on_device(table, device), params=params)
    dq, dsinks = reference.finish(state, params=params)
    return dq, dkv.movedim(2, 1).flatten(2, 3), dsinks


def relative(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-20)
    return float(error) if bool(torch.isfinite(error)) else math.inf


def run(case: Case, device: torch.device, **around: Any) -> tuple[str, bool]:
    """What came out, and whether that is right. around: instead of functions of `backward_launch`."""
    prepare, backward, finish = (
        around.get(name, getattr(backward_launch, name)) for name in ("prepare", "backward", "finish")
    )
    x = inputs_of(case, device)
    batch, (_, kv_heads), dim = case.batch, case.heads, case.dim
    params = Params(dim**-0.5, case.softcap, x.slopes, x.sinks, deterministic=case.deterministic)
    results = []
    for _ in range(case.repeat):
        sums = torch.zeros(2, batch, x.pieces * x.length, kv_heads, dim, device=device)
        sums[:, ~x.keys] = 7.0
        if case.final:
            assert len(case.tables) == 1, "the whole backward of its keys"
            sums = torch.full_like(sums, torch.nan, dtype=case.dtype)
        dkv = sums.unflatten(2, (x.pieces, x.length)).movedim(2, 1)
        counters = torch.zeros(x.pieces, dtype=torch.int32, device=device) if case.departures else None
        targets = [0] * x.pieces
        state = prepare(x.q, x.out, x.dout, x.lse, x.dlse)
        for table in case.tables:
            on = on_device(table, device)
            backward(
                state, x.q, x.kv[0], x.kv[1], x.dout, dkv[0], dkv[1], on, params=params, departures=counters,
                settings=case.settings,
            )  # fmt: skip
            added = departures_of(table, x.pieces, batch, kv_heads)
            targets = [a + b for a, b in zip(targets, added, strict=True)]
        dq, dsinks = finish(state, params=params)
        if device.type == "cuda":
            torch.cuda.synchronize()
        results.append((dq, sums))
    if case.departures and counters is not None and counters.tolist() != targets:
        return f"departures {counters.tolist()}, not {targets}", False
    if not bool((sums[:, ~x.keys] == (0.0 if case.final else 7.0)).all()):
        return "keys outside every segment " + ("are not 0" if case.final else "were written"), False
    if case.deterministic and not all(
        torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True)
    ):
        return "not the same bits twice", False
    want_q, want_kv, want_sinks = wanted(case, x, params, device)
    parts = {"dq": (dq[x.rows], want_q[x.rows])}
    parts |= {name: (sums[n][x.keys], want_kv[n][x.keys]) for n, name in enumerate(("dk", "dv"))}
    if dsinks is not None and want_sinks is not None:
        parts["dsinks"] = (dsinks, want_sinks)
    errors = {name: relative(*pair) for name, pair in parts.items() if pair[1].numel() and pair[1].norm() > 0}
    fine = all(error < LIMITS[case.dtype] for error in errors.values())
    message = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not fine:
        for name, (got, want) in parts.items():
            wrong = ~((got.double() - want).abs().flatten(1 if got.dim() > 1 else 0).amax(-1) < 0.05)
            message += f"; {name}: wrong rows {int(wrong.sum())} of {wrong.numel()}, first"
            message += f" {wrong.nonzero()[:6].flatten().tolist()}"
    return message, fine


def plans(dim: int) -> Iterator[Case]:
    problems = (
        ("contiguous", 1, None, 0, 1024),
        ("contiguous", 1, 200, 100, 1024),
        ("contiguous", 2, None, None, 1000),
        ("zigzag", 4, None, 0, 1024),
        ("zigzag", 2, 150, 0, 900),
        ("stripe", 4, None, 0, 1024),
        ("stripe", 2, 200, 0, 1024),
    )
    for layout, world, left, right, total in problems:
        for schedule in ("gather", "ring"):
            problem = Problem(1024, 1024, total, total, left, right, layout, world)
            plan = make_plan(problem, world - 1, schedule)
            tables = [step.backward for step in plan.steps if len(step.backward)]
            yield Case(f"{layout} x{world} {left},{right} of {total} {schedule} D{dim}", tables, 1024 // world, dim=dim,
                       piece_length=getattr(plan, "piece_length", 0), heads=(4, 2))  # fmt: skip
    cu = [0, 3, 200, 201, 500, 640, 1000]
    for world, layout in ((2, "zigzag"), (1, "contiguous")):
        packed = PackedProblem.of(cu, cu, left=None, right=0, layout=layout, world_size=world)
        plan = make_plan(packed, world - 1, "gather")
        tables = [step.backward for step in plan.steps if len(step.backward)]
        yield Case(f"packed x{world} D{dim}", tables, 1000 // world, dim=dim, heads=(4, 2),
                   piece_length=getattr(plan, "piece_length", 0))  # fmt: skip


def random_case(seed: int, dim: int, **more: Any) -> Case:
    """Strips of keys, each with some segments of queries, beginning anywhere."""
    rng = np.random.default_rng(seed)
    strips, q_len, used = [], int(rng.integers(40, 400)), dict[int, int]()
    for _ in range(rng.integers(1, 4)):
        piece, k_len = int(rng.integers(0, 3)), int(rng.integers(1, 300))
        k_start = used.get(piece, int(rng.integers(0, 30)))
        used[piece] = k_start + k_len + int(rng.integers(0, 20))
        strip = []
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(0, q_len))
            rows = int(rng.integers(1, q_len - start + 1))
            low, high = sorted(int(rng.integers(-rows, k_len + 1)) for _ in range(2))
            strip.append(Segment(start, rows, piece, k_start, k_len, low, high, 0, 0, 1, -1, 0))
        strips.append(strip)
    heads = ((2, 1), (1, 1), (4, 2), (6, 1))[seed % 4]
    return Case(
        f"random {seed} D{dim}", [table_of(*strips)], q_len, heads=heads, dim=dim, batch=1 + seed % 2,
        dlse=seed % 3 == 0, **more,
    )  # fmt: skip


def chunks(dim: int, **more: Any) -> Case:
    """Four steps, each over a quarter of the keys, causal, the last keys first."""
    parts = [table_of([Segment(0, 1000, n, 0, 250, -1000, -250 * n, 0, 250 * n, 1, -1, 3)]) for n in (3, 2, 1, 0)]
    return Case(f"four steps D{dim}", parts, 1000, dim=dim, **{"batch": 2, "heads": (4, 2), **more})


def own_batches(dim: int) -> Case:
    table = table_of(
        [Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, 0, 3)],
        [Segment(50, 100, 0, 0, 77, -100, 5, 0, 0, 1, 1, 3)],
        [Segment(0, 60, 1, 0, 90, -100, 90, 0, 0, 1, -1, 3)],
    )
    return Case(f"batch entries of their own D{dim}", [table], 256, dim=dim, batch=2)


def simple(dim: int, **more: Any) -> Iterator[Case]:
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
        yield Case(label, [one(q_len, k_len, causal=causal, offset=offset)], q_len, dim=dim, **more)


def device_table(case: Case, device: torch.device) -> DeviceTable:
    return on_device(case.tables[0], device)
