"""The forward on a GPU, in one go: right against the contract's reference in fp64, then speed beside cuDNN.

    python packages/ring-cute/tests/gpu_probe.py compile            # where the DSL is: fills RING_CUTE_CACHE
    python packages/ring-cute/tests/gpu_probe.py [SECTION…]     # on the GPU: torch, numpy, apache-tvm-ffi, the cache

Sections: smoke, correct, flags, speed, variants, locality, steps, host, clocks (all if none but EXTRA);
"only=WORD" picks the cases of `correct` that WORD is part of. Each case is named before it is launched. Exit status 1
if a check failed; a kernel that does not end in HANG seconds ends the probe there with 2, since nothing more can run
beside it. Where ring-triton is importable, its Hopper forward is timed as well.
"""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import util
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_core.backend import Flags, Params, on_device
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.segment import COLUMNS, FIRST, LAST, Segment, Table
from ring_cute.hopper import launch as launching
from ring_cute.hopper.launch import forward, supports
from ring_cute.settings import ForwardKind, Settings, kind_for, settings_for

DEVICE = torch.device("cuda", 0)
SENTINEL = 12345.0
HANG, SLOW = 10.0, 60.0
EXTRA = ("variants", "locality", "clocks")
failures: list[str] = []
only = ""

TRIED: dict[int, list[dict[str, Any]]] = {
    128: [
        {},
        {"overlap": True},
        {"block": 176},
        {"cluster": 2},
        {"cluster": 2, "overlap": True},
        {"cluster": 2, "block": 176},
    ],
    64: [{}, {"lazy": False}, {"overlap": True}, {"block": 112}, {"cluster": 2}],
    192: [{}, {"overlap": True}, {"block": 96}, {"cluster": 2}],
    256: [{}, {"overlap": True}, {"block": 64}, {"cluster": 2}],
}
VARIANTS: dict[int, dict[str, Settings]] = {
    dim: {
        ", ".join(f"{name} {value}" for name, value in changed.items()) or "as shipped": replace(
            settings_for(dim), **changed
        )
        for changed in tried
    }
    for dim, tried in TRIED.items()
}


def kinds() -> Iterator[ForwardKind]:
    """Every kernel that the probe launches."""
    for dim in (128, 64, 192, 256):
        yield kind_for("bfloat16", dim)
        yield kind_for("bfloat16", dim, state=True)
        yield kind_for("bfloat16", dim, flags=True)
        yield kind_for("bfloat16", dim, sinks=True)
        yield kind_for("bfloat16", dim, state=True, sinks=True)
        yield kind_for("float16", dim)
        for chosen in VARIANTS[dim].values():
            yield kind_for("bfloat16", dim, chosen)
    yield kind_for("bfloat16", 128, replace(settings_for(128), cache_hints=True), state=True)
    for dim in (96, 40, 160, 200):
        for state in (False, True):
            yield kind_for("bfloat16", dim, state=state)


def compile_all() -> None:
    from ring_cute import library

    for each in dict.fromkeys(kinds()):
        if library.find(each) is None:
            library.build(each)
            print(library.path_of(each), flush=True)


def begin(name: str) -> None:
    """Says what comes next, and arms a timer that tells where the host was if this takes too long, and ends it all."""
    print(f"...  {name}", flush=True)
    faulthandler.dump_traceback_later(SLOW, exit=True)


def finish(name: str) -> None:
    """Waits for the device, but not for ever."""
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + HANG
    while not done.query():
        if time.monotonic() > deadline:
            print(f"HANG {name}: the device is still busy after {HANG:.0f} s; failed before: {failures}", flush=True)
            os._exit(2)  # the interpreter's own end would wait for the device
        time.sleep(1e-4)


def table_of(*strips: list[Segment]) -> Table:
    rows = [segment for strip in strips for segment in strip]
    groups = np.cumsum([0] + [len(strip) for strip in strips])
    return Table(np.array(rows, dtype=np.int32).reshape(-1, len(COLUMNS)), groups.astype(np.int32))


