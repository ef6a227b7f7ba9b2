"""The backward by itself on a GPU: right against the contract's reference in fp64, then its settings beside each other.

    python packages/ring-cute/tests/gpu_probe_backward.py compile       # where the DSL is: fills RING_CUTE_CACHE
    python packages/ring-cute/tests/gpu_probe_backward.py [SECTION…]    # on the GPU: torch, apache-tvm-ffi, the cache

Sections: smoke, correct, deterministic, parts, host (these if none is named), variants; see `ring_core.testing.probe`.
How fast it is beside others, `ring-compare run --suite kernels` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Params
from ring_core.testing.direct import (
    BackwardCase,
    Functions,
    backward_plans,
    causal_keys,
    key_batches,
    key_steps,
    random_keys,
    run_backward,
    simple_backward,
)
from ring_core.testing.direct.calls import BackwardCall, backward_calls
from ring_core.testing.probe import Probe, heat, host_microseconds
from ring_cute.hopper import backward_launch as launch
from ring_cute.hopper.backward_settings import (
    BackwardKind,
    BackwardSettings,
    EndsKind,
    backward_settings_for,
)

DEVICE = torch.device("cuda", 0)
PROBE = Probe()

PAIRED = backward_settings_for(192)
VARIANTS: dict[int, dict[str, BackwardSettings]] = {
    128: {
        "as shipped": backward_settings_for(128),
        "64, 2+2": BackwardSettings(),
        "64, 3+2": BackwardSettings(q_stages=3),
        "64, 3+3": BackwardSettings(q_stages=3, do_stages=3),
    },
    64: {
        "as shipped": backward_settings_for(64),
        "96, 2+2": BackwardSettings(block=96),
        "96, 3+2": BackwardSettings(block=96, q_stages=3),
        "128, 3+2": BackwardSettings(block=128, q_stages=3),
    },
    192: {
        "as shipped": PAIRED,
        "alone": BackwardSettings(dq_buffers=3, k_columns=128, v_columns=128),
        "no K in registers": replace(PAIRED, k_columns=0),
        "2+1": replace(PAIRED, do_stages=1),
        "3+1": replace(PAIRED, q_stages=3, do_stages=1),
        "3+2, two buffers of dq": replace(PAIRED, q_stages=3, dq_buffers=2),
    },
    256: {
        "as shipped": backward_settings_for(256),
        "1+1": BackwardSettings(q_stages=1, do_stages=1),
        "1+1, four buffers of dq": BackwardSettings(q_stages=1, do_stages=1, dq_buffers=4),
    },
}
PADDED = (96, 40, 160, 200)
SHAPES = [
    (4, 4096, (16, 16), 128),
    (1, 16384, (16, 16), 128),
    (1, 16384, (32, 8), 128),
    (4, 4096, (32, 32), 64),
    (1, 16384, (32, 32), 64),
]
WIDE_SHAPES = [(batch, 16384 // batch, (16, 16), dim) for dim in (192, 256) for batch in (4, 1)]
"""Beside cuDNN `ring-compare run --suite kernels-wide` has them: not every torch takes them there."""


def kinds() -> Iterator[BackwardKind | EndsKind]:
    """Every kernel that the probe launches."""
    for dim in VARIANTS:
        shipped = backward_settings_for(dim)
        yield EndsKind("prepare", "bfloat16", dim)
        yield EndsKind("finish", "bfloat16", dim)
        for gradients in ("final", "shared", "added"):
            yield BackwardKind("bfloat16", dim, gradients, False, False, shipped)
        for chosen in VARIANTS[dim].values():
            for gradients in ("final", "shared"):
                yield BackwardKind("bfloat16", dim, gradients, False, False, chosen)
        for gradients in ("final", "added"):
            yield BackwardKind("bfloat16", dim, gradients, False, False, shipped, ordered=True)
        yield BackwardKind("bfloat16", dim, "added", False, True, shipped)
        yield EndsKind("prepare", "bfloat16", dim, True)
        yield EndsKind("prepare", "float16", dim)
        yield EndsKind("finish", "float16", dim)
        yield BackwardKind("float16", dim, "shared", False, False, shipped)
    for dim in PADDED:
        yield EndsKind("prepare", "bfloat16", dim)
        yield EndsKind("finish", "bfloat16", dim)
        yield BackwardKind("bfloat16", dim, "shared", False, False, backward_settings_for(dim))


def compile_all() -> None:
    from ring_cute import library

    for kind in dict.fromkeys(kinds()):
        if library.find(kind) is None:
            library.build(kind)
            print(library.path_of(kind), flush=True)


def prepare(*tensors: Tensor, params: Params) -> launch.BackwardState:
    return launch.prepare(*tensors)


FUNCTIONS = Functions(prepare, launch.backward, launch.finish)


def check(case: BackwardCase) -> None:
    PROBE.check(case.name, lambda: run_backward(case, FUNCTIONS, DEVICE))


def smoke() -> None:
    """One block, then a few: what to look at first where everything else fails."""
    check(BackwardCase("smoke: one block", [causal_keys(64, 128)], 64, heads=(1, 1)))
    check(BackwardCase("smoke: two blocks", [causal_keys(128, 128)], 128, heads=(1, 1)))
    check(BackwardCase("smoke: eight blocks, four tiles", [causal_keys(512, 512)], 512, heads=(1, 1)))
    check(BackwardCase("smoke: few keys", [causal_keys(64, 5)], 64, heads=(1, 1)))
    check(BackwardCase("smoke: few rows", [causal_keys(5, 128)], 5, heads=(1, 1)))
    for dim in (192, 256):
        check(BackwardCase(f"smoke: one block D{dim}", [causal_keys(64, 64)], 64, heads=(1, 1), dim=dim))
        check(BackwardCase(f"smoke: many blocks D{dim}", [causal_keys(512, 512)], 512, heads=(1, 1), dim=dim))
        check(BackwardCase(f"smoke: few keys D{dim}", [causal_keys(64, 5)], 64, heads=(1, 1), dim=dim))
        check(BackwardCase(f"smoke: two tiles D{dim}", [causal_keys(512, 190)], 512, heads=(1, 1), dim=dim))


def correct() -> None:
    for dim in (*VARIANTS, *PADDED):
        for case in simple_backward(dim, heads=(4, 2)):
            check(case)
    for dim, tried in VARIANTS.items():
        for label, chosen in list(tried.items())[1:]:
            for case in (*simple_backward(dim, settings=chosen), random_keys(2, dim, settings=chosen)):
                check(replace(case, heads=(4, 2), name=f"{label}: {case.name}"))
    for dim in VARIANTS:
        for case in (*backward_plans(dim), key_steps(dim), key_batches(dim), *(random_keys(s, dim) for s in range(12))):
            check(case)
        for heads in ((3, 3), (4, 2)):
            for case in simple_backward(dim, final=True, heads=heads):
                check(replace(case, name=f"final {heads}: {case.name}"))
        for case in simple_backward(dim, departures=True, heads=(4, 2)):
            check(replace(case, name=f"departures: {case.name}"))
        for case in simple_backward(dim, dtype=torch.float16):
            check(replace(case, name=f"fp16: {case.name}"))
    for dim in (128, 256):
        check(replace(key_steps(dim), name=f"departures: four steps D{dim}", departures=True))
    check(BackwardCase("sinks", [causal_keys(512, 512, causal=True)], 512, heads=(4, 2), sinks=True))
    check(BackwardCase("dlse", [causal_keys(512, 512, causal=True)], 512, heads=(4, 2), dlse=True))
    for dim in VARIANTS:
        long = causal_keys(8192, 8192, causal=True)
        check(BackwardCase(f"8192 causal D{dim}", [long], 8192, heads=(4, 4), dim=dim))


def parts() -> None:
    """What the main kernel does, and what its ends take."""
    for shape in (*SHAPES, *WIDE_SHAPES):
        for call in backward_calls(FUNCTIONS, shape):
            fns = {"prepare": call.prepare, "main": call.main(), "finish": call.finish, "whole": call.whole}
            PROBE.show(call.title, fns | others(call), call.flops, ends=("prepare", "finish"))


def variants() -> None:
    """The main kernel's settings beside each other, and cuDNN; of one head dim: only=D256."""
    heat()
    for shape in (*SHAPES, *WIDE_SHAPES):
        if PROBE.only in f"D{shape[-1]}":
            for call in backward_calls(FUNCTIONS, shape):
                fns = {name: call.main(chosen) for name, chosen in VARIANTS[shape[-1]].items()}
                PROBE.show(call.title, fns | others(call), call.flops)


