"""The backward on a GPU, in one go: right against the contract's reference in fp64, then speed beside cuDNN.

    python packages/ring-cute/tests/gpu_probe_backward.py compile       # where the DSL is: fills RING_CUTE_CACHE
    python packages/ring-cute/tests/gpu_probe_backward.py [SECTION…]    # on the GPU: torch, apache-tvm-ffi, the cache

Sections: smoke, correct, flags, departures, deterministic, speed, variants, host (all if none but variants);
"only=WORD" picks the cases of `correct` that WORD is part of, and the cells of `speed`, and head dims (D256) of
`variants`. Each case is named before it is
launched. Exit status 1 if a check failed; a kernel that does not end ends the probe with 2. Where ring-triton and
flash_attn_4 are importable, their backwards are timed as well.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import util

import gpu_probe
import torch
import torch.nn.functional as F
from backward_cases import Case, chunks, one, own_batches, plans, random_case, run, simple, table_of
from gpu_probe import DEVICE, begin, finish
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_core.backend import Flags, Params, departures_of, on_device
from ring_core.segment import Segment
from ring_cute.hopper import backward_launch as launch
from ring_cute.hopper.backward_settings import (
    BackwardKind,
    BackwardSettings,
    EndsKind,
    backward_settings_for,
)

failures = gpu_probe.failures
only = ""

VARIANTS: dict[int, dict[str, BackwardSettings]] = {
    128: {
        "as shipped": backward_settings_for(128),
        "64 ahead, 2+2": BackwardSettings(q_stages=2, ahead=True),
        "64 ahead, 4+2": BackwardSettings(q_stages=4, ahead=True),
        "64, 2+2": BackwardSettings(),
        "64, 3+3": BackwardSettings(q_stages=3, do_stages=3),
    },
    64: {
        "as shipped": backward_settings_for(64),
        "64 ahead, 3+2": BackwardSettings(q_stages=3, ahead=True),
        "96 ahead, 4+3": BackwardSettings(block=96, q_stages=4, do_stages=3, ahead=True),
        "96, 2+2": BackwardSettings(block=96),
        "96 rolling, 3+2": BackwardSettings(block=96, q_stages=3, rolling=True),
    },
    192: {
        "as shipped": backward_settings_for(192),
        "2+2, two buffers of dq": BackwardSettings(),
        "2+1": BackwardSettings(do_stages=1, dq_buffers=3),
        "1+1": BackwardSettings(q_stages=1, do_stages=1, dq_buffers=3),
    },
    256: {
        "as shipped": backward_settings_for(256),
        "1+1": BackwardSettings(q_stages=1, do_stages=1),
        "1+1, four buffers of dq": BackwardSettings(q_stages=1, do_stages=1, dq_buffers=4),
    },
}

PADDED = (96, 40, 160, 200)
WAITING = (128, 256)
"""Head dims of `flags` and `departures`."""


def kinds() -> Iterator[BackwardKind | EndsKind]:
    """Every kernel that the probe launches, those of `speed` first."""
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
    for dim in WAITING:
        yield BackwardKind("bfloat16", dim, "added", True, True, backward_settings_for(dim))
    for dim in PADDED:
        yield EndsKind("prepare", "bfloat16", dim)
        yield EndsKind("finish", "bfloat16", dim)
        yield BackwardKind("bfloat16", dim, "shared", False, False, backward_settings_for(dim))


def compile_all() -> None:
    gpu_probe.os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
    from ring_cute import library

    for kind in dict.fromkeys(kinds()):
        if library.find(kind) is None:
            library.build(kind)
            print(library.path_of(kind), flush=True)


def check(case: Case) -> None:
    if only not in case.name:
        return
    begin(case.name)
    start = time.monotonic()
    try:
        message, fine = run(case, DEVICE)
        finish(case.name)
    except Exception:  # a probe goes on to the next case, and says what happened
        fine, message = False, traceback.format_exc(limit=-3)
    print(f"{'ok  ' if fine else 'FAIL'} {case.name}: {message} ({time.monotonic() - start:.1f} s)", flush=True)
    if not fine:
        failures.append(case.name)


def smoke() -> None:
    """One block, then a few: what to look at first where everything else fails."""
    check(Case("smoke: one block", [one(64, 128)], 64, heads=(1, 1)))
    check(Case("smoke: two blocks", [one(128, 128)], 128, heads=(1, 1)))
    check(Case("smoke: eight blocks, four tiles", [one(512, 512)], 512, heads=(1, 1)))
    check(Case("smoke: few keys", [one(64, 5)], 64, heads=(1, 1)))
    check(Case("smoke: few rows", [one(5, 128)], 5, heads=(1, 1)))
    for dim in (192, 256):
        check(Case(f"smoke: one block D{dim}", [one(64, 64)], 64, heads=(1, 1), dim=dim))
        check(Case(f"smoke: eight blocks, eight tiles D{dim}", [one(512, 512)], 512, heads=(1, 1), dim=dim))
        check(Case(f"smoke: few keys D{dim}", [one(64, 5)], 64, heads=(1, 1), dim=dim))


def correct() -> None:
    for dim in (*VARIANTS, *PADDED):
        for case in simple(dim, heads=(4, 2)):
            check(case)
    for dim, tried in VARIANTS.items():
        for label, chosen in list(tried.items())[1:]:
            for case in (*simple(dim, settings=chosen), random_case(2, dim, settings=chosen)):
                check(replace(case, heads=(4, 2), name=f"{label}: {case.name}"))
    for dim in VARIANTS:
        for case in (*plans(dim), chunks(dim), own_batches(dim), *(random_case(s, dim) for s in range(12))):
            check(case)
        for heads in ((3, 3), (4, 2)):
            for case in simple(dim, final=True, heads=heads):
                check(replace(case, name=f"final {heads}: {case.name}"))
        for case in simple(dim, departures=True, heads=(4, 2)):
            check(replace(case, name=f"departures: {case.name}"))
        for case in simple(dim, dtype=torch.float16):
            check(replace(case, name=f"fp16: {case.name}"))
    for dim in WAITING:
        check(replace(chunks(dim), name=f"departures: four steps D{dim}", departures=True))
    check(Case("sinks", [one(512, 512, causal=True)], 512, heads=(4, 2), sinks=True))
    check(Case("dlse", [one(512, 512, causal=True)], 512, heads=(4, 2), dlse=True))
    for dim in VARIANTS:
        check(Case(f"8192 causal D{dim}", [one(8192, 8192, causal=True)], 8192, heads=(4, 4), dim=dim))


def departures() -> None:
    for dim in WAITING:
        _departures(dim)


def _departures(dim: int) -> None:
    """Each piece's dk, dv as they are when its counter is full, taken by another stream, against the final ones."""
    begin("departures")
    pieces, length, q_len, heads = 4, 1024, 4096, (16, 4)
    torch.manual_seed(0)
    strips = [[Segment(0, q_len, c, 0, length, -q_len, length, 0, 0, 1, -1, 3)] for c in range(pieces)]
    table = on_device(table_of(*strips), DEVICE)
    q, dout, out = (torch.randn(1, q_len, heads[0], dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    kv = torch.randn(2, pieces, 1, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
    lse = torch.full((1, heads[0], q_len), 8.0, device=DEVICE)
    targets = departures_of(table.host, pieces, 1, heads[1])
    params = Params(dim**-0.5)
    side = torch.cuda.Stream()
    for attempt in range(3):
        dkv = torch.zeros(2, pieces, 1, length, heads[1], dim, device=DEVICE)
        counters = torch.zeros(pieces, dtype=torch.int32, device=DEVICE)
        copies = torch.empty_like(dkv)
        state = launch.prepare(q, out, dout, lse, None)
        torch.cuda.synchronize()
        launch.backward(state, q, kv[0], kv[1], dout, dkv[0], dkv[1], table, params=params, departures=counters)
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
        finish("departures")
        fine = not left and torch.equal(copies, dkv)
        print(f"{'ok  ' if fine else 'FAIL'} departures D{dim} {attempt}: {early} pieces taken while others were "
              f"computed, counters {counters.tolist()} of {targets}", flush=True)  # fmt: skip
        if not fine:
            failures.append("departures")


def flags() -> None:
    for dim in WAITING:
        _flags(dim)


def _flags(dim: int) -> None:
    """Pieces of NaN until the copy engine brings them, late; dk and dv equal those of all present."""
    begin("flags")
    pieces, length, q_len, heads = 4, 512, 1024, (8, 4)
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
    counters = torch.zeros(pieces, dtype=torch.int32, device=DEVICE)
    side = torch.cuda.Stream()

    def go() -> Tensor:
        dkv = torch.zeros(2, pieces, 1, length, heads[1], dim, device=DEVICE)
        state = launch.prepare(q, out, dout, lse, None)
        torch.cuda.synchronize()
        waits = Flags(arrived, epoch)
        launch.backward(
            state, q, kv[0], kv[1], dout, dkv[0], dkv[1], table, params=params, flags=waits, departures=counters
        )
        return dkv

    want = go()
    finish("flags")
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
        finish("flags")
        fine = torch.equal(got, want)
        print(
            f"{'ok  ' if fine else 'FAIL'} D{dim}, pieces arriving in order {order}: dk, dv bitwise equal {fine}",
            flush=True,
        )
        if not fine:
            failures.append(f"flags {order}")
    memory.fill_(torch.nan)
    arrived.fill_(-1)  # poison
    go()
    finish("poison")
    print("ok   poison: the kernel ends", flush=True)


class Call:
    """Randn inputs in bf16 and the ways to go backward through them."""

    def __init__(self, batch: int, length: int, heads: tuple[int, int], dim: int, causal: bool) -> None:
        self.table = on_device(one(length, length, causal=causal), DEVICE)
        self.causal, self.params = causal, Params(dim**-0.5)
        shape = (batch, length, heads[0], dim)
        self.q, self.dout = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.kv = torch.randn(2, 1, batch, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
        self.dkv = torch.zeros(self.kv.shape, device=DEVICE)
        self.final = torch.zeros_like(self.kv)
        self.group = heads[0] // heads[1]
        self.flops = 10.0 * batch * heads[0] * length * length * dim * (0.5 if causal else 1.0)
        self.leaves = [self.q.transpose(1, 2).detach().requires_grad_()]
        self.leaves += [
            x[0].repeat_interleave(self.group, dim=2).transpose(1, 2).detach().requires_grad_() for x in self.kv
        ]
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = torch.ops.aten._scaled_dot_product_flash_attention(*self.leaves, 0.0, causal)
        self.out, self.lse = flash[0].transpose(1, 2).contiguous(), flash[1].float()
        self.state = launch.prepare(self.q, self.out, self.dout, self.lse, None)

    def main(self, settings: BackwardSettings | None = None) -> Callable[[], None]:
        """The main kernel alone."""
        fixed = (self.state, self.q, self.kv[0], self.kv[1], self.dout, self.final[0], self.final[1], self.table)
        params = self.params
        return lambda: launch.backward(*fixed, params=params, settings=settings)

    def prepare(self) -> None:
        launch.prepare(self.q, self.out, self.dout, self.lse, None)

    def finish(self) -> None:
        launch.finish(self.state, params=self.params)

    def whole(self) -> None:
        state = launch.prepare(self.q, self.out, self.dout, self.lse, None)
        launch.backward(
            state, self.q, self.kv[0], self.kv[1], self.dout, self.final[0], self.final[1], self.table,
            params=self.params,
        )  # fmt: skip
        launch.finish(state, params=self.params)

    def triton(self) -> None:
        from ring_triton.hopper import backward_launch as theirs

        state = theirs.prepare(self.q, self.out, self.dout, self.lse, None)
        theirs.backward(
            state, self.q, self.kv[0], self.kv[1], self.dout, self.final[0], self.final[1], self.table,
            params=self.params,
        )  # fmt: skip
        theirs.finish(state, params=self.params)

    def fa4(self) -> None:
        from flash_attn.cute.interface import _flash_attn_bwd

        _flash_attn_bwd(self.q, self.kv[0, 0], self.kv[1, 0], self.out, self.dout, self.lse, causal=self.causal)

    def cudnn(self) -> Callable[[], None]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*self.leaves, is_causal=self.causal)
        grad = self.dout.transpose(1, 2)

        def go() -> None:
            torch.autograd.grad(out, self.leaves, grad, retain_graph=True)

        return go


def compare(fns: dict[str, Callable[[], None]], rounds: int = 3) -> dict[str, float]:
    """Milliseconds of each, the best of interleaved rounds of about 12 ms."""
    number = {}
    for name, fn in fns.items():
        begin(name)
        fn()
        finish(name)
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
    return best


CELLS = [(max(1, 16384 // s), s, h, 128) for s in (4096, 8192, 16384, 32768) for h in ((16, 16), (32, 8), (64, 8))]
CELLS = [(b if h[0] < 64 else max(1, b // 2), s, h, d) for b, s, h, d in CELLS]
CELLS += [(4, 4096, (32, 32), 64), (1, 16384, (32, 32), 64)]
CELLS += [(max(1, 16384 // s), s, (16, 16), d) for d in (192, 256) for s in (4096, 16384)]


def others() -> dict[str, str]:
    """What else can be timed here."""
    found = {}
    if util.find_spec("ring_triton") and util.find_spec("triton"):
        found["triton"] = "triton"
    if util.find_spec("flash_attn") and util.find_spec("flash_attn.cute") and util.find_spec("cutlass"):
        found["FA4"] = "fa4"
    return found


def speed() -> None:
    ratios: dict[int, list[float]] = {dim: [] for dim in VARIANTS}
    for batch, length, heads, dim in CELLS:
        for causal in (True, False):
            name = f"B{batch} S{length} H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full'}"
            if only not in name:
                continue
            call = Call(batch, length, heads, dim, causal)
            fns: dict[str, Callable[[], None]] = {
                "prepare": call.prepare, "main": call.main(), "finish": call.finish, "whole": call.whole,
                "cuDNN": call.cudnn(),
            }  # fmt: skip
            fns |= {label: getattr(call, method) for label, method in others().items()}
            got = compare(fns)
            ratios[dim].append(got["cuDNN"] / got["whole"])
            ends = ", ".join(f"{label} {got.pop(label) * 1e3:.0f} us" for label in ("prepare", "finish"))
            rates = " ".join(f"{label} {call.flops / t / 1e9:.0f}" for label, t in got.items())
            print(f"{name}: {rates}; {ends}; x cuDNN {ratios[dim][-1]:.3f}", flush=True)
            del call, fns
    for dim, found in ratios.items():
        if found:
            print(f"D{dim}: x cuDNN mean {statistics.geometric_mean(found):.3f}, worst {min(found):.3f}", flush=True)


def variants() -> None:
    """The main kernel's settings beside each other, rounds interleaved so that clocks drift for all alike."""
    for batch, length, heads, dim in (
        (4, 4096, (16, 16), 128),
        (1, 16384, (16, 16), 128),
        (1, 16384, (32, 8), 128),
        (4, 4096, (32, 32), 64),
        (1, 16384, (32, 32), 64),
        (4, 4096, (16, 16), 192),
        (1, 16384, (16, 16), 192),
        (4, 4096, (16, 16), 256),
        (1, 16384, (16, 16), 256),
    ):
        if only not in f"D{dim}":
            continue
        for causal in (True, False):
            call = Call(batch, length, heads, dim, causal)
            fns: dict[str, Callable[[], None]] = {name: call.main(chosen) for name, chosen in VARIANTS[dim].items()}
            fns["cuDNN"] = call.cudnn()
            got = compare(fns)
            print(f"B{batch} S{length} H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full'}: "
                  + "; ".join(f"{name} {call.flops / t / 1e9:.0f}" for name, t in got.items()), flush=True)  # fmt: skip
            del call, fns


def deterministic() -> None:
    """dq in a fixed order: the same bits from run to run, and what that costs."""
    for dim in VARIANTS:
        cases = [*simple(dim, heads=(4, 2)), chunks(dim), own_batches(dim), *(random_case(s, dim) for s in range(4))]
        for case in cases:
            check(replace(case, name=f"deterministic: {case.name}", deterministic=True, repeat=3, dlse=False))
    check(Case("deterministic: 4096 causal", [one(4096, 4096, causal=True)], 4096, heads=(8, 8), deterministic=True,
               repeat=3))  # fmt: skip
    for batch, length, heads, dim in (
        (4, 4096, (16, 16), 128),
        (1, 16384, (16, 16), 128),
        (1, 16384, (32, 32), 64),
        (1, 16384, (16, 16), 192),
        (1, 16384, (16, 16), 256),
    ):
        for causal in (True, False):
            call = Call(batch, length, heads, dim, causal)
            fns = {"any order": call.main()}
            call.params = replace(call.params, deterministic=True)
            fns["ordered"] = call.main()
            got = compare(fns)
            print(f"B{batch} S{length} H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full'}: "
                  + "; ".join(f"{name} {call.flops / t / 1e9:.0f}" for name, t in got.items()), flush=True)  # fmt: skip
            del call, fns


def host() -> None:
    """Host time of each launch in steady state."""
    begin("host time")
    call = Call(1, 256, (4, 4), 128, True)
    for name, fn in (("prepare", call.prepare), ("main", call.main()), ("finish", call.finish)):
        for _ in range(20):
            fn()
        torch.cuda.synchronize()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                fn()
            times.append((time.perf_counter() - start) / 50 * 1e6)
            torch.cuda.synchronize()
        print(f"host: {name} {statistics.median(times):.1f} us a launch", flush=True)


def main() -> int:
    if sys.argv[1:] == ["compile"]:
        compile_all()
        return 0
    sections = {f.__name__: f for f in (smoke, correct, flags, departures, deterministic, speed, variants, host)}
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    global only
    picked = [word for word in sys.argv[1:] if word.startswith("only=")]
    only = picked[-1].removeprefix("only=") if picked else ""
    names = [word for word in sys.argv[1:] if word not in picked]
    for name in names or [name for name in sections if name != "variants"]:
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