def causal_table(q_len: int, k_len: int, *, causal: bool, flags: int = FIRST | LAST, k_position: int = 0) -> Table:
    """One strip, one segment; query i sees keys up to i - k_position."""
    upper = min(k_len, -k_position) if causal else k_len
    return table_of([Segment(0, q_len, 0, 0, k_len, -q_len, upper, 0, k_position, 1, -1, flags)])


def keys(table: Table, batch: int, heads: int, dim: int, dtype: torch.dtype, length: int = 0) -> Tensor:
    """(2, C, B, S, H, D) with k and v of a token side by side; NaN wherever no segment of the table looks."""
    pieces = 1 + max((s.piece for s in table.segments), default=0)
    length = max(length, max((s.k_start + s.k_len for s in table.segments), default=1))
    used = torch.zeros(pieces, length, dtype=torch.bool)
    for s in table.segments:
        used[s.piece, s.k_start : s.k_start + s.k_len] = True
    x = torch.randn(batch, pieces * length, 2, heads, dim, device=DEVICE, dtype=dtype)
    x[:, ~used.flatten().to(DEVICE)] = torch.nan
    return x.unflatten(1, (pieces, length)).movedim((3, 1), (0, 1))


def covered(tables: list[Table], q_len: int, batch: int) -> Tensor:
    rows = torch.zeros(batch, q_len, dtype=torch.bool)
    for t in tables:
        for s in t.segments:
            rows[slice(None) if s.batch < 0 else s.batch, s.q_start : s.q_start + s.q_len] = True
    return rows.to(DEVICE)


def check(
    name: str,
    tables: list[Table],
    *,
    q_len: int,
    heads: tuple[int, int] = (4, 2),
    dim: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    settings: Settings | None = None,
    piece_length: int = 0,
    with_sinks: bool = False,
    softcap: float = 0.0,
    alibi: bool = False,
) -> None:
    """Runs the tables one after another (accumulating) on this path and on the reference in fp64."""
    if only not in name:
        return
    begin(name)
    start = time.monotonic()
    try:
        torch.manual_seed(0)
        q = torch.randn(batch, q_len, heads[0], dim, device=DEVICE, dtype=dtype)
        rows = covered(tables, q_len, batch)
        q[~rows] = torch.nan
        out = torch.full_like(q, SENTINEL)
        lse = torch.full((batch, heads[0], q_len), SENTINEL, device=DEVICE)
        state = torch.full(q.shape, torch.nan, device=DEVICE) if len(tables) > 1 else None
        sinks = torch.randn(heads[0], device=DEVICE) * 3 if with_sinks else None
        slopes = torch.rand(batch, heads[0], device=DEVICE) / 8 if alibi else None
        exact = (out.double(), lse.double(), None if state is None else state.double())
        for table in tables:
            if not len(table):
                continue
            kv = keys(table, batch, heads[1], dim, dtype, piece_length)
            assert not (why := supports(q, kv[0], kv[1])), why
            on = on_device(table, DEVICE)
            more: dict[str, Any] = {"sinks": sinks, "softcap": softcap}
            forward(q, kv[0], kv[1], out, lse, state, on, scale=dim**-0.5, slopes=slopes, settings=settings, **more)
            finish(name)
            wide = (q.double(), kv[0].double(), kv[1].double())
            ReferenceBackend().forward(*wide, *exact, on, params=Params(dim**-0.5, alibi_slopes=slopes, **more))
        untouched = bool((out[~rows] == SENTINEL).all() and (lse.transpose(1, 2)[~rows] == SENTINEL).all())
        got, want = out[rows].double(), exact[0][rows]
        error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if want.numel() else 0.0
        got_lse, want_lse = lse.transpose(1, 2)[rows].double(), exact[1].transpose(1, 2)[rows]
        same_empty = torch.equal(got_lse == -torch.inf, want_lse == -torch.inf)
        finite = want_lse != -torch.inf
        lse_error = (got_lse - want_lse)[finite].abs().max().item() if finite.any() else 0.0
        zero = bool((got[~finite] == 0).all()) if (~finite).any() else True
        limit = 5e-3 if dtype == torch.bfloat16 else 8e-4
        fine = untouched and same_empty and zero and error < limit and lse_error < 2e-3
        message = f"rel {error:.2e} lse {lse_error:.1e}"
        if not fine:
            wrong = (got - want).abs().amax(-1) > 0.05
            message += f" untouched={untouched} empty rows={same_empty} zero={zero} wrong rows {int(wrong.sum())}"
            message += f" of {wrong.numel()}, first {wrong.nonzero()[:6].tolist()}"
    except Exception:  # a probe goes on to the next case, and says what happened
        fine, message = False, traceback.format_exc(limit=-3)
    print(f"{'ok  ' if fine else 'FAIL'} {name}: {message} ({time.monotonic() - start:.1f} s)", flush=True)
    if not fine:
        failures.append(name)


