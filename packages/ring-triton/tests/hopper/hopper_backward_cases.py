"""Cases of the Hopper backward for a GPU, each against dense fp64, and the guard against those that hang."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from hopper_plans import PROBED, table_of
from torch import Tensor

from ring_core.backend import Params, on_device
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.segment import Segment, Table
from ring_triton.hopper import backward_launch as hopper
from ring_triton.hopper.backward_settings import BackwardSettings

DEVICE = torch.device("cuda", 0)
PATIENCE = 30
failures: list[str] = []
current = ["start", time.monotonic()]


def watch() -> None:
    """Ends the process when a case hangs: a kernel that waits for ever cannot be interrupted."""

    def loop() -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - float(current[1]) > PATIENCE:
                print(f"HANG in {current[0]}", flush=True)
                os._exit(3)

    threading.Thread(target=loop, daemon=True).start()


def begin(name: str) -> None:
    current[:] = [name, time.monotonic()]


def one(q_len: int, k_len: int, *, causal: bool = False, offset: int = 0) -> Table:
    """One segment; with causal, query i sees keys up to i + offset."""
    return table_of([Segment(0, q_len, 0, 0, k_len, -q_len, offset if causal else k_len, 0, 0, 1, -1, 3)])


@dataclass
class Case:
    name: str
    tables: list[Table]
    q_len: int
    heads: tuple[int, int] = (4, 2)
    dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    settings: BackwardSettings | None = None
    piece_length: int = 0
    deterministic: bool = False
    repeat: int = 1
    dlse: bool = False
    departures: bool = False
    scale: float = 0.0
    final: bool = False  # dk, dv in the inputs' dtype, written


def multiplicity(tables: list[Table], q_len: int, pieces: int, length: int, batch: int) -> Tensor:
    """(B, Sq, C * S) fp64: in how many segments each pair is visible."""
    count = torch.zeros(batch, q_len, pieces * length, device=DEVICE, dtype=torch.float64)
    for table in tables:
        for s in table.segments:
            i, j = torch.arange(s.q_len, device=DEVICE)[:, None], torch.arange(s.k_len, device=DEVICE)[None, :]
            seen = ((s.lower <= j - i) & (j - i <= s.upper)).double()
            k0 = s.piece * length + s.k_start
            entries = slice(None) if s.batch < 0 else slice(s.batch, s.batch + 1)
            count[entries, s.q_start : s.q_start + s.q_len, k0 : k0 + s.k_len] += seen
    return count


def relative(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-20)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def run(case: Case) -> str:
    """What is wrong, or ""."""
    torch.manual_seed(1)
    segments = [s for t in case.tables for s in t.segments]
    pieces = 1 + max((s.piece for s in segments), default=0)
    length = max(case.piece_length, max((s.k_start + s.k_len for s in segments), default=1))
    batch, (hq, hkv), dim, dtype = case.batch, case.heads, case.dim, case.dtype
    scale = case.scale or dim**-0.5
    q, dout = (torch.randn(batch, case.q_len, hq, dim, device=DEVICE, dtype=dtype) for _ in range(2))
    memory = torch.randn(batch, pieces * length, 2, hkv, dim, device=DEVICE, dtype=dtype)
    count = multiplicity(case.tables, case.q_len, pieces, length, batch)
    # dense, fp64
    wq, wdo = (x.double().transpose(1, 2) for x in (q, dout))
    wk, wv = (memory[:, :, n].double().transpose(1, 2).repeat_interleave(hq // hkv, dim=1) for n in range(2))
    m = count[:, None]
    s = (wq @ wk.transpose(2, 3) * scale).masked_fill(m == 0, -torch.inf)
    lse = (s.exp() * m).sum(-1).log()
    p = (s - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()
    out = ((p * m) @ wv).to(dtype)
    dlse = torch.randn(batch, hq, case.q_len, device=DEVICE) if case.dlse else None
    delta = (out.double() * wdo).sum(-1) - (0 if dlse is None else dlse.double())
    ds = p * (wdo @ wv.transpose(2, 3) - delta[..., None])
    part = lambda x: x.unflatten(1, (hkv, hq // hkv)).sum(2).transpose(1, 2)  # noqa: E731  (B, C * S, Hkv, D)
    back = lambda x: x.to(dtype).double()  # noqa: E731
    exact = [
        ((ds * m) @ wk * scale).transpose(1, 2),
        part((ds * m).transpose(2, 3) @ wq * scale),
        part((p * m).transpose(2, 3) @ wdo),
    ]
    rounded = [
        back(((back(ds) * m) @ wk * scale).transpose(1, 2)),
        part((back(ds) * m).transpose(2, 3) @ wq * scale),
        part((back(p) * m).transpose(2, 3) @ wdo),
    ]
    if case.final:
        assert len(case.tables) == 1, "the whole backward of its keys"
        rounded[1:] = [back(x) for x in rounded[1:]]
    # rows that no segment names hold what they like
    rows = torch.zeros(batch, case.q_len, dtype=torch.bool, device=DEVICE)
    keys = torch.zeros(batch, pieces * length, dtype=torch.bool, device=DEVICE)
    for g in segments:
        entries = slice(None) if g.batch < 0 else slice(g.batch, g.batch + 1)
        rows[entries, g.q_start : g.q_start + g.q_len] = True
        keys[entries, g.piece * length + g.k_start : g.piece * length + g.k_start + g.k_len] = True
    out = out.transpose(1, 2).contiguous()
    lse = lse.float()
    for x in (q, dout, out):
        x[~rows] = torch.nan
    memory[~keys] = torch.nan
    lse.transpose(1, 2)[~rows] = torch.nan if dim % 16 else -1e4
    if dlse is not None:
        dlse.transpose(1, 2)[~rows] = torch.nan
    kv = memory.unflatten(1, (pieces, length)).movedim((3, 1), (0, 1))  # (2, C, B, S, H, D)
    params = Params(scale, deterministic=case.deterministic)
    results = []
    for _ in range(case.repeat):
        sums = torch.zeros(2, batch, pieces * length, hkv, dim, device=DEVICE)
        sums[:, ~keys] = 7.0
        if case.final:
            sums = torch.full_like(sums, torch.nan, dtype=dtype)
        dkv = sums.unflatten(2, (pieces, length)).movedim(2, 1)  # (2, C, B, S, H, D)
        counters = torch.zeros(pieces, dtype=torch.int32, device=DEVICE) if case.departures else None
        state = hopper.prepare(q, out, dout, lse, dlse, deterministic=case.deterministic)
        wanted = [0] * pieces
        for table in case.tables:
            on = on_device(table, DEVICE)
            hopper.backward(
                state, q, kv[0], kv[1], dout, dkv[0], dkv[1], on, params=params, departures=counters,
                settings=case.settings,
            )  # fmt: skip
            if counters is not None:
                wanted = [a + b for a, b in zip(wanted, hopper.departure_targets(on, batch, hkv, pieces), strict=True)]
        dq, _ = hopper.finish(state, params=params)
        torch.cuda.synchronize()
        if counters is not None and counters.tolist() != wanted:
            return f"departures {counters.tolist()}, not {wanted}"
        if not bool((sums[:, ~keys] == (0.0 if case.final else 7.0)).all()):
            return "keys outside every segment " + ("are not 0" if case.final else "were written")
        results.append((dq, sums))
    if case.deterministic and not all(
        torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True)
    ):
        return "not the same bits twice"
    dq, sums = results[0]
    got = [dq[rows], sums[0][keys], sums[1][keys]]
    base = [r[n] for r, n in zip(rounded, (rows, keys, keys), strict=True)]
    want = [r[n] for r, n in zip(exact, (rows, keys, keys), strict=True)]
    if not want[0].numel() or not want[1].numel():
        return ""
    errors = [relative(x, w) for x, w in zip(got, want, strict=True)]
    floor = [max(relative(x, w), 3e-4) for x, w in zip(base, want, strict=True)]
    ratios = [e / f for e, f in zip(errors, floor, strict=True)]
    worst[0] = max(worst[0], *ratios)
    text = " ".join(f"{n} {e:.1e} ({r:.2f}x)" for n, e, r in zip(("dq", "dk", "dv"), errors, ratios, strict=True))
    return text if max(ratios) > 1.6 else ""


worst = [0.0]


def gpu_is_dead() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def check(case: Case) -> bool:
    """Runs a case; False if nothing can run after it."""
    begin(case.name)
    try:
        wrong = run(case)
    except Exception as error:  # a probe goes on to the next case, and says what happened
        wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if not gpu_is_dead():
            wrong += "\n" + traceback.format_exc(limit=-3)
    if wrong:
        failures.append(case.name)
        print(f"     {case.name}: {wrong}", flush=True)
    return not wrong or not gpu_is_dead()


def plans(dim: int) -> Iterator[Case]:
    for layout, world, left, right, total in (*PROBED, ("stripe", 2, 200, 0, 1024)):
        for schedule in ("gather", "ring"):
            problem = Problem(1024, 1024, total, total, left, right, layout, world)  # type: ignore[arg-type]
            plan = make_plan(problem, world - 1, schedule)  # type: ignore[arg-type]
            tables = [step.backward for step in plan.steps if len(step.backward)]
            yield Case(f"{layout} x{world} {left},{right} of {total} {schedule} D{dim}", tables, 1024 // world, dim=dim,
                       piece_length=getattr(plan, "piece_length", 0))  # fmt: skip
    cu = [0, 3, 200, 201, 500, 640, 1000]
    for world, layout in ((2, "zigzag"), (1, "contiguous")):
        packed = PackedProblem.of(cu, cu, left=None, right=0, layout=layout, world_size=world)  # type: ignore[arg-type]
        plan = make_plan(packed, world - 1, "gather")
        tables = [step.backward for step in plan.steps if len(step.backward)]
        yield Case(f"packed x{world} D{dim}", tables, 1000 // world, dim=dim,
                   piece_length=getattr(plan, "piece_length", 0))  # fmt: skip


def random_table(rng: np.random.Generator) -> tuple[Table, int]:
    """Key-major: strips of keys, each with some segments of queries, beginning anywhere."""
    strips, q_len, used = [], int(rng.integers(40, 700)), {}
    for _ in range(rng.integers(1, 5)):
        piece, k_len = int(rng.integers(0, 3)), int(rng.integers(1, 400))
        k_start = used.get(piece, int(rng.integers(0, 30)))
        used[piece] = k_start + k_len + int(rng.integers(0, 20))
        strip = []
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(0, q_len))
            rows = int(rng.integers(1, q_len - start + 1))
            low, high = sorted(int(rng.integers(-rows, k_len + 1)) for _ in range(2))
            strip.append(Segment(start, rows, piece, k_start, k_len, low, high, 0, 0, 1, -1, 0))
        strips.append(strip)
    return table_of(*strips), q_len


def randoms(dim: int, seeds: range, **more: object) -> Iterator[Case]:
    for seed in seeds:
        rng = np.random.default_rng(seed)
        table, q_len = random_table(rng)
        heads = ((4, 2), (3, 3), (6, 1), (4, 4))[seed % 4]
        if len(seeds) < 12:
            heads = ((4, 2), (6, 1))[seed % 2]  # one kernel to compile: that of split groups
        yield Case(f"random {seed} D{dim}", [table], q_len, heads=heads, dim=dim, batch=1 + seed % 2,
                   dlse=seed % 3 == 0, **more)  # type: ignore[arg-type]  # fmt: skip


def simple(dim: int, **more: object) -> Iterator[Case]:
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
        yield Case(label, [one(q_len, k_len, causal=causal, offset=offset)], q_len, dim=dim, **more)  # type: ignore[arg-type]


def chunks(dim: int, **more: object) -> Case:
    parts = [
        table_of([Segment(0, 1000, n, 0, 250, -1000, -250 * n, 0, 250 * n, 1, -1, 3)]) for n in (3, 2, 1, 0)
    ]  # keys up to the query's own place
    return Case(f"four steps D{dim}", parts, 1000, dim=dim, batch=2, **more)  # type: ignore[arg-type]


def odd() -> dict[str, Case]:
    """What tells causes apart where whole tiles are right: each runs in a process of its own."""
    return {
        "queries end in a block": Case("100x128 full", [one(100, 128)], 100),
        "keys end in a tile": Case("128x100 full", [one(128, 100)], 128),
        "rows not 16-byte aligned": Case(
            "64 rows from 1, 2, 3",
            [table_of([Segment(n, 64, 0, 0, 128, -64, 128, 0, 0, 1, -1, 3)]) for n in (1, 2, 3)],
            68,
        ),
        "a walk begins inside": Case("300x333 causal 33", [one(300, 333, causal=True, offset=33)], 300),
        "one block of few": Case("5x700 full", [one(5, 700)], 5),
    }


def own_batches(dim: int) -> Case:
    table = table_of(
        [Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, 0, 3)],
        [Segment(50, 100, 0, 0, 77, -100, 5, 0, 0, 1, 1, 3)],
        [Segment(0, 60, 1, 0, 90, -100, 90, 0, 0, 1, -1, 3)],
    )
    return Case(f"batch entries of their own D{dim}", [table], 256, dim=dim, batch=2)
