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
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import triton
from hopper_backward_cases import (
    DEVICE,
    Case,
    begin,
    check,
    chunks,
    current,
    failures,
    odd,
    own_batches,
    plans,
    randoms,
    simple,
    watch,
    worst,
)
from hopper_backward_speed import speed, tried, variants, warm
from hopper_plans import table_of
from torch import Tensor

from ring_core.backend import Flags, Params, on_device
from ring_core.segment import Segment
from ring_triton.hopper import backward_launch as hopper

LIMIT = 43
"""Seconds that `correct` and `others` may take."""

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
        "final": lambda: iter(
            [c for dim in (128, 64) for heads in ((3, 3), (4, 2)) for c in simple(dim, final=True, heads=heads)]
            + [replace(c, heads=heads) for heads in ((3, 3), (4, 2)) for c in randoms(128, range(6), final=True)]
            + [replace(c, final=True) for c in (own_batches(128), *plans(64)) if len(c.tables) == 1]
            + [*simple(128, final=True, deterministic=True, repeat=2)]
        ),
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
