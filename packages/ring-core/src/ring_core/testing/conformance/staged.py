"""A backend that watches pieces come and go, on a GPU: late pieces do not change a bit, and what departs is final.

One process plays the transport. Pieces lie in pinned host memory and are brought by copy engines, each behind a stream
wait that a thread of the host releases: no kernel, which would want the multiprocessors that a waiting kernel holds.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core.backend import (
    POISON,
    Backend,
    Flags,
    Params,
    departures_of,
    load_backend,
    on_device,
    takes_flags,
)
from ring_core.comm.stream_memory import Wait, Write, enqueue
from ring_core.plan import GatherPlan, Problem, make_plan

EPOCH = 5
PATIENCE = 60.0  # seconds until the watchdog poisons the flags


@dataclass(frozen=True)
class StagedCase:
    """A rank of a simulated gather over `world_size` ranks of `length` tokens in all."""

    length: int = 4096
    layout: str = "contiguous"
    world_size: int = 4
    rank: int = 3
    causal: bool = False
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.layout}-{mask}-{self.length}-{self.rank}of{self.world_size}-dim{self.head_dim}"

    @property
    def plan(self) -> GatherPlan:
        n = self.length
        problem = Problem(n, n, n, n, None, 0 if self.causal else None, self.layout, self.world_size)
        plan = make_plan(problem, self.rank, "gather")
        assert isinstance(plan, GatherPlan)
        return plan

    @property
    def orders(self) -> list[list[int]]:
        """Every order of up to four pieces; of more, some in which each is first and last once."""
        count = self.plan.piece_count
        if count <= 4:
            return [list(order) for order in permutations(range(count))]
        forward = [[(first + n) % count for n in range(count)] for first in range(count)]
        return forward + [order[::-1] for order in forward]

    def skip_unless_staged(self, backend: str, *, backward: bool) -> None:
        """Skips a test whose kernels do not watch pieces on this device."""
        q = torch.empty(1, 1, self.heads[0], self.head_dim, dtype=self.dtype, device="cuda")
        can = load_backend(backend).capabilities(q.device)
        able = can.available and can.takes(self.head_dim, gradients=backward)
        if not able or not takes_flags(load_backend(backend), q, q if backward else None, Params(1.0)):
            direction = "backward" if backward else "forward"
            pytest.skip(f"backend {backend!r} has no kernel here that waits in the {direction}: {can.reason or self}")


class _Pieces:
    """Keys of all pieces, (1, C * S, 2, Hkv, D) as transports lay them out, here and in pinned memory."""

    def __init__(self, case: StagedCase, seed: int) -> None:
        plan = case.plan
        self.count, self.length = plan.piece_count, plan.piece_length
        self.device = torch.device("cuda", torch.cuda.current_device())
        shape = (self.count, self.length, 2, case.heads[1], case.head_dim)
        generator = torch.Generator().manual_seed(seed)
        self.source = torch.randn(shape, generator=generator).to(case.dtype).pin_memory()
        self.here = self.source.to(self.device)
        self.flags = torch.zeros(self.count, dtype=torch.int32, device=self.device)
        self.epoch = torch.full((1,), EPOCH, dtype=torch.int32, device=self.device)

    def views(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (C, 1, S, H, D) of (C, S, 2, H, D)."""
        return whole[:, None, :, 0], whole[:, None, :, 1]

    def forget(self) -> None:
        """NaN everywhere, and no piece has arrived."""
        self.here.fill_(torch.nan)
        self.flags.zero_()
        torch.cuda.synchronize()

    def deliver(self, order: list[int], delay: float) -> _Delivery:
        """Enqueues all copies and flags; a thread lets one more through every `delay` seconds."""
        gates = torch.zeros(self.count, dtype=torch.int32).pin_memory()
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            for number, piece in enumerate(order):
                enqueue(stream.cuda_stream, [Wait(gates.data_ptr() + 4 * number, 1)])
                self.here[piece].copy_(self.source[piece], non_blocking=True)
                enqueue(stream.cuda_stream, [Write(self.flags.data_ptr() + 4 * piece, EPOCH)])
        return _Delivery(gates, self.flags, delay)


class _Delivery:
    """Lets pieces through while it lasts, and is the watchdog."""

    def __init__(self, gates: Tensor, flags: Tensor, delay: float) -> None:
        self._gates, self._flags, self._delay = gates, flags, delay
        self._done = threading.Event()
        self.poisoned = False
        self._poison = torch.full(flags.shape, POISON - (1 << 32), dtype=torch.int32).pin_memory()
        self._beside = torch.cuda.Stream(flags.device)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Delivery:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self._done.set()
        self._thread.join()
        assert not self.poisoned, f"the kernel waited {PATIENCE} s for what was there"

    def _run(self) -> None:
        for number in range(len(self._gates)):
            time.sleep(self._delay)
            self._gates[number] = 1
        if not self._done.wait(PATIENCE):
            self.poisoned = True
            with torch.cuda.stream(self._beside):
                self._flags.copy_(self._poison, non_blocking=True)


