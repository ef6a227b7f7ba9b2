"""The Hopper backward on a GPU: right against dense fp64, its departure counters, then its speed beside cuDNN and FA2.

    PYTHONPATH=packages/ring-core/src:packages/ring-triton/src \
        python packages/ring-triton/tests/hopper/gpu_probe_backward.py correct departures speed variants

`correct` deals its groups of cases out to processes, since most of its time is compilation; `others` is the same for
settings that are not shipped. A line for each failing case, a verdict for each group. What a GPU does after an error
says nothing, so that the first one ends its process. Exit status 1 if a check failed; a case that hangs ends its
process after 30 s, and processes that are not done in time are ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_core.backend import Params, on_device
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.segment import Segment, Table
from ring_triton.hopper import backward_launch as hopper
from ring_triton.hopper.backward_settings import BackwardSettings, backward_settings_for

DEVICE = torch.device("cuda", 0)
PATIENCE = 30
LIMIT = 43
"""Seconds that `correct` and `others` may take."""
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


def table_of(*strips: list[Segment]) -> Table:
    rows = [segment for strip in strips for segment in strip]
    groups = np.cumsum([0] + [len(strip) for strip in strips])
    return Table(np.array(rows, dtype=np.int32).reshape(-1, 12), groups.astype(np.int32))


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
        if not bool((sums[:, ~keys] == 7.0).all()):
            return "keys outside every segment were written"
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
    for layout, world, left, right, total in (
        ("contiguous", 1, None, 0, 1024),
        ("contiguous", 1, 200, 100, 1024),
        ("contiguous", 2, None, None, 1000),
        ("zigzag", 4, None, 0, 1024),
        ("zigzag", 2, 150, 0, 900),
        ("stripe", 4, None, 0, 1024),
        ("stripe", 2, 200, 0, 1024),
    ):
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


def tried(dim: int) -> dict[str, BackwardSettings]:
    """The settings to compare."""
    base = backward_settings_for(dim)
    if dim > 64:
        return {
            "order 1": base,
            "order 1, 4+2": replace(base, q_stages=4),
            "order 0": replace(base, order=0),
            "order 2": replace(base, order=2, q_stages=2),
            "order 2, packed": replace(base, order=2, q_stages=2, packed=True),
            "order 1, rows": replace(base, swap=False),
            "order 1, by piece": replace(base, by_piece=True),
        }
    narrow = replace(base, block=64, order=0, packed=False)
    wide = replace(base, block=128, order=2, packed=True, q_stages=2)
    return {
        "64, order 0": narrow,
        "64, order 1": replace(narrow, order=1),
        "64, order 2": replace(narrow, order=2),
        "128, order 2, packed": wide,
        "128, order 2": replace(wide, packed=False),
        "64, order 0, rows": replace(narrow, swap=False),
    }


Groups = dict[str, Callable[[], Iterator[Case]]]


def groups() -> Groups:
    """Of `correct`: the settings that calls get. Those that take longest first."""
    made: Groups = {
        "128": lambda: iter([*simple(128), *plans(128), *randoms(128, range(12)), chunks(128), own_batches(128)]),
        "64": lambda: iter([*simple(64), *plans(64), *randoms(64, range(12)), chunks(64), own_batches(64)]),
        "padded": lambda: iter([c for d in (8, 40, 96) for c in (*simple(d), *randoms(d, range(3)), chunks(d))]),
        "fp16": lambda: iter(
            [*simple(128, dtype=torch.float16), *randoms(64, range(4), dtype=torch.float16)]
        ),
        "128 ordered": lambda: iter(
            [*simple(128, deterministic=True, repeat=2), *randoms(128, range(6), deterministic=True, repeat=2),
             chunks(128, deterministic=True, repeat=2)]
        ),
        "64 ordered": lambda: iter([*simple(64, deterministic=True, repeat=2), chunks(64, deterministic=True)]),
        "departures": lambda: iter([*simple(128, departures=True), chunks(128, departures=True)]),
        "scale": lambda: iter([*simple(128, scale=0.5), *simple(128, scale=-0.05)]),
    }  # fmt: skip
    made.update({f"odd: {name}": lambda case=case: iter([case]) for name, case in odd().items()})  # type: ignore[misc]
    return made


def other_groups() -> Groups:
    """Of `others`."""
    made: Groups = {}
    for dim in (128, 64):
        for name, chosen in list(tried(dim).items())[1:]:
            made[f"{dim}: {name}"] = lambda dim=dim, chosen=chosen: iter(  # type: ignore[misc]
                [*simple(dim, settings=chosen), *randoms(dim, range(4), settings=chosen), chunks(dim, settings=chosen)]
            )
    return made


def group(name: str) -> None:
    number, stopped = 0, ""
    for case in {**groups(), **other_groups()}[name]():
        number += 1
        if not check(case):
            stopped = f", stopped at {case.name!r}: the GPU is in error"
            break
    first = f", first {failures[0]!r}" if failures and not stopped else ""
    print(f"{'FAIL' if failures else 'ok  '} {name}: {len(failures)} of {number} cases failed{first}{stopped}; "
          f"worst error {worst[0]:.2f} x that of rounding P and dS", flush=True)  # fmt: skip
    sys.stdout.flush()
    os._exit(bool(failures))  # nothing of a GPU in error can be cleaned up


def in_processes(names: list[str]) -> None:
    end, running = time.monotonic() + LIMIT, []
    for name in names:
        while sum(p.poll() is None for _, p in running) >= 16:
            time.sleep(0.1)
        running.append((name, subprocess.Popen([sys.executable, __file__, "group", name])))
    for name, process in running:
        try:
            if process.wait(max(0.1, end - time.monotonic())):
                failures.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
            failures.append(name)
            print(f"LATE {name}: not done after {LIMIT} s", flush=True)


def correct() -> None:
    in_processes(list(groups()))


def others() -> None:
    in_processes(list(other_groups()))


def departures() -> None:
    """Each piece's dk, dv as they are when its counter is full, taken by another stream, against the final ones."""
    begin("departures")
    pieces, length, q_len, heads, dim = 4, 1024, 4096, (16, 4), 128
    torch.manual_seed(0)
    strips = [[Segment(0, q_len, c, 0, length, -q_len, length, 0, 0, 1, -1, 3)] for c in range(pieces)]
    table = on_device(table_of(*strips), DEVICE)
    q, dout, out = (torch.randn(1, q_len, heads[0], dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    kv = torch.randn(2, pieces, 1, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
    lse = torch.full((1, heads[0], q_len), 8.0, device=DEVICE)
    targets = hopper.departure_targets(table, 1, heads[1], pieces)
    params = Params(dim**-0.5)
    side = torch.cuda.Stream()
    for attempt in range(3):
        dkv = torch.zeros(2, pieces, 1, length, heads[1], dim, device=DEVICE)
        counters = torch.zeros(pieces, dtype=torch.int32, device=DEVICE)
        copies = torch.empty_like(dkv)
        state = hopper.prepare(q, out, dout, lse, None)
        torch.cuda.synchronize()
        hopper.backward(state, q, kv[0], kv[1], dout, dkv[0], dkv[1], table, params=params, departures=counters)
        early = 0
        seen = torch.zeros(pieces, dtype=torch.int32).pin_memory()
        left, end = set(range(pieces)), time.monotonic() + 20
        while left and time.monotonic() < end:
            with torch.cuda.stream(side):
                seen.copy_(counters, non_blocking=True)
                side.synchronize()
                for c in [c for c in left if int(seen[c]) >= targets[c]]:
                    copies[:, c].copy_(dkv[:, c], non_blocking=True)
                    early += len(left) > 1
                    left.remove(c)
        torch.cuda.synchronize()
        fine = not left and torch.equal(copies, dkv)
        print(f"{'ok  ' if fine else 'FAIL'} departures {attempt}: {early} pieces taken while others were computed, "
              f"counters {counters.tolist()} of {targets}", flush=True)  # fmt: skip
        if not fine:
            failures.append("departures")


def flags() -> None:
    """Pieces of NaN until the copy engine brings them, late; the result equals that of all present (ordered dq)."""
    from ring_core.backend import Flags

    begin("flags")
    pieces, length, q_len, heads, dim = 4, 512, 1024, (8, 4), 128
    strips = [[Segment(0, q_len, c, 0, length, -q_len, length, 0, 0, 1, -1, 3)] for c in range(pieces)]
    table = on_device(table_of(*strips), DEVICE)
    torch.manual_seed(0)
    q, dout, out = (torch.randn(1, q_len, heads[0], dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    there = torch.randn(pieces, length, 2, heads[1], dim, dtype=torch.bfloat16).pin_memory()
    memory = there.to(DEVICE)
    kv = memory[:, None].movedim(3, 0)
    lse = torch.full((1, heads[0], q_len), 7.0, device=DEVICE)
    params = Params(dim**-0.5)
    ones = torch.full((1,), 7, dtype=torch.int32).pin_memory()
    epoch = torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    arrived = torch.full((pieces,), 7, dtype=torch.int32, device=DEVICE)
    side = torch.cuda.Stream()

    def go() -> Tensor:
        dkv = torch.zeros(2, pieces, 1, length, heads[1], dim, device=DEVICE)
        state = hopper.prepare(q, out, dout, lse, None)
        torch.cuda.synchronize()
        hopper.backward(state, q, kv[0], kv[1], dout, dkv[0], dkv[1], table, params=params, flags=Flags(arrived, epoch))
        return dkv

    want = go()
    torch.cuda.synchronize()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        memory.fill_(torch.nan)
        arrived.zero_()
        torch.cuda.synchronize()
        got = go()
        with torch.cuda.stream(side):
            for piece in order:
                time.sleep(0.02)
                memory[piece].copy_(there[piece], non_blocking=True)
                arrived[piece : piece + 1].copy_(ones, non_blocking=True)
        torch.cuda.synchronize()
        fine = torch.equal(got, want)
        print(f"{'ok  ' if fine else 'FAIL'} pieces arriving in order {order}: dk, dv bitwise equal {fine}", flush=True)
        if not fine:
            failures.append(f"flags {order}")


class Call:
    """Randn inputs in bf16 and the ways to go backward through them."""

    def __init__(self, batch: int, length: int, heads: tuple[int, int], dim: int, causal: bool) -> None:
        self.table = on_device(one(length, length, causal=causal), DEVICE)
        self.causal, self.params = causal, Params(dim**-0.5)
        shape = (batch, length, heads[0], dim)
        self.q, self.dout = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.kv = torch.randn(2, 1, batch, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
        self.dkv = torch.zeros(self.kv.shape, device=DEVICE)
        self.group = heads[0] // heads[1]
        self.flops = 10.0 * batch * heads[0] * length * length * dim * (0.5 if causal else 1.0)
        self.leaves = [self.q.transpose(1, 2).detach().requires_grad_()]
        self.leaves += [
            x[0].repeat_interleave(self.group, dim=2).transpose(1, 2).detach().requires_grad_() for x in self.kv
        ]
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = torch.ops.aten._scaled_dot_product_flash_attention(*self.leaves, 0.0, causal)
        self.out, self.lse = flash[0].transpose(1, 2).contiguous(), flash[1].float()
        self.state = hopper.prepare(self.q, self.out, self.dout, self.lse, None)

    def main(self, settings: BackwardSettings | None = None) -> Callable[[], None]:
        arguments = (self.state, self.q, self.kv[0], self.kv[1], self.dout, self.dkv[0], self.dkv[1], self.table)
        return lambda: hopper.backward(*arguments, params=self.params, settings=settings)

    def whole(self, deterministic: bool = False) -> Callable[[], None]:
        params = replace(self.params, deterministic=deterministic)

        def go() -> None:
            state = hopper.prepare(self.q, self.out, self.dout, self.lse, None, deterministic=deterministic)
            hopper.backward(state, self.q, self.kv[0], self.kv[1], self.dout, self.dkv[0], self.dkv[1], self.table,
                            params=params)  # fmt: skip
            hopper.finish(state, params=params)

        return go

    def torch(self, backend: SDPBackend) -> Callable[[], None]:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*self.leaves, is_causal=self.causal)
        grad = self.dout.transpose(1, 2)

        def go() -> None:
            torch.autograd.grad(out, self.leaves, grad, retain_graph=True)

        return go


def compare(fns: dict[str, Callable[[], None]], flops: float, rounds: int = 3) -> dict[str, float]:
    """TFLOP/s of each, the best of interleaved rounds of about 12 ms."""
    number = {}
    for name, fn in fns.items():
        begin(name)
        fn()
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        number[name] = max(1, min(20, int(0.012 / (time.perf_counter() - start))))
    best = dict.fromkeys(fns, float("inf"))
    for _ in range(rounds):
        for name, fn in fns.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(number[name]):
                fn()
            b.record()
            b.synchronize()
            best[name] = min(best[name], a.elapsed_time(b) / number[name])
    return {name: flops / t / 1e9 for name, t in best.items()}


CELLS = [(max(1, 16384 // s), s, h, 128) for s in (4096, 8192, 16384, 32768) for h in ((16, 16), (32, 8))]
CELLS += [(4, 4096, (32, 32), 64), (1, 16384, (32, 32), 64)]


def speed() -> None:
    ratios: dict[int, list[float]] = {64: [], 128: []}
    for batch, length, heads, dim in CELLS:
        for causal in (True, False):
            call = Call(batch, length, heads, dim, causal)
            fns = {"main": call.main(), "whole": call.whole()}
            fns["cudnn"] = call.torch(SDPBackend.CUDNN_ATTENTION)
            fns["fa2"] = call.torch(SDPBackend.FLASH_ATTENTION)
            if length == 8192 or dim == 64:
                fns["ordered"] = call.whole(True)
            got = compare(fns, call.flops)
            ratios[dim].append(got["whole"] / got["cudnn"])
            print(f"B{batch} S{length} H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full':6}: "
                  + " ".join(f"{name} {x:.0f}" for name, x in got.items()) + f"  whole/cudnn {ratios[dim][-1]:.3f}",
                  flush=True)  # fmt: skip
            del call, fns
    for dim, found in ratios.items():
        print(f"D{dim}: whole/cudnn mean {sum(found) / len(found):.3f}, worst {min(found):.3f}", flush=True)


def warm(dim: str, name: str) -> None:
    """Compiles one variant into the cache."""
    call = Call(1, 256, (16, 16) if dim == "128" else (32, 32), int(dim), True)
    call.main(tried(int(dim))[name])()
    torch.cuda.synchronize()


def variants() -> None:
    """Settings beside each other."""
    work = [(str(dim), name) for dim in (128, 64) for name in tried(dim)]
    for process in [subprocess.Popen([sys.executable, __file__, "warm", *w]) for w in work]:
        process.wait()
    for batch, length, heads, dim in (
        (4, 4096, (16, 16), 128),
        (1, 16384, (16, 16), 128),
        (4, 4096, (32, 32), 64),
        (1, 16384, (32, 32), 64),
    ):
        for causal in (True, False):
            call = Call(batch, length, heads, dim, causal)
            fns = {name: call.main(chosen) for name, chosen in tried(dim).items()}
            fns["cudnn"] = call.torch(SDPBackend.CUDNN_ATTENTION)
            got = compare(fns, call.flops)
            print(f"B{batch} S{length} D{dim} {'causal' if causal else 'full':6}: "
                  + "; ".join(f"{name} {x:.0f}" for name, x in got.items()), flush=True)  # fmt: skip


def main() -> int:
    watch()
    arguments = sys.argv[1:] or ["correct", "departures", "flags", "variants", "speed"]
    if arguments[0] == "group":
        group(arguments[1])
        return bool(failures)
    if arguments[0] == "warm":
        warm(*arguments[1:])
        return 0
    sections = {f.__name__: f for f in (correct, others, departures, flags, variants, speed)}
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    for name in arguments:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        begin(name)
        current[1] = time.monotonic() + (600 if name in ("correct", "others", "variants") else 0)
        try:
            sections[name]()
        except Exception:  # the next section may still tell something
            failures.append(name)
            traceback.print_exc(limit=-4)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(failures)} failures: {failures}" if failures else "all checks passed", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