def plans() -> Iterator[tuple[str, list[Table], int, int]]:
    """(name, the tables of a rank's steps, its queries, piece length)."""
    made: list[tuple[str, Problem | PackedProblem, int]] = [
        (
            f"{layout} x{world} window {left},{right} of {total}",
            Problem(1024, 1024, total, total, left, right, layout, world),
            1024 // world,
        )
        for layout, world, left, right, total in (
            ("contiguous", 1, None, 0, 1024),
            ("contiguous", 1, 200, 100, 1024),
            ("contiguous", 2, None, None, 1000),
            ("zigzag", 4, None, 0, 1024),
            ("zigzag", 2, 150, 0, 900),
            ("stripe", 4, None, 0, 1024),
        )
    ]
    cu = [0, 3, 200, 201, 500, 640, 1000]
    made.append(("packed x2", PackedProblem.of(cu, cu, left=None, right=0, layout="zigzag", world_size=2), 500))
    made.append(("packed x1", PackedProblem.of(cu, cu, left=None, right=0, layout="contiguous", world_size=1), 1000))
    for name, problem, q_len in made:
        for schedule in ("gather", "ring"):
            for rank in {0, problem.world_size - 1}:
                plan = make_plan(problem, rank, schedule)
                tables = [step.forward for step in plan.steps]
                yield f"{name}, {schedule}, rank {rank}", tables, q_len, getattr(plan, "piece_length", 0)


def random_table(seed: int) -> tuple[Table, int]:
    rng = np.random.default_rng(seed)
    strips, q = [], int(rng.integers(0, 20))
    for _ in range(rng.integers(1, 5)):
        q_len, count = int(rng.integers(1, 400)), int(rng.integers(1, 4))
        strip = []
        for n in range(count):
            k_len = int(rng.integers(0, 500))
            low, high = sorted(int(rng.integers(-q_len, k_len + 1)) for _ in range(2))
            flags = (FIRST if n == 0 else 0) | (LAST if n == count - 1 else 0)
            strip.append(Segment(q, q_len, n, int(rng.integers(0, 50)), k_len, low, high, 0, 0, 1, -1, flags))
        strips.append(strip)
        q += q_len + int(rng.integers(0, 30))
    return table_of(*strips), q + 5


def causal_steps(q_len: int, order: tuple[int, ...]) -> list[Table]:
    """Accumulating steps, one over each quarter of the keys, causal."""
    each, ends = q_len // 4, {order[0]: FIRST, order[-1]: LAST}
    return [causal_table(q_len, each, causal=True, k_position=each * n, flags=ends.get(n, 0)) for n in order]


def short_strips() -> list[Table]:
    """Three steps of strips of many lengths, one right after another, that see all, something or nothing in a step."""
    tables = []
    for step in range(3):
        strips, q = [], 0
        for n, q_len in enumerate((1, 63, 64, 65, 127, 128, 129, 100)):
            k_len = (200, 0, 30)[(step + n) % 3]
            flags = (FIRST, 0, LAST)[step]
            strips.append([Segment(q, q_len, 0, 0, k_len, -q_len, k_len - 50 * (n % 2), 0, 0, 1, -1, flags)])
            q += q_len
        tables.append(table_of(*strips))
    return tables