def _queries(case: StagedCase, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (1, case.length // case.world_size, case.heads[0], case.head_dim)
    q, dout = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(2))
    return q, dout


def _forward(backend: Backend, case: StagedCase, q: Tensor, pieces: _Pieces, flags: Flags | None) -> list[Tensor]:
    out = torch.full_like(q, torch.nan)
    lse = torch.full((1, q.shape[2], q.shape[1]), torch.nan, device=q.device)
    table = on_device(case.plan.steps[0].forward, q.device)
    params = Params(case.head_dim**-0.5)
    torch.cuda.current_stream().synchronize()  # so that little is between the delivery and the launch
    backend.forward(q, *pieces.views(pieces.here), out, lse, None, table, params=params, flags=flags)
    return [out, lse]


def check_late_arrivals(backend: Backend, case: StagedCase, orders: list[list[int]], *, seed: int = 0) -> None:
    """Raises AssertionError unless a forward over pieces that arrive late, in whatever order, is that over all of them
    present, to the bit, though what has not arrived holds NaN."""
    pieces = _Pieces(case, seed)
    q, _ = _queries(case, pieces.device, seed)
    want = _forward(backend, case, q, pieces, None)
    pieces.flags.fill_(EPOCH)
    flags = Flags(pieces.flags, pieces.epoch)
    _forward(backend, case, q, pieces, flags)  # compiled and loaded before anything waits
    torch.cuda.synchronize()
    for order in orders:
        pieces.forget()
        with pieces.deliver(order, 0.01):
            got = _forward(backend, case, q, pieces, flags)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), f"{case}: pieces came as {order}"


def check_poison(backend: Backend, case: StagedCase, *, seed: int = 0) -> None:
    """Raises AssertionError unless poison ends a forward whose pieces never come."""
    pieces = _Pieces(case, seed)
    q, _ = _queries(case, pieces.device, seed)
    pieces.flags.fill_(EPOCH)
    flags = Flags(pieces.flags, pieces.epoch)
    _forward(backend, case, q, pieces, flags)  # compiled and loaded before anything waits
    pieces.forget()
    poison = torch.full(pieces.flags.shape, POISON - (1 << 32), dtype=torch.int32).pin_memory()
    beside, poisoned = torch.cuda.Stream(pieces.device), threading.Event()

    def watchdog() -> None:
        time.sleep(0.3)
        with torch.cuda.stream(beside):
            pieces.flags.copy_(poison, non_blocking=True)
        poisoned.set()

    thread = threading.Thread(target=watchdog, daemon=True)
    begin = time.monotonic()
    thread.start()
    _forward(backend, case, q, pieces, flags)
    torch.cuda.synchronize()
    thread.join()
    took = time.monotonic() - begin
    assert poisoned.is_set() and 0.3 <= took < 10, f"{case}: the kernel ended after {took:.1f} s"


@dataclass(frozen=True)
class Departed:
    """What `check_departures` saw: when pieces left, in milliseconds before the end of the kernel."""

    early: tuple[float, ...]


def check_departures(
    backend: Backend, case: StagedCase, order: list[int] | None = None, *, repeatable: bool = True, seed: int = 0
) -> Departed:
    """Raises AssertionError unless dk and dv of a piece, copied when its counter is full, are the final ones, and those
    of all pieces present also where pieces arrive late, in `order`.

    repeatable: dq, dk and dv are the same bits from run to run.
    """
    pieces = _Pieces(case, seed)
    q, dout = _queries(case, pieces.device, seed)
    out, lse = _forward(backend, case, q, pieces, None)
    params = Params(case.head_dim**-0.5, deterministic=repeatable)
    table = on_device(case.plan.steps[0].backward, q.device)
    full = departures_of(table.host, pieces.count, 1, case.heads[1])
    copies: list[Tensor] = []
    early: list[float] = []

    def run(flags: Flags | None, *, watched: bool) -> list[Tensor]:
        sums = torch.zeros(pieces.source.shape, device=q.device)  # (C, S, 2, H, D)
        counters = torch.zeros(pieces.count, dtype=torch.int32, device=q.device)
        k_shape = torch.Size((1, case.length // case.world_size, case.heads[1], case.head_dim))
        state: Any = backend.prepare(q, k_shape, out, dout, lse, None, params=params)
        snapshots = [torch.empty(sums.shape[1:]).pin_memory() for _ in range(pieces.count)]
        torch.cuda.current_stream().synchronize()
        staged: dict[str, Any] = {"flags": flags, "departures": None if flags is None else counters}
        views = pieces.views(pieces.here), pieces.views(sums)
        backend.backward(state, q, *views[0], dout, *views[1], table, params=params, **staged)
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        if watched:
            beside = torch.cuda.Stream(q.device)
            left = [torch.cuda.Event(enable_timing=True) for _ in range(pieces.count)]
            with torch.cuda.stream(beside):
                for piece in dict.fromkeys(segment.piece for segment in table.host.segments):  # as they are visited
                    enqueue(beside.cuda_stream, [Wait(counters.data_ptr() + 4 * piece, full[piece])])
                    snapshots[piece].copy_(sums[piece], non_blocking=True)
                    left[piece].record(beside)
            torch.cuda.synchronize()
            assert tuple(counters.tolist()) == full, f"{case}: departures {counters.tolist()}, not {full}"
            for piece, snapshot in enumerate(snapshots):
                assert torch.equal(snapshot, sums[piece].cpu()), f"{case}: piece {piece} left before it was complete"
            copies[:] = snapshots
            early[:] = [event.elapsed_time(end) for event in left]
        dq, _ = backend.finish(state, params=params)
        return [sums, dq]

    want = run(None, watched=False)
    pieces.flags.fill_(EPOCH)
    flags = Flags(pieces.flags, pieces.epoch)
    got = [run(flags, watched=True)]
    if order is not None:
        pieces.forget()
        with pieces.deliver(order, 0.01):
            got.append(run(flags, watched=True))
    for found in got:
        for a, b in zip(found, want, strict=True):
            if repeatable:
                assert torch.equal(a, b), f"{case}: not the bits of a call whose pieces are all there"
            else:
                torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    return Departed(tuple(early))
