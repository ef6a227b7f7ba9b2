"""The Hopper backward by itself on a GPU: right against fp64, then its settings beside each other.

    PYTHONPATH=packages/ring-core/src:packages/ring-triton/src \
        python packages/ring-triton/tests/hopper/gpu_probe_backward.py [SECTION…]

Sections: correct, parts (these if none is named), others, variants; see `ring_core.testing.probe`. `correct` deals its
groups of cases out to processes, since most of its time is compilation; `others` is the same for settings that are not
shipped. How fast it is beside others, `ring-compare run --suite kernels` says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Params
from ring_core.segment import Segment
from ring_core.testing.direct import (
    BackwardCase,
    Functions,
    backward_plans,
    key_batches,
    key_steps,
    random_keys,
    run_backward,
    simple_backward,
    table_of,
)
from ring_core.testing.direct.calls import BackwardCall, backward_calls
from ring_core.testing.probe import Probe, heat
from ring_triton.hopper import backward_launch as hopper
from ring_triton.hopper.backward_settings import BackwardSettings, backward_settings_for

DEVICE = torch.device("cuda", 0)
PROBE = Probe(hang=20.0, slow=90.0)  # kernels are compiled here
LIMIT = 60
"""Seconds that `correct` and `others` may take."""

Groups = dict[str, Callable[[], Iterable[BackwardCase]]]


def prepare(*tensors: Tensor, params: Params) -> hopper.BackwardState:
    return hopper.prepare(*tensors, deterministic=params.deterministic)


FUNCTIONS = Functions(prepare, hopper.backward, hopper.finish)


def tried(dim: int) -> dict[str, BackwardSettings]:
    """The settings to compare, the shipped ones first."""
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


def cases(dim: int, seeds: int, **more: Any) -> list[BackwardCase]:
    """What every variant of the kernel is asked."""
    more = {"heads": (4, 2), **more}
    return [
        *simple_backward(dim, **more),
        *(random_keys(seed, dim, **more) for seed in range(seeds)),
        key_steps(dim, **more),
    ]


def unaligned(dim: int) -> BackwardCase:
    """Rows of queries that begin anywhere."""
    strips = [[Segment(n, 64, 0, 0, 128, -64, 128, 0, 0, 1, -1, 3)] for n in (1, 2, 3)]
    return BackwardCase(f"64 rows from 1, 2, 3 D{dim}", [table_of(*strips)], 68, dim=dim)


def groups() -> Groups:
    """Of `correct`: the settings that calls get. Those that take longest first."""
    ordered = {"deterministic": True, "repeat": 2}
    return {
        "128": lambda: [*cases(128, 12), *backward_plans(128), key_batches(128), unaligned(128)],
        "64": lambda: [*cases(64, 12), *backward_plans(64), key_batches(64), unaligned(64)],
        "padded": lambda: [case for dim in (8, 40, 96) for case in cases(dim, 3)],
        "fp16": lambda: [case for dim in (128, 64) for case in cases(dim, 4, dtype=torch.float16)],
        "128 ordered": lambda: cases(128, 6, **ordered),
        "64 ordered": lambda: cases(64, 0, **ordered),
        "final": lambda: [
            *(case for heads in ((3, 3), (4, 2)) for case in simple_backward(128, final=True, heads=heads)),
            *(random_keys(seed, 128, final=True, heads=((3, 3), (4, 2))[seed % 2]) for seed in range(6)),
            *(replace(case, final=True) for case in (key_batches(128), *backward_plans(64)) if len(case.tables) == 1),
            *simple_backward(128, final=True, **ordered),
        ],
        "departures": lambda: [*simple_backward(128, departures=True), key_steps(128, departures=True)],
        "scale": lambda: [*simple_backward(128, scale=0.5), *simple_backward(128, scale=-0.05)],
    }


def other_groups() -> Groups:
    """Of `others`."""
    return {
        f"{dim}: {name}": lambda dim=dim, chosen=chosen: cases(dim, 4, settings=chosen)  # type: ignore[misc]
        for dim in (128, 64)
        for name, chosen in list(tried(dim).items())[1:]
    }


def group(name: str) -> None:
    """In a process of its own."""
    picked = list({**groups(), **other_groups()}[name]())
    for case in picked:
        PROBE.check(case.name, lambda case=case: run_backward(case, FUNCTIONS, DEVICE))  # type: ignore[misc]
    failed = PROBE.failures
    first = f", first {failed[0]!r}" if failed else ""
    print(f"{'FAIL' if failed else 'ok  '} {name}: {len(failed)} of {len(picked)} cases failed{first}", flush=True)
    os._exit(bool(failed))  # nothing of a GPU in error can be cleaned up


def in_processes(names: Iterable[str]) -> None:
    end, running = time.monotonic() + LIMIT, []
    for name in names:
        while sum(p.poll() is None for _, p in running) >= 16:
            time.sleep(0.1)
        running.append((name, subprocess.Popen([sys.executable, __file__, "group", name])))
    for name, process in running:
        try:
            if process.wait(max(0.1, end - time.monotonic())):
                PROBE.failures.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
            PROBE.failures.append(name)
            print(f"LATE {name}: not done after {LIMIT} s", flush=True)


def correct() -> None:
    in_processes(groups())


def others() -> None:
    in_processes(other_groups())


def parts() -> None:
    """What the main kernel does, and what its ends take."""
    for shape in ((4, 4096, (16, 16), 128), (1, 16384, (32, 8), 128), (1, 16384, (32, 32), 64)):
        for call in backward_calls(FUNCTIONS, shape):
            fns = {"prepare": call.prepare, "main": call.main(), "finish": call.finish, "whole": call.whole}
            PROBE.show(call.title, {**fns, "cuDNN": call.cudnn()}, call.flops, ends=("prepare", "finish"))


def warm(dim: int, name: str) -> None:
    """Compiles one variant into the cache, in a process of its own."""
    BackwardCall(FUNCTIONS, (1, 256, (16, 16) if dim == 128 else (32, 32), dim), True).main(tried(dim)[name])()
    torch.cuda.synchronize()


def variants() -> None:
    """The main kernel's settings beside each other, and cuDNN."""
    work = [(str(dim), name) for dim in (128, 64) for name in tried(dim)]
    for process in [subprocess.Popen([sys.executable, __file__, "warm", *w]) for w in work]:
        process.wait()
    heat()
    for shape in (
        (4, 4096, (16, 16), 128),
        (1, 16384, (16, 16), 128),
        (4, 4096, (32, 32), 64),
        (1, 16384, (32, 32), 64),
    ):
        for call in backward_calls(FUNCTIONS, shape):
            fns = {name: call.main(chosen) for name, chosen in tried(shape[-1]).items()}
            PROBE.show(call.title, {**fns, "cuDNN": call.cudnn()}, call.flops)


if __name__ == "__main__":
    if sys.argv[1:2] == ["group"]:
        group(sys.argv[2])
    elif sys.argv[1:2] == ["warm"]:
        warm(int(sys.argv[2]), sys.argv[3])
    else:
        sections = {f.__name__: f for f in (correct, others, parts, variants)}
        sys.exit(PROBE.main(sections, usual=("correct", "parts")))