def smoke() -> None:
    """One block, then a few: what to look at first where everything else fails."""
    check("smoke: one block", [causal_table(128, 128, causal=False)], q_len=128, heads=(1, 1))
    check("smoke: two blocks", [causal_table(128, 256, causal=False)], q_len=128, heads=(1, 1))
    check("smoke: seven blocks, two tiles", [causal_table(256, 896, causal=False)], q_len=256, heads=(1, 1))
    check("smoke: half a tile", [causal_table(64, 128, causal=False)], q_len=64, heads=(1, 1))
    check("smoke: few rows", [causal_table(5, 128, causal=False)], q_len=5, heads=(1, 1))


def correct() -> None:
    full, causal = causal_table(512, 512, causal=False), causal_table(512, 512, causal=True)
    for dim, tried in VARIANTS.items():
        for label, chosen in tried.items():
            check(f"full, D {dim}, {label}", [full], q_len=512, dim=dim, settings=chosen)
            check(f"causal, D {dim}, {label}", [causal], q_len=512, dim=dim, settings=chosen)
    check("causal 8192", [causal_table(8192, 8192, causal=True)], q_len=8192, heads=(8, 8))
    for dim in (96, 40, 64, 128, 160, 192, 200, 256):
        check(f"tail, D {dim}", [causal_table(300, 333, causal=True, k_position=-33)], q_len=300, dim=dim)
    for dtype in (torch.float16, torch.bfloat16):
        check(f"batch 3, {dtype}", [causal], q_len=512, batch=3, heads=(6, 2), dtype=dtype)
    check("keys shorter than a block", [causal_table(200, 17, causal=False)], q_len=200)
    check("no key", [causal_table(200, 0, causal=False)], q_len=200)
    own = table_of(
        [Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, 0, FIRST | LAST)],
        [Segment(50, 100, 0, 0, 77, -100, 5, 0, 0, 1, 1, FIRST | LAST)],
    )
    check("batch entries of their own", [own], q_len=256, batch=2)
    check("four accumulating steps", causal_steps(1000, (0, 1, 2, 3)), q_len=1000, batch=2)
    for dim in (
        64,
        96,
        128,
        192,
        200,
        256,
    ):  # rows that see nothing in the first steps; whole tiles, a half and a part of one
        check(f"four steps, last keys first, D {dim}", causal_steps(1000, (3, 2, 1, 0)), q_len=1000, dim=dim)
    check("steps of short strips", short_strips(), q_len=700, heads=(8, 2))
    check("sinks", [causal], q_len=512, with_sinks=True)
    nothing = causal_table(200, 100, causal=True, k_position=150)
    check("sinks, rows that see nothing", [nothing], q_len=200, with_sinks=True)
    for dim in (64, 128):
        steps = causal_steps(1000, (1, 0, 3, 2))
        check(f"sinks, four accumulating steps, D {dim}", steps, q_len=1000, dim=dim, with_sinks=True)
    for name, tables, q_len, length in plans():
        check(name, tables, q_len=q_len, piece_length=length)
    for seed in range(12):
        table, q_len = random_table(seed)
        check(f"random table {seed}", [table], q_len=q_len, batch=1 + seed % 2, dim=(128, 64)[seed % 2])


