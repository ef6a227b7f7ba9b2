"""The Hopper forward by itself on a GPU: right against fp64, then its settings beside each other.

    PYTHONPATH=packages/ring-core/src:packages/ring-triton/src python packages/ring-triton/tests/hopper/gpu_probe.py

Sections: correct, host (these if none is named), variants; see `ring_core.testing.probe`. How fast it is beside others,
`ring-compare run --suite kernels` and `steps` say.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from ring_core.backend import Params
from ring_core.testing.direct import (
    ForwardCase,
    causal_steps,
    causal_table,
    forward_plans,
    own_batches,
    random_queries,
    run_forward,
    short_strips,
)
from ring_core.testing.direct.calls import ForwardCall, forward_calls
from ring_core.testing.probe import Probe, heat, host_microseconds
from ring_triton import hopper
from ring_triton.hopper.settings import Settings, settings_for

DEVICE = torch.device("cuda", 0)
PROBE = Probe(hang=20.0, slow=90.0)  # kernels are compiled here


def tried(dim: int) -> dict[str, Settings]:
    """The settings to compare."""
    base = settings_for(dim)
    made = {
        "as shipped": base,
        "overlap 1": replace(base, overlap=1),
        "ping-pong": replace(base, ping_pong=True),
        "ping-pong, overlap 1": replace(base, ping_pong=True, overlap=1),
        "block 64, 4 stages": replace(base, block=64, stages=4),
        "block 64, 3 stages": replace(base, block=64, stages=3),
    }
    return made | ({"3 stages": replace(base, stages=3)} if dim == 64 else {})


def forward(*tensors: Any, params: Params, settings: Settings | None) -> None:
    hopper.forward(*tensors, scale=params.scale, sinks=params.sinks, settings=settings)


def check(case: ForwardCase) -> None:
    PROBE.check(case.name, lambda: run_forward(case, forward, DEVICE))


def causal(length: int, name: str, **more: Any) -> ForwardCase:
    return ForwardCase(name, [causal_table(length, length, causal=True)], length, **more)


def correct() -> None:
    full = causal_table(512, 512, causal=False)
    for label in ("as shipped", "ping-pong", "overlap 1"):
        chosen = tried(128)[label]
        check(ForwardCase(f"full, {label}", [full], 512, settings=chosen))
        check(causal(512, f"causal, {label}", settings=chosen))
    check(causal(8192, "causal 8192", heads=(8, 8)))
    tail = causal_table(300, 333, causal=True, k_position=-33)
    for dim in (64, 96, 40, 192, 256):
        check(causal(512, f"causal, D {dim}", dim=dim))
        check(ForwardCase(f"tail, D {dim}", [tail], 300, dim=dim))
    for dtype in (torch.float16, torch.bfloat16):
        check(causal(512, f"batch 3, {dtype}", batch=3, heads=(6, 2), dtype=dtype))
    check(ForwardCase("keys shorter than a block", [causal_table(200, 17, causal=False)], 200))
    check(ForwardCase("no key", [causal_table(200, 0, causal=False)], 200))
    check(ForwardCase("batch entries of their own", [own_batches()], 256, batch=2))
    check(ForwardCase("four accumulating steps", causal_steps(1000, (0, 1, 2, 3)), 1000, batch=2))
    for dim in (64, 96, 128, 256):  # rows that see nothing in the first steps; whole tiles, a half and a part of one
        check(ForwardCase(f"four steps, last keys first, D {dim}", causal_steps(1000, (3, 2, 1, 0)), 1000, dim=dim))
    check(ForwardCase("steps of short strips", short_strips(), 700, heads=(8, 2)))
    check(causal(512, "sinks", sinks=True))
    nothing = causal_table(200, 100, causal=True, k_position=150)
    check(ForwardCase("sinks, rows that see nothing", [nothing], 200, sinks=True))
    for dim in (64, 128, 256):
        steps = causal_steps(1000, (1, 0, 3, 2))
        check(ForwardCase(f"sinks, four accumulating steps, D {dim}", steps, 1000, dim=dim, sinks=True))
    for case in forward_plans():
        check(case)
    for seed in range(12):
        check(random_queries(seed, dim=(128, 64)[seed % 2]))


def variants() -> None:
    """Settings beside each other, and cuDNN."""
    heat()
    for shape in ((4, 4096, (16, 16), 128), (1, 16384, (16, 16), 128), (1, 16384, (32, 32), 64)):
        for call in forward_calls(forward, shape):
            fns = {name: call.kernel(chosen) for name, chosen in tried(shape[-1]).items()}
            PROBE.show(call.title, {**fns, "cuDNN": call.cudnn()}, call.flops)


def host() -> None:
    """Host time of a launch in steady state."""
    PROBE.begin("host time")
    call = ForwardCall(forward, (1, 256, (4, 4), 128), True)
    print(f"host: {host_microseconds(call.kernel()):.1f} us a launch", flush=True)


if __name__ == "__main__":
    sections = {f.__name__: f for f in (correct, host, variants)}
    sys.exit(PROBE.main(sections, usual=("correct", "host")))
