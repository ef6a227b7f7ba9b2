"""The Hopper forward on a GPU, in one go: right against the contract's reference in fp64, then speed beside cuDNN.

    PYTHONPATH=packages/ring-core/src:packages/ring-triton/src python packages/ring-triton/tests/hopper/gpu_probe.py

Arguments pick sections: correct, flags, speed, variants, steps, host (all if none); "only=WORD" picks the cases of
`correct` that WORD is part of. Each case is named before it is launched. Exit status 1 if a check failed; a kernel that
does not end in HANG seconds, or a case that takes longer than SLOW with its compilation, ends the probe there with 2 or
1, since nothing more can run beside it.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
import triton
from hopper_plans import PROBED, table_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_core.backend import DeviceTable, Flags, Params, on_device
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.segment import FIRST, LAST, Segment, Table
from ring_triton.hopper import forward, supports
from ring_triton.hopper.settings import Settings, settings_for

DEVICE = torch.device("cuda", 0)
SENTINEL = 12345.0
HANG, SLOW = 20.0, 90.0
failures: list[str] = []
only = ""


def begin(name: str) -> None:
    """Says what comes next, and arms a timer that tells where the host was if this takes too long, and ends it all."""
    print(f"...  {name}", flush=True)
    if DEVICE.type != "cpu":
        faulthandler.dump_traceback_later(SLOW, exit=True)


def finish(name: str) -> None:
    """Waits for the device, but not for ever."""
    if DEVICE.type == "cpu":
        return
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + HANG
    while not done.query():
        if time.monotonic() > deadline:
            print(f"HANG {name}: the device is still busy after {HANG:.0f} s; failed before: {failures}", flush=True)
            os._exit(2)  # the interpreter's own end would wait for the device
        time.sleep(1e-4)


def causal_table(q_len: int, k_len: int, *, causal: bool, flags: int = FIRST | LAST, k_position: int = 0) -> Table:
    """One strip, one segment; query i sees keys up to i - k_position."""
    upper = min(k_len, -k_position) if causal else k_len
    return table_of([Segment(0, q_len, 0, 0, k_len, -q_len, upper, 0, k_position, 1, -1, flags)])


def keys(table: Table | list[Table], batch: int, heads: int, dim: int, dtype: torch.dtype, length: int = 0) -> Tensor:
    """(2, C, B, S, H, D) with k and v of a token side by side; NaN wherever no segment of the table looks."""
    segments = [s for t in ([table] if isinstance(table, Table) else table) for s in t.segments]
    pieces = 1 + max((s.piece for s in segments), default=0)
    length = max(length, max((s.k_start + s.k_len for s in segments), default=1))
    used = torch.zeros(pieces, length, dtype=torch.bool)
    for s in segments:
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
        exact = (out.double(), lse.double(), None if state is None else state.double())
        for table in tables:
            if not len(table):
                continue
            kv = keys(table, batch, heads[1], dim, dtype, piece_length)
            assert not (why := supports(q, kv[0], kv[1])), why
            on = on_device(table, DEVICE)
            forward(q, kv[0], kv[1], out, lse, state, on, scale=dim**-0.5, sinks=sinks, settings=settings)
            finish(name)
            wide = (q.double(), kv[0].double(), kv[1].double())
            ReferenceBackend().forward(*wide, *exact, on, params=Params(dim**-0.5, sinks=sinks))
        untouched = (out[~rows] == SENTINEL).all() and (lse.transpose(1, 2)[~rows] == SENTINEL).all()
        got, want = out[rows].double(), exact[0][rows]
        error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if want.numel() else 0.0
        got_lse, want_lse = lse.transpose(1, 2)[rows].double(), exact[1].transpose(1, 2)[rows]
        same_empty = torch.equal(got_lse == -torch.inf, want_lse == -torch.inf)
        finite = want_lse != -torch.inf
        lse_error = (got_lse - want_lse)[finite].abs().max().item() if finite.any() else 0.0
        zero = bool((got[~finite] == 0).all()) if (~finite).any() else True
        limit = 5e-3 if dtype == torch.bfloat16 else 8e-4
        fine = bool(untouched) and same_empty and zero and error < limit and lse_error < 2e-3
        message = f"rel {error:.2e} lse {lse_error:.1e}"
        if not fine:
            message += f" untouched={bool(untouched)} empty rows={same_empty} zero={zero}"
    except Exception:  # a probe goes on to the next case, and says what happened
        fine, message = False, traceback.format_exc(limit=-3)
    print(f"{'ok  ' if fine else 'FAIL'} {name}: {message} ({time.monotonic() - start:.1f} s)", flush=True)
    if not fine:
        failures.append(name)


def plans() -> Iterator[tuple[str, list[Table], int, int]]:
    """(name, the tables of a rank's steps, its queries, piece length)."""
    made: list[tuple[str, Problem | PackedProblem, int]] = []
    for layout, world, left, right, total in PROBED:
        made.append(
            (f"{layout} x{world} window {left},{right} of {total}",
             Problem(1024, 1024, total, total, left, right, layout, world), 1024 // world)
        )  # fmt: skip
    cu = [0, 3, 200, 201, 500, 640, 1000]
    made.append(("packed x2", PackedProblem.of(cu, cu, left=None, right=0, layout="zigzag", world_size=2), 500))
    made.append(("packed x1", PackedProblem.of(cu, cu, left=None, right=0, layout="contiguous", world_size=1), 1000))
    for name, problem, q_len in made:
        for schedule in ("gather", "ring"):
            for rank in {0, problem.world_size - 1}:
                plan = make_plan(problem, rank, schedule)
                tables = [step.forward for step in plan.steps]
                length = getattr(plan, "piece_length", 0)
                yield f"{name}, {schedule}, rank {rank}", tables, q_len, length


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


def correct() -> None:
    full, causal = causal_table(512, 512, causal=False), causal_table(512, 512, causal=True)
    base = settings_for(128)
    for label, chosen in (
        ("as shipped", base),
        ("ping-pong", replace(base, ping_pong=True)),
        ("overlap 1", replace(base, overlap=1)),
    ):
        check(f"full, {label}", [full], q_len=512, settings=chosen)
        check(f"causal, {label}", [causal], q_len=512, settings=chosen)
    long = causal_table(8192, 8192, causal=True)
    check("causal 8192", [long], q_len=8192, heads=(8, 8))
    for dim in (64, 96, 40, 192, 256):
        check(f"causal, D {dim}", [causal], q_len=512, dim=dim)
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
    for dim in (64, 96, 128, 256):  # rows that see nothing in the first steps; whole tiles, a half and a part of one
        check(f"four steps, last keys first, D {dim}", causal_steps(1000, (3, 2, 1, 0)), q_len=1000, dim=dim)
    check("steps of short strips", short_strips(), q_len=700, heads=(8, 2))
    check("sinks", [causal], q_len=512, with_sinks=True)
    check(
        "sinks, rows that see nothing",
        [causal_table(200, 100, causal=True, k_position=150)],
        q_len=200,
        with_sinks=True,
    )
    for dim in (64, 128, 256):
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
    forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, flags=Flags(arrived.fill_(7), epoch))  # compiles
    finish("flags, all there")
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        begin(f"pieces arriving in order {order}")
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
        finish(f"pieces arriving in order {order}")
        fine = torch.equal(out, want) and torch.equal(lse, want_lse)
        print(f"{'ok  ' if fine else 'FAIL'} pieces arriving in order {order}: bitwise equal {fine}", flush=True)
        if not fine:
            failures.append(f"flags {order}")
    begin("poison")
    arrived.fill_(-1)  # poison: the kernel ends whatever the epoch
    forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, flags=Flags(arrived, epoch.fill_(1 << 30)))
    finish("poison")
    print("ok   poison ends the kernel", flush=True)