def flags() -> None:
    """Pieces of NaN until copy engines bring them, late and in every order; the result equals that of all present."""
    pieces, length, q_len, heads, dim = 4, 512, 1024, (16, 4), 128
    strip = [
        Segment(0, q_len, c, 0, length, -q_len, length, 0, 0, 1, -1,
                (FIRST if c == 0 else 0) | (LAST if c == pieces - 1 else 0))
        for c in range(pieces)
    ]  # fmt: skip
    table = on_device(table_of(strip), DEVICE)
    torch.manual_seed(0)
    q = torch.randn(1, q_len, heads[0], dim, device=DEVICE, dtype=torch.bfloat16)
    there = torch.randn(pieces, length, 2, heads[1], dim, dtype=torch.bfloat16).pin_memory()
    memory = there.to(DEVICE)
    kv = memory[:, None].movedim(3, 0)  # (2, C, 1, S, H, D)
    want, want_lse = torch.empty_like(q), torch.empty(1, heads[0], q_len, device=DEVICE)
    forward(q, kv[0], kv[1], want, want_lse, None, table, scale=dim**-0.5)
    one = torch.full((1,), 7, dtype=torch.int32).pin_memory()
    epoch = torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    arrived = torch.zeros(pieces, dtype=torch.int32, device=DEVICE)
    side = torch.cuda.Stream()
    out, lse = torch.empty_like(q), torch.empty_like(want_lse)
    forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, flags=Flags(arrived.fill_(7), epoch))  # loads
    finish("flags, all there")
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        name = f"pieces arriving in order {order}"
        begin(name)
        memory.fill_(torch.nan)
        arrived.zero_()
        out.fill_(torch.nan)
        torch.cuda.synchronize()
        forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, flags=Flags(arrived, epoch))
        with torch.cuda.stream(side):
            for piece in order:
                time.sleep(0.02)
                memory[piece].copy_(there[piece], non_blocking=True)
                arrived[piece : piece + 1].copy_(one, non_blocking=True)
        finish(name)
        fine = torch.equal(out, want) and torch.equal(lse, want_lse)
        print(f"{'ok  ' if fine else 'FAIL'} {name}: bitwise equal {fine}", flush=True)
        if not fine:
            failures.append(name)
    begin("poison")
    arrived.fill_(-1)  # poison: the kernel ends whatever the epoch
    forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, flags=Flags(arrived, epoch.fill_(1 << 30)))
    finish("poison")
    print("ok   poison ends the kernel", flush=True)


def milliseconds(fn: Callable[[], None], budget: float = 0.12) -> float:
    """Median of single launches, each timed with events, the L2 cleared in between."""
    cache = torch.empty(64 << 20, dtype=torch.int8, device=DEVICE)
    fn()
    torch.cuda.synchronize()
    begin = time.monotonic()
    fn()
    torch.cuda.synchronize()
    rounds = max(5, min(50, int(budget / max(time.monotonic() - begin, 1e-5))))
    for _ in range(rounds // 3):  # clocks settle
        fn()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for first, last in pairs:
        cache.zero_()
        first.record()
        fn()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairs)


def heat(seconds: float = 2.0) -> None:
    """What is measured first would be measured on a cool GPU, at a higher clock."""
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def call(
    batch: int, length: int, heads: tuple[int, int], dim: int, causal: bool, settings: Settings | None = None
) -> tuple[dict[str, Callable[[], None]], float]:
    """(implementations, FLOPs) on randn inputs in bf16."""
    q = torch.randn(batch, length, heads[0], dim, device=DEVICE, dtype=torch.bfloat16)
    kv = torch.randn(2, 1, batch, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(batch, heads[0], length, device=DEVICE)
    table = on_device(causal_table(length, length, causal=causal), DEVICE)
    # repeated, as ring-compare does: not every release's cuDNN path takes fewer key heads
    kt, vt = (x.repeat_interleave(heads[0] // heads[1], dim=2).transpose(1, 2) for x in (kv[0, 0], kv[1, 0]))
    qt = q.transpose(1, 2)

    def ours() -> None:
        forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, settings=settings)

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal)

    made: dict[str, Callable[[], None]] = {"ours": ours, "cuDNN": cudnn}
    triton_forward = forwards().get("triton")
    if triton_forward is not None:
        made["triton"] = lambda: triton_forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5)
    return made, 4.0 * batch * heads[0] * length * length * dim * (0.5 if causal else 1.0)


