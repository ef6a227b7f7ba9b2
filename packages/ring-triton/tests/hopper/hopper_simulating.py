"""Compiles the Hopper forward without a GPU, runs on the CPU what comes out of Triton's passes, compares.

    python hopper_simulating.py [GROUP…]

Cases against the contract's reference in fp64: the host side of a launch, descriptors, schedule,
and all partitions of all CTAs with their barriers, in an order drawn at random. Copies arrive late and in any order,
products read shared memory as late as they may, so that a buffer given back too early shows. What it cannot tell:
instructions (`hopper_compiling.py`), layouts, memory fences. Exit status 1 if a check failed. Run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import ttgir
from hopper_compiling import NoGpu
from torch import Tensor
from ttgir_machine import Block, Cta, Descriptor, Pointer, Scope, Steps, Thread

from ring_core.backend import Flags, Params, on_device
from ring_core.plan import Problem, make_plan
from ring_core.segment import FIRST, LAST, Segment
from ring_core.testing.direct import (
    ForwardCase,
    causal_steps,
    causal_table,
    random_queries,
    run_forward,
    short_strips,
    table_of,
)
from ring_triton.hopper import launch
from ring_triton.hopper.compat import TensorDescriptor
from ring_triton.hopper.kernel import forward_kernel
from ring_triton.hopper.settings import Settings, settings_for

PROCESSORS = 3
WRITTEN = ("out", "lse", "state", "counter")
CPU = torch.device("cpu")
failures: list[str] = []
counters: dict[int, Tensor] = {}
modules: dict[int, tuple[list[str], Block]] = {}


class Simulated:
    """Takes the place of the kernel in `launch`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.memory: list[Tensor] = []
        self.arrays: dict[tuple[int, torch.dtype], np.ndarray] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: self.launch(grid[0], args, options)

    def launch(self, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernel = forward_kernel.warmup(*args, grid=(grid,), **options)
        if id(kernel) not in modules:
            modules[id(kernel)] = ttgir.parse(kernel.asm["ttgir"])
        declared, body = modules[id(kernel)]
        self.arrays.clear()
        given = dict(zip(forward_kernel.arg_names, args, strict=False))
        scope = {f"%{name}": self.value(value) for name, value in given.items() if f"%{name}" in declared}
        self.run(body, scope, grid)
        for name in WRITTEN:
            if isinstance(given[name], Tensor) and f"%{name}" in scope:
                _storage(given[name]).copy_(torch.from_numpy(scope[f"%{name}"].array))

    def value(self, given: Any) -> Any:
        """A kernel's argument, as the interpreter takes it."""
        if isinstance(given, TensorDescriptor):
            return self.descriptor(given)
        if isinstance(given, Tensor):
            return Pointer(self.array(_storage(given)), given.storage_offset())
        return np.float32(given) if isinstance(given, float) else given

    def array(self, flat: Tensor) -> np.ndarray:
        """A tensor's memory, the same for pointers and descriptors."""
        kind = torch.float32 if flat.is_floating_point() else torch.int32
        key = flat.data_ptr(), kind
        if key not in self.arrays:
            self.arrays[key] = flat.to(kind, copy=True).numpy()
        return self.arrays[key]

    def descriptor(self, given: TensorDescriptor) -> Descriptor:
        for flat in self.memory:
            offset = given.base.data_ptr() - flat.data_ptr()
            if 0 <= offset < flat.numel() * flat.element_size():
                size = flat.element_size()
                shape, strides, box = (list(map(int, x)) for x in (given.shape, given.strides, given.block_shape))
                return Descriptor(self.array(flat), offset // size, shape, strides, box, size)
        raise LookupError("a descriptor of memory that is not q, k, v, out or state")

    def run(self, body: Block, scope: Scope, grid: int) -> None:
        copies: list[Callable[[], None]] = []
        waiting: list[tuple[Steps, Callable[[], bool]]] = []
        threads = []
        for program in range(grid):
            cta = Cta(program, grid, copies)
            shared = dict(scope)
            for _ in ttgir.run(body, shared, Thread(cta)):
                raise AssertionError("a wait outside the partitions")
            (captured,) = body.find("ttg.warp_specialize")
            for part in (o for o in body.operations if o.regions):
                own = dict(shared)
                if part.name != "default":  # cut off from above: arguments stand for what is captured
                    names = ttgir.declared(part.text)
                    own = dict(zip(names, (shared[name] for name in captured.operands), strict=True))
                threads.append(Thread(cta))
                waiting.append((ttgir.run(part.regions[0], own, threads[-1]), lambda: True))
        while waiting or copies:
            ready = [n for n, (_, may_go) in enumerate(waiting) if may_go()]
            chosen = self.random.randrange(len(ready) + len(copies)) if ready or copies else None
            assert chosen is not None, f"deadlock: {len(waiting)} of {3 * grid} partitions wait for ever"
            if chosen >= len(ready):
                copies.pop(chosen - len(ready))()
                continue
            steps, _ = waiting.pop(ready[chosen])
            if (then := next(steps, None)) is not None:
                waiting.append((steps, then))
        for thread in threads:
            thread.end()


simulated = Simulated(seed=0)


def _storage(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


def install() -> None:
    """Puts the simulation under `launch.forward`."""
    triton.runtime.driver.set_active(NoGpu())
    launch.forward_kernel = simulated
    launch.processors = lambda _: PROCESSORS
    zero = counters.setdefault(0, torch.zeros(1, dtype=torch.int32))
    launch._counter = lambda q, stream: (zero, zero.data_ptr())
    launch.current_stream = lambda: lambda device: 0


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> None:
    out, state = args[0], args[2]
    simulated.memory = [_storage(x) for x in (q, k, v, out, state) if x is not None]
    with np.errstate(all="ignore"):
        launch.forward(q, k, v, *args, **options)


def of_case(*tensors: Any, params: Params, settings: Settings | None) -> None:
    forward(*tensors, scale=params.scale, sinks=params.sinks, settings=settings)


def check(case: ForwardCase) -> None:
    message, fine = run_forward(case, of_case, CPU)
    print(f"{'ok  ' if fine else 'FAIL'} {case.name}: {message}", flush=True)
    if not fine:
        failures.append(case.name)


def several_segments() -> None:
    """Strips of more than one segment, whose blocks are numbered through."""
    problem = Problem(1024, 1024, 1000, 1000, None, None, "contiguous", 2)
    plan = make_plan(problem, 0, "gather")
    tables = [step.forward for step in plan.steps]
    check(ForwardCase("contiguous x2, full, gather", tables, 512, heads=(2, 1), piece_length=plan.piece_length))
    for seed in range(6):
        check(random_queries(seed, heads=(2, 1), dim=64))


def zigzag() -> None:
    for layout, world, left in (("zigzag", 4, None), ("zigzag", 2, 150), ("stripe", 4, None)):
        for schedule in ("gather", "ring"):
            plan = make_plan(Problem(1024, 1024, 900, 900, left, 0, layout, world), world - 1, schedule)
            tables, length = [step.forward for step in plan.steps], getattr(plan, "piece_length", 0)
            name = f"{layout} x{world} window {left}, {schedule}"
            check(ForwardCase(name, tables, 1024 // world, heads=(2, 2), dim=64, piece_length=length))


def settings() -> None:
    strip = [
        Segment(0, 300, n, 0, 333, -300, 333 if n else 20, 0, 0, 1, -1, (FIRST if n == 0 else 0) | (LAST if n else 0))
        for n in range(2)
    ]
    base = settings_for(128)
    for name, chosen in {
        "ping-pong": replace(base, ping_pong=True),
        "overlap 0": replace(base, overlap=0),
        "block 64, 3 stages": replace(base, block=64, stages=3),
    }.items():
        check(ForwardCase(f"two segments, {name}", [table_of(strip)], 300, settings=chosen))


def widths() -> None:
    table = causal_table(300, 333, causal=True, k_position=-33)
    for dim in (40, 96, 256):
        check(ForwardCase(f"causal, D {dim}", [table], 300, heads=(2, 1), dim=dim))
    check(ForwardCase("sinks", [table], 300, heads=(2, 1), dim=64, sinks=True))
    check(ForwardCase("no key", [causal_table(200, 0, causal=False)], 200, heads=(2, 1), dim=64))


def steps() -> None:
    """Accumulating steps: whole and partial tiles, rows that see nothing in some of them."""
    for dim in (128, 96, 256):
        tables = causal_steps(300, (3, 2, 1, 0))
        check(ForwardCase(f"four steps, last keys first, D {dim}", tables, 300, heads=(2, 1), dim=dim))
    for dim in (64, 256):
        tables = causal_steps(300, (1, 0, 3, 2))
        check(ForwardCase(f"sinks, four steps, D {dim}", tables, 300, heads=(2, 1), dim=dim, sinks=True))
    for seed in range(3):
        simulated.random.seed(seed)
        check(ForwardCase(f"steps of short strips, order {seed}", short_strips(), 700, heads=(2, 1)))


def arrived() -> None:
    """Pieces whose flags say that they are here: the same result as without flags."""
    strip = [
        Segment(0, 200, n, 0, 150, -200, 150, 0, 0, 1, -1, (FIRST if n == 0 else 0) | (LAST if n == 2 else 0))
        for n in range(3)
    ]
    table = on_device(table_of(strip), CPU)
    q, kv = torch.randn(1, 200, 2, 64).bfloat16(), torch.randn(2, 3, 1, 150, 1, 64).bfloat16()
    there = Flags(torch.full((3,), -7, dtype=torch.int32), torch.full((1,), -8, dtype=torch.int32))  # read as unsigned
    got = []
    for flags in (None, there):
        out, lse = torch.full_like(q, torch.nan), torch.full((1, 2, 200), torch.nan)
        forward(q, kv[0], kv[1], out, lse, None, table, scale=0.125, flags=flags)
        got.append((out, lse))
    same = torch.equal(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1])
    print(f"{'ok  ' if same else 'FAIL'} with flags as without: {same}", flush=True)
    if not same:
        failures.append("arrived")


GROUPS = {f.__name__: f for f in (several_segments, zigzag, settings, widths, steps, arrived)}


def main() -> int:
    print("triton", triton.__version__, flush=True)
    install()
    for group in sys.argv[1:] or GROUPS:
        GROUPS[group]()
    left = [int(counter) for counter in counters.values() if int(counter)]
    print(f"failures: {failures}, counters not set back: {left}", flush=True)
    return bool(failures or left)


if __name__ == "__main__":
    sys.exit(main())