def milliseconds(fn: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(fn, warmup=60, rep=200, return_mode="median"))


def call(
    batch: int, length: int, heads: tuple[int, int], dim: int, causal: bool, settings: Settings | None = None
) -> tuple[Callable[[], None], Callable[[], None], float]:
    """(this path, cuDNN, FLOPs) on randn inputs in bf16."""
    q = torch.randn(batch, length, heads[0], dim, device=DEVICE, dtype=torch.bfloat16)
    kv = torch.randn(2, 1, batch, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(batch, heads[0], length, device=DEVICE)
    table: DeviceTable = on_device(causal_table(length, length, causal=causal), DEVICE)
    # repeated, as ring-compare does: not every release's cuDNN path takes fewer key heads
    kt, vt = (x.repeat_interleave(heads[0] // heads[1], dim=2).transpose(1, 2) for x in (kv[0, 0], kv[1, 0]))
    qt = q.transpose(1, 2)

    def ours() -> None:
        forward(q, kv[0], kv[1], out, lse, None, table, scale=dim**-0.5, settings=settings)

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal)

    flops = 4.0 * batch * heads[0] * length * length * dim * (0.5 if causal else 1.0)
    return ours, cudnn, flops


CELLS = [(16384 // s if s < 16384 else 1, s, h, 128) for s in (4096, 8192, 16384, 32768) for h in ((16, 16), (32, 8))]


def speed() -> None:
    ratios = []
    for batch, length, heads, dim in [*CELLS, (4, 4096, (32, 32), 64), (1, 16384, (32, 32), 64)]:
        for causal in (True, False):
            begin(f"B {batch} S {length} H {heads} D {dim} {'causal' if causal else 'full'}")
            ours, cudnn, flops = call(batch, length, heads, dim, causal)
            ours()
            finish("speed")
            times = [(milliseconds(ours), milliseconds(cudnn)) for _ in range(2)]
            mine, theirs = (flops / min(column) / 1e9 for column in zip(*times, strict=True))
            if dim == 128:
                ratios.append(mine / theirs)
            mask = "causal" if causal else "full"
            print(f"B {batch} S {length} H {heads} D {dim} {mask}: {mine:.0f} TFLOP/s, cuDNN {theirs:.0f}, "
                  f"ratio {mine / theirs:.3f}", flush=True)  # fmt: skip
    print(f"D 128: mean ratio {statistics.mean(ratios):.3f}, worst {min(ratios):.3f}", flush=True)


def variants() -> None:
    """Settings beside each other, rounds interleaved so that clocks drift for all alike."""
    for batch, length, heads, dim in ((4, 4096, (16, 16), 128), (1, 16384, (16, 16), 128), (1, 16384, (32, 32), 64)):
        base = settings_for(dim)
        tried = {
            "as shipped": base,
            "overlap 1": replace(base, overlap=1),
            "ping-pong": replace(base, ping_pong=True),
            "ping-pong, overlap 1": replace(base, ping_pong=True, overlap=1),
            "block 64, 4 stages": replace(base, block=64, stages=4),
            "block 64, 3 stages": replace(base, block=64, stages=3),
        }
        if dim == 64:
            tried["3 stages"] = replace(base, stages=3)
        for causal in (True, False):
            fns, flops = {}, 1.0
            for name, chosen in tried.items():
                begin(f"{name}, D {dim}, causal {causal}")
                fns[name], _, flops = call(batch, length, heads, dim, causal, chosen)
                fns[name]()
                finish(name)
            best = dict.fromkeys(fns, float("inf"))
            for _ in range(3):
                for name, fn in fns.items():
                    best[name] = min(best[name], milliseconds(fn))
            print(f"B {batch} S {length} H {heads} D {dim} {'causal' if causal else 'full'}: "
                  + "; ".join(f"{name} {flops / t / 1e9:.0f}" for name, t in best.items()), flush=True)  # fmt: skip


def steps() -> None:
    """Accumulating steps against one call over all keys."""
    for each, count in ((8192, 4), (4096, 8), (2048, 16)):
        steps_of(each, count)


def steps_of(each: int, count: int, q_len: int = 8192, heads: int = 16, dim: int = 128) -> None:
    begin(f"{count} steps of {each} keys")
    q = torch.randn(1, q_len, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    kv = torch.randn(2, 1, 1, each * count, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(1, heads, q_len, device=DEVICE)
    state = torch.empty(q.shape, device=DEVICE)
    one = on_device(causal_table(q_len, each * count, causal=False), DEVICE)
    ends = {0: FIRST, count - 1: LAST}
    parts = [on_device(causal_table(q_len, each, causal=False, flags=ends.get(n, 0)), DEVICE) for n in range(count)]

    def whole() -> None:
        forward(q, kv[0], kv[1], out, lse, None, one, scale=dim**-0.5)

    def stepped() -> None:
        for n, part in enumerate(parts):
            chunk = kv[:, :, :, n * each : (n + 1) * each]
            forward(q, chunk[0], chunk[1], out, lse, state, part, scale=dim**-0.5)

    stepped()
    finish("steps")
    times = [(milliseconds(whole), milliseconds(stepped)) for _ in range(3)]
    a, b = (min(column) for column in zip(*times, strict=True))
    print(
        f"{count} steps of {each} keys, {q_len} queries: {b:.3f} ms, one call {a:.3f} ms, {b / a - 1:+.1%}", flush=True
    )


def host() -> None:
    """Host time of a launch in steady state."""
    begin("host time")
    ours, _, _ = call(1, 256, (4, 4), 128, True)
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


def main() -> int:
    sections = {f.__name__: f for f in (correct, flags, speed, variants, steps, host)}
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    global only
    words = [word for word in sys.argv[1:] if word.startswith("only=")]
    only = words[-1].removeprefix("only=") if words else ""
    for name in [word for word in sys.argv[1:] if word not in words] or sections:
        print(f"== {name}", flush=True)
        try:
            sections[name]()
        except Exception:  # the next section may still tell something
            failures.append(name)
            traceback.print_exc(limit=-4)
        faulthandler.cancel_dump_traceback_later()
    print(f"{len(failures)} failures: {failures}" if failures else "all checks passed", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