CELLS = [(16384 // s if s < 16384 else 1, s, h, 128) for s in (4096, 8192, 16384, 32768) for h in ((16, 16), (32, 8))]


def speed() -> None:
    ratios: dict[str, list[float]] = {"cuDNN": [], "triton": []}
    heat()
    wide = [(b, s, (16, 16), d) for d in (192, 256) for b, s in ((4, 4096), (1, 16384))]
    for batch, length, heads, dim in [*CELLS, (4, 4096, (32, 32), 64), (1, 16384, (32, 32), 64), *wide]:
        for causal in (True, False):
            mask = "causal" if causal else "full"
            name = f"B {batch} S {length} H {heads} D {dim} {mask}"
            begin(name)
            made, flops = call(batch, length, heads, dim, causal)
            made["ours"]()
            finish(name)
            best = dict.fromkeys(made, math.inf)
            for _ in range(2):
                for label, fn in made.items():
                    best[label] = min(best[label], milliseconds(fn))
            for label, of in ratios.items():
                if label in best and dim == 128:
                    of.append(best[label] / best["ours"])
            print(f"{name}: " + ", ".join(f"{label} {flops / t / 1e9:.0f}" for label, t in best.items()), flush=True)
    for label, of in ratios.items():
        if of:
            print(
                f"D 128: x {label}: geometric mean {statistics.geometric_mean(of):.3f}, worst {min(of):.3f}", flush=True
            )


def variants() -> None:
    """Settings beside each other, rounds interleaved so that clocks drift for all alike."""
    heat()
    cells = [(4, 4096, (16, 16), 128), (1, 16384, (16, 16), 128), (1, 16384, (32, 32), 64)]
    for batch, length, heads, dim in [*cells, (1, 16384, (16, 16), 192), (1, 16384, (16, 16), 256)]:
        for causal in (True, False):
            fns, flops = {}, 1.0
            for label, chosen in VARIANTS[dim].items():
                begin(f"{label}, D {dim}, causal {causal}")
                made, flops = call(batch, length, heads, dim, causal, chosen)
                fns[label] = made["ours"]
                fns[label]()
                finish(label)
            best = dict.fromkeys(fns, math.inf)
            for _ in range(3):
                for label, fn in fns.items():
                    best[label] = min(best[label], milliseconds(fn))
            print(f"B {batch} S {length} H {heads} D {dim} {'causal' if causal else 'full'}: "
                  + "; ".join(f"{label} {flops / t / 1e9:.0f}" for label, t in best.items()), flush=True)  # fmt: skip


def locality() -> None:
    """How many bytes of keys and values concurrent tiles share: more heads at a time balance, fewer stay in L2."""
    heat()
    before = launching.L2_BYTES
    for length, causal in ((4096, True), (4096, False), (16384, True), (16384, False), (32768, True), (32768, False)):
        fns, flops = {}, 1.0
        for size in (1, 8, 16, 24, 32, 48):
            begin(f"{size} MiB, S {length}, causal {causal}")
            launching.L2_BYTES = size << 20  # read when a call of a kind is made for the first time
            made, flops = call(max(1, 16384 // length), length, (16, 16), 128, causal)
            fns[size] = made["ours"]
            fns[size]()
            finish("locality")
        best = dict.fromkeys(fns, math.inf)
        for _ in range(3):
            for size, fn in fns.items():
                best[size] = min(best[size], milliseconds(fn))
        print(f"S {length} {'causal' if causal else 'full'}: "
              + "; ".join(f"{size} MiB {flops / t / 1e9:.0f}" for size, t in best.items()), flush=True)  # fmt: skip
    launching.L2_BYTES = before


def forwards() -> dict[str, Callable[..., None]]:
    """Ours and, where there is one, ring-triton's."""
    found: dict[str, Callable[..., None]] = {"ours": forward}
    found["ours, L2 policies"] = partial(forward, settings=replace(settings_for(128), cache_hints=True))
    if util.find_spec("ring_triton") and util.find_spec("triton"):
        from ring_triton.hopper import forward as triton_forward

        found["triton"] = triton_forward
    return found


def steps() -> None:
    """Accumulating steps against one call over all keys."""
    heat()
    for each, count in ((8192, 4), (2048, 16)):
        begin(f"{count} steps of {each} keys")
        q_len, heads, dim = 8192, 16, 128
        q = torch.randn(1, q_len, heads, dim, device=DEVICE, dtype=torch.bfloat16)
        kv = torch.randn(2, 1, 1, each * count, heads, dim, device=DEVICE, dtype=torch.bfloat16)
        out, lse = torch.empty_like(q), torch.empty(1, heads, q_len, device=DEVICE)
        state = torch.empty(q.shape, device=DEVICE)
        one = on_device(causal_table(q_len, each * count, causal=False), DEVICE)
        ends = {0: FIRST, count - 1: LAST}
        parts = [on_device(causal_table(q_len, each, causal=False, flags=ends.get(n, 0)), DEVICE) for n in range(count)]
        chunks = [kv[:, :, :, n * each : (n + 1) * each] for n in range(count)]

        for name, run in forwards().items():

            def whole(run: Any = run) -> None:
                run(q, kv[0], kv[1], out, lse, None, one, scale=dim**-0.5)  # noqa: B023  # timed here

            def stepped(run: Any = run) -> None:
                for chunk, part in zip(chunks, parts, strict=True):  # noqa: B023
                    run(q, chunk[0], chunk[1], out, lse, state, part, scale=dim**-0.5)  # noqa: B023

            stepped()
            finish("steps")
            times = [(milliseconds(whole, 0.4), milliseconds(stepped, 0.4)) for _ in range(3)]
            a, b = (min(column) for column in zip(*times, strict=True))
            print(f"{name}: {count} steps of {each} keys: {b:.3f} ms, one call {a:.3f}, {b / a - 1:+.1%}", flush=True)


def host() -> None:
    """Host time of a launch in steady state."""
    begin("host time")
    ours = call(1, 256, (4, 4), 128, True)[0]["ours"]
    for _ in range(20):
        ours()
    torch.cuda.synchronize()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            ours()
        times.append((time.perf_counter() - start) / 50 * 1e6)
        torch.cuda.synchronize()
    print(f"host: {statistics.median(times):.1f} us a launch", flush=True)


def clocks() -> None:
    """What clock and power a second of each leaves the GPU, and what share of the tensor cores' products that is."""
    heat()
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    made, flops = call(1, 16384, (16, 16), 128, False)
    work: dict[str, tuple[Callable[[], object], float]] = {label: (fn, flops) for label, fn in made.items()}
    for changed in TRIED[128][1:]:
        label = ", ".join(f"{name} {value}" for name, value in changed.items())
        work[label] = (call(1, 16384, (16, 16), 128, False, replace(settings_for(128), **changed))[0]["ours"], flops)
    work["matrix product"] = (lambda: x @ x, 2.0 * 8192**3)
    ask = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    for label, (fn, each) in work.items():
        begin(label)
        fn()
        torch.cuda.synchronize()
        start, rounds, seen = time.monotonic(), 0, []
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        while time.monotonic() - start < 1.2:
            for _ in range(40):
                fn()
            rounds += 40
            if time.monotonic() - start > 0.4:
                rows = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()
                seen.append(max((tuple(map(float, row.split(","))) for row in rows), key=lambda pair: pair[1]))
            torch.cuda.synchronize()
        last.record()
        torch.cuda.synchronize()
        clock, power = (statistics.median(column) for column in zip(*seen, strict=True))
        rate = each * rounds / first.elapsed_time(last) / 1e9
        print(f"{label}: {rate:.0f} TFLOP/s, {clock:.0f} MHz, {power:.0f} W, "
              f"{rate / (132 * 4096 * clock * 1e-6):.1%} of what that clock allows", flush=True)  # fmt: skip


def main() -> int:
    if sys.argv[1:] == ["compile"]:
        compile_all()
        return 0
    sections = {f.__name__: f for f in (smoke, correct, flags, speed, variants, locality, steps, host, clocks)}
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    global only
    picked = [word for word in sys.argv[1:] if word.startswith("only=")]
    only = picked[-1].removeprefix("only=") if picked else ""
    names = [word for word in sys.argv[1:] if word not in picked]
    for name in names or [name for name in sections if name not in EXTRA]:
        print(f"== {name}", flush=True)
        begin_time = time.monotonic()
        try:
            sections[name]()
        except Exception:  # the next section may still tell something
            failures.append(name)
            traceback.print_exc(limit=-4)
        faulthandler.cancel_dump_traceback_later()
        print(f"== {name}: {time.monotonic() - begin_time:.1f} s", flush=True)
        if name == "smoke" and failures:
            break  # nothing else would tell more
    print(f"{len(failures)} failures: {failures}" if failures else "all checks passed", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