def others(call: BackwardCall) -> dict[str, Callable[[], object]]:
    """cuDNN, where every torch takes it."""
    return {"cuDNN": call.cudnn()} if call.q.shape[-1] <= 128 else {}


def deterministic() -> None:
    """dq in a fixed order: the same bits from run to run, and what that costs."""
    more: dict[str, Any] = {"deterministic": True, "repeat": 3, "dlse": False}
    for dim in VARIANTS:
        cases = [*simple_backward(dim, heads=(4, 2)), key_steps(dim), key_batches(dim)]
        for case in (*cases, *(random_keys(seed, dim) for seed in range(4))):
            check(replace(case, name=f"deterministic: {case.name}", **more))
    long = causal_keys(4096, 4096, causal=True)
    check(BackwardCase("deterministic: 4096 causal", [long], 4096, heads=(8, 8), **more))
    for shape in (*SHAPES, *WIDE_SHAPES):
        for call in backward_calls(FUNCTIONS, shape):
            any_order = call.main()
            call.params = replace(call.params, deterministic=True)
            PROBE.show(call.title, {"any order": any_order, "ordered": call.main()}, call.flops)


def host() -> None:
    """Host time of each launch in steady state."""
    PROBE.begin("host time")
    call = BackwardCall(FUNCTIONS, (1, 256, (4, 4), 128), True)
    for name, fn in (("prepare", call.prepare), ("main", call.main()), ("finish", call.finish)):
        print(f"host: {name} {host_microseconds(fn):.1f} us a launch", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        compile_all()
    else:
        made = {f.__name__: f for f in (smoke, correct, deterministic, parts, host, variants)}
        sys.exit(PROBE.main(made, usual=("smoke", "correct", "deterministic", "parts", "host")))
