"""The forward by itself on a GPU: right against the contract's reference in fp64, then its settings beside each other.

    python packages/ring-cute/tests/gpu_probe.py compile        # where the DSL is: fills RING_CUTE_CACHE
    python packages/ring-cute/tests/gpu_probe.py [SECTION…]     # on the GPU: torch, numpy, apache-tvm-ffi, the cache

Sections: smoke, correct, host (these if none is named), variants, clusters, shaped, shaped_variants, locality, clocks;
see `ring_core.testing.probe`. How fast it is beside others, `ring-compare run --suite kernels` and `steps` say.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import host_time
import torch

from ring_core import ring_attention
from ring_core.backend import Params, backend_names
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
from ring_cute.compile import backwards
from ring_cute.hopper import launch as launching
from ring_cute.hopper.backward_settings import BackwardKind, EndsKind, backward_settings_for
from ring_cute.settings import Settings, kind_for, settings_for

DEVICE = torch.device("cuda", 0)
PROBE = Probe()

TRIED: dict[int, list[dict[str, Any]]] = {
    128: [
        {},
        {"overlap": True},
        {"block": 176},
        {"cluster": 2},
        {"cluster": 2, "overlap": True},
        {"cluster": 2, "block": 176},
    ],
    64: [{}, {"turns": False}, {"lazy": False}, {"overlap": True}, {"block": 112}, {"cluster": 2}],
    192: [{}, {"overlap": True}, {"block": 96}, {"cluster": 2}],
    256: [{}, {"overlap": True}, {"block": 64}, {"cluster": 2}],
}
SHAPED = {128: (32, 8), 64: (32, 8), 256: (16, 16)}
"""Heads by head dim, for scores with a softcap or ALiBi."""
TRIED_SHAPED: dict[int, list[dict[str, Any]]] = {
    64: [{"lazy": True}, {"lazy": False}, {"turns": True}, {"block": 192}],
    256: [{"lazy": True}, {"lazy": False}, {"block": 64, "query_columns": 128}],
}
"""Of scores with a softcap."""


def label_of(changed: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "as shipped"


VARIANTS: dict[int, dict[str, Settings]] = {
    dim: {label_of(changed): replace(settings_for(dim), **changed) for changed in tried} for dim, tried in TRIED.items()
}


def kinds() -> Iterator[Any]:
    """Every kernel that the probe launches."""
    for dim in (128, 64, 192, 256):
        yield kind_for("bfloat16", dim)
        yield kind_for("bfloat16", dim, state=True)
        yield kind_for("bfloat16", dim, sinks=True)
        yield kind_for("bfloat16", dim, state=True, sinks=True)
        yield kind_for("float16", dim)
        for chosen in VARIANTS[dim].values():
            yield kind_for("bfloat16", dim, chosen)
        for state, sinks in product((False, True), repeat=2):
            yield kind_for("bfloat16", dim, replace(settings_for(dim), cluster=2), state=state, sinks=sinks)
    for dim in (96, 40, 160, 200):
        for state in (False, True):
            yield kind_for("bfloat16", dim, state=state)
    yield from backwards(host_time.HEAD_DIM, "bfloat16")
    for dim in SHAPED:
        yield from (EndsKind(step, "bfloat16", dim) for step in ("prepare", "finish"))
        for softcap, alibi in product((False, True), repeat=2):
            asked = {"softcap": softcap, "alibi": alibi}
            yield kind_for("bfloat16", dim, **asked)
            yield BackwardKind("bfloat16", dim, "final", False, False, backward_settings_for(dim, **asked), **asked)
    for (dim, tried), alibi in product(TRIED_SHAPED.items(), (False, True)):
        asked = {"softcap": True, "alibi": alibi}
        yield from (kind_for("bfloat16", dim, replace(settings_for(dim, **asked), **each), **asked) for each in tried)


def compile_all() -> None:
    from ring_cute import library

    for each in dict.fromkeys(kinds()):
        if library.find(each) is None:
            library.build(each)
            print(library.path_of(each), flush=True)


def forward(*tensors: Any, params: Params, settings: Settings | None) -> None:
    others = {"sinks": params.sinks, "softcap": params.softcap, "slopes": params.alibi_slopes}
    launching.forward(*tensors, scale=params.scale, settings=settings, **others)


def check(case: ForwardCase) -> None:
    PROBE.check(case.name, lambda: run_forward(case, forward, DEVICE))


def full(q_len: int, k_len: int, **more: Any) -> ForwardCase:
    label = more.pop("name", f"{q_len}x{k_len} full")
    return ForwardCase(label, [causal_table(q_len, k_len, causal=False)], q_len, **more)


def causal(length: int, **more: Any) -> ForwardCase:
    label = more.pop("name", f"{length} causal")
    return ForwardCase(label, [causal_table(length, length, causal=True)], length, **more)


def smoke() -> None:
    """One block, then a few: what to look at first where everything else fails."""
    for case in (full(128, 128), full(128, 256), full(256, 896), full(64, 128), full(5, 128)):
        check(replace(case, name=f"smoke: {case.name}", heads=(1, 1)))


def correct() -> None:
    for dim, tried in VARIANTS.items():
        for label, chosen in tried.items():
            check(full(512, 512, name=f"full, D {dim}, {label}", dim=dim, settings=chosen))
            check(causal(512, name=f"causal, D {dim}, {label}", dim=dim, settings=chosen))
    check(causal(8192, heads=(8, 8)))
    tail = causal_table(300, 333, causal=True, k_position=-33)
    for dim in (96, 40, 64, 128, 160, 192, 200, 256):
        check(ForwardCase(f"tail, D {dim}", [tail], 300, dim=dim))
    for dtype in (torch.float16, torch.bfloat16):
        check(causal(512, name=f"batch 3, {dtype}", batch=3, heads=(6, 2), dtype=dtype))
    check(full(200, 17, name="keys shorter than a block"))
    check(full(200, 0, name="no key"))
    check(ForwardCase("batch entries of their own", [own_batches()], 256, batch=2))
    check(ForwardCase("four accumulating steps", causal_steps(1000, (0, 1, 2, 3)), 1000, batch=2))
    # rows that see nothing in the first steps; whole tiles, a half and a part of one
    for dim in (64, 96, 128, 192, 200, 256):
        check(ForwardCase(f"four steps, last keys first, D {dim}", causal_steps(1000, (3, 2, 1, 0)), 1000, dim=dim))
    check(ForwardCase("steps of short strips", short_strips(), 700, heads=(8, 2)))
    check(causal(512, name="sinks", sinks=True))
    nothing = causal_table(200, 100, causal=True, k_position=150)
    check(ForwardCase("sinks, rows that see nothing", [nothing], 200, sinks=True))
    for dim in (64, 128):
        steps = causal_steps(1000, (1, 0, 3, 2))
        check(ForwardCase(f"sinks, four accumulating steps, D {dim}", steps, 1000, dim=dim, sinks=True))
    for case in forward_plans():
        check(case)
    for seed in range(12):
        check(random_queries(seed, dim=(128, 64)[seed % 2]))
    for dim in VARIANTS:  # what long sequences take
        paired = replace(settings_for(dim), cluster=2)
        for case in (
            ForwardCase("tail", [tail], 300),
            ForwardCase("four steps, last keys first", causal_steps(1000, (3, 2, 1, 0)), 1000),
            ForwardCase("sinks, four steps", causal_steps(1000, (1, 0, 3, 2)), 1000, sinks=True),
            ForwardCase("sinks, rows that see nothing", [nothing], 200, sinks=True),
            random_queries(dim),
        ):
            check(replace(case, name=f"pairs, D {dim}: {case.name}", dim=dim, settings=paired))


def variants() -> None:
    """Settings beside each other, and cuDNN."""
    heat()
    shapes = ((4, 4096, (16, 16), 128), (1, 16384, (16, 16), 128), (1, 16384, (32, 32), 64), (1, 16384, (16, 16), 192))
    for shape in (*shapes, (1, 16384, (16, 16), 256)):
        for call in forward_calls(forward, shape):
            fns = {label: call.kernel(chosen) for label, chosen in VARIANTS[shape[-1]].items()}
            PROBE.show(call.title, {**fns, "cuDNN": call.cudnn()}, call.flops)


def clusters() -> None:
    """CTAs that share keys beside those that do not, by length: what is saved of L2 against what waiting costs."""
    heat()
    shared = {
        dim: {"as shipped": settings_for(dim), "cluster 2": replace(settings_for(dim), cluster=2)} for dim in TRIED
    }
    for dim, heads in ((128, (16, 16)), (128, (32, 8)), (64, (32, 32)), (192, (16, 16)), (256, (16, 16))):
        for length in (2048, 4096, 8192, 16384, 32768):
            for call in forward_calls(forward, (max(1, 16384 // length), length, heads, dim)):
                PROBE.show(
                    call.title, {label: call.kernel(chosen) for label, chosen in shared[dim].items()}, call.flops
                )


def shaped() -> None:
    """A softcap, ALiBi and both beside plain scores, and what ring-triton takes for them where it is installed too; of
    one head dim: only=D64."""
    heat()
    names = [name for name in ("cute", "triton") if name in backend_names()]
    for dim, heads in SHAPED.items():
        if PROBE.only not in f"D{dim}":
            continue
        sizes = ((1, 16384, n, dim) for n in (heads[0], heads[1], heads[1]))
        inputs = [torch.randn(size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
        dout = torch.randn_like(inputs[0]).detach()
        softcap, alibi = {"softcap": 50.0}, {"alibi_slopes": torch.rand(heads[0], device=DEVICE)}
        wanted: dict[str, dict[str, Any]] = {
            "plain": {}, "softcap": softcap, "alibi": alibi, "both": softcap | alibi,
        }  # fmt: skip
        for causal in (True, False):
            flops = (2 if causal else 4) * heads[0] * 16384**2 * dim
            there: dict[str, Any] = {}
            back: dict[str, Any] = {}
            for (kind, asked), name in product(wanted.items(), names):
                attend = partial(ring_attention, causal=causal, backend=name, **asked)
                there[f"{kind}, {name}"] = partial(attend, *(x.detach() for x in inputs))
                back[f"{kind}, {name}"] = partial(torch.autograd.grad, attend(*inputs), inputs, dout, retain_graph=True)
            title = f"S16384 H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full'}"
            PROBE.show(f"{title} forward", there, flops)
            PROBE.show(f"{title} backward", back, 2.5 * flops)


def shaped_variants() -> None:
    """Settings of scores with a softcap, and with ALiBi as well, beside each other."""
    heat()
    for (dim, tried), alibi in product(TRIED_SHAPED.items(), (False, True)):
        shipped, heads = settings_for(dim, softcap=True, alibi=alibi), SHAPED[dim]
        slopes = torch.rand(heads[0], device=DEVICE) if alibi else None
        for call in forward_calls(forward, (1, 16384, heads, dim)):
            call.params = replace(call.params, softcap=50.0, alibi_slopes=slopes)
            fns = {label_of(changed): call.kernel(replace(shipped, **changed)) for changed in tried}
            PROBE.show(f"{call.title} softcap{', ALiBi' * alibi}", fns, call.flops)


def locality() -> None:
    """How many bytes of keys and values concurrent tiles share: more heads at a time balance, fewer stay in L2."""
    heat()
    before = launching.L2_BYTES
    for length, causal in ((n, mask) for n in (4096, 16384, 32768) for mask in (True, False)):
        fns, shape = {}, (max(1, 16384 // length), length, (16, 16), 128)
        for size in (1, 8, 16, 24, 32, 48):
            launching.L2_BYTES = size << 20  # read when a table is seen for the first time
            call = ForwardCall(forward, shape, causal)
            fns[f"{size} MiB"] = call.kernel()
            fns[f"{size} MiB"]()
        PROBE.show(call.title, fns, call.flops)
    launching.L2_BYTES = before


def host() -> None:
    """Host time of a launch in steady state, of each kind."""
    for name, call in host_time.calls(DEVICE).items():
        PROBE.begin(f"host time, {name}")
        print(f"host: {host_microseconds(call):.1f} us, {name}", flush=True)


def clocks() -> None:
    """What clock and power a second of each leaves the GPU, and what share of the tensor cores' products that is."""
    heat()
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    call = ForwardCall(forward, (1, 16384, (16, 16), 128), False)
    fns = {label: call.kernel(chosen) for label, chosen in VARIANTS[128].items()}
    work = {label: (fn, call.flops) for label, fn in {**fns, "cuDNN": call.cudnn()}.items()}
    work["matrix product"] = (lambda: x @ x, 2.0 * 8192**3)
    ask = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    for label, (fn, each) in work.items():
        PROBE.begin(label)
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


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        compile_all()
    else:
        made = {
            f.__name__: f for f in (smoke, correct, host, variants, clusters, shaped, shaped_variants, locality, clocks)
        }
        sys.exit(PROBE.main(made, usual=("smoke", "correct", "host")))
