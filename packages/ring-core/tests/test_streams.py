"""Gathers through peer memory on streams that run in any order: nothing is read before it is there, and all ends.

Everything that a GPU would do is put off: hosts only enqueue, rank after rank. Then what is first in the streams of all
ranks is carried out in a random order, as far as marks and words allow.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core import backward as orchestration
from ring_core import plan_packed
from ring_core.backend import Params, load_backend
from ring_core.backward import backward
from ring_core.comm import gather, lane, peer, symmetric_memory
from ring_core.comm.gather import GatherTransport
from ring_core.comm.lane import Lane
from ring_core.comm.peer import PeerCourier, Pull
from ring_core.comm.stream_memory import Wait, Write
from ring_core.comm.symmetric_memory import SymmetricMemory
from ring_core.forward import forward
from ring_core.plan import GatherPlan, make_plan
from ring_core.testing import attention_oracle

WORLD, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
ARENA = 1 << 16  # bytes of a slot
Task = tuple[Callable[[], bool], Callable[[], object]]
"""When it may be done, and what."""


class Stream:
    device_index, device_type = 0, 1

    def __init__(self, machine: Machine) -> None:
        self.stream_id, self.rank = len(machine.streams), machine.rank
        self.tasks: deque[Task] = deque()
        machine.streams.append(self)

    def put(self, task: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self.tasks.append((ready, task))


class Mark:
    """A `torch.Event`."""

    device = SimpleNamespace(index=0)

    def __init__(self) -> None:
        self.passed = False

    def passes(self) -> None:
        self.passed = True


class Machine:
    """All streams of all ranks; `current` is that of the host that is enqueuing."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.rank = 0
        self.current = Stream(self)
        self.pulled: list[Tensor] = []  # in this call
        self.alive: list[Tensor] = []  # whose addresses are in streams

    def put(self, task: Callable[[], object]) -> None:
        self.current.put(task)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record_event(self, stream: Stream) -> Mark:
        mark = Mark()
        stream.put(mark.passes)
        return mark

    def wait_event(self, stream: Stream, mark: Mark) -> None:
        stream.put(lambda: None, lambda: mark.passed)

    def wait_stream(self, stream: Stream, other: Stream) -> None:
        assert stream is not other
        self.wait_event(stream, self.record_event(other))

    def memory_operations(self, stream: int, operations: list[Wait | Write]) -> None:
        for operation in operations:
            word, value = ctypes.c_int32.from_address(operation.address), operation.value
            if isinstance(operation, Write):
                self.streams[stream].put(lambda word=word, value=value: setattr(word, "value", value))
            else:
                self.streams[stream].put(lambda: None, lambda word=word, value=value: word.value >= value)

    def copy_all(self, stream: int, target: int, copies: list[tuple[int, int, int]]) -> None:
        for place, source, nbytes in copies:
            self.streams[stream].put(
                lambda to=target + place, source=source, nbytes=nbytes: ctypes.memmove(to, source, nbytes)
            )

    def run(self, chance: random.Random) -> None:
        """Until nothing is left, a few tasks of one stream at a time; some ranks are much faster than others."""
        speed = chance.sample([1, 30, 1000], WORLD)
        while waiting := [stream for stream in self.streams if stream.tasks]:
            ready = [stream for stream in waiting if stream.tasks[0][0]()]
            assert ready, f"{len(waiting)} streams wait for each other"
            (stream,) = chance.choices(ready, [speed[stream.rank] for stream in ready])
            for _ in range(chance.choice((1, 3, 100))):
                if not stream.tasks or not stream.tasks[0][0]():
                    break
                stream.tasks.popleft()[1]()


class PutOff:
    """The reference backend, on streams; dk and dv are written, not added to."""

    name = "put off"

    def __init__(self, machine: Machine) -> None:
        self.machine, self.inner = machine, load_backend("reference")

    def forward(self, *given: Any, **options: Any) -> None:
        self.machine.put(lambda: self.inner.forward(*given, **options))

    def prepare(self, q: Tensor, *given: Any, params: Params) -> dict[str, Any]:
        state: dict[str, Any] = {"dq": torch.full_like(q, torch.nan)}
        self.machine.put(lambda: state.update(inner=self.inner.prepare(q, *given, params=params)))
        return state

    def backward(self, state: dict[str, Any], *given: Any, **options: Any) -> None:
        def compute() -> None:
            *_, dk, dv, _ = given
            dk.zero_()
            dv.zero_()
            self.inner.backward(state["inner"], *given, **options)

        self.machine.put(compute)

    def finish(self, state: dict[str, Any], *, params: Params) -> tuple[Tensor, None]:
        self.machine.put(lambda: state["dq"].copy_(self.inner.finish(state["inner"], params=params)[0]))
        return state["dq"], None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    class Signals:
        def __init__(self, written: list[int], awaited: list[int]) -> None:
            self.written, self.awaited = written, awaited

        def enqueue(self, stream: int, value: int) -> None:
            words = [*(Write(word, value) for word in self.written), *(Wait(word, value) for word in self.awaited)]
            made.memory_operations(stream, words)

    def pull(self: SymmetricMemory, target: Tensor, generation: int, some: Pull) -> None:
        made.pulled.append(target.fill_(torch.nan))
        original_pull(self, target, generation, some)

    def put_off(function: Callable[..., object]) -> Callable[..., None]:
        return lambda *given, **options: made.put(lambda: function(*given, **options))

    def turns(self: lane.Turns, device: torch.device, **options: Any) -> None:
        original_turns(self, SimpleNamespace(type="cuda", index=0), **options)  # type: ignore[arg-type]

    original_pull, original_turns = SymmetricMemory.pull, lane.Turns.__init__
    patches: list[tuple[Any, str, Any]] = [
        (lane, "torch", SimpleNamespace(Stream=made, Event=torch.Event)),
        (lane, "current_stream", lambda index: made.current),
        (lane, "OnStream", made.on),
        (lane.Turns, "__init__", turns),
        (symmetric_memory, "current_stream_handle", lambda device: made.current.stream_id),
        (symmetric_memory, "Signals", Signals),
        (symmetric_memory, "copy_all", made.copy_all),
        (symmetric_memory.dist, "get_rank", lambda group: group.rank),
        (symmetric_memory.dist, "get_world_size", lambda group: WORLD),
        (SymmetricMemory, "watch", lambda self, epoch: None),
        (SymmetricMemory, "pull", pull),
        (peer, "side_by_side", put_off(peer.side_by_side)),
        (gather, "sum_in_rank_order", put_off(gather.sum_in_rank_order)),
        (orchestration, "_keep", put_off(orchestration._keep)),
    ]
    for where, name, value in patches:
        monkeypatch.setattr(where, name, value)
    return made


@dataclass(eq=False)
class Member:
    """As much of a process group as is asked for."""

    rank: int


def memories() -> list[dict[str, SymmetricMemory]]:
    """Of all ranks, large enough for all calls."""
    found: list[dict[str, SymmetricMemory]] = [{} for _ in range(WORLD)]
    for name in ("keys", "gradients"):
        made = [SymmetricMemory(Member(rank), torch.device("cpu"), name) for rank in range(WORLD)]  # type: ignore[arg-type]
        arenas = [torch.zeros(memory._header + 2 * ARENA, dtype=torch.uint8) for memory in made]
        for rank, memory in enumerate(made):
            memory._arenas, memory._addresses, memory._size = arenas, [x.data_ptr() for x in arenas], ARENA
            found[rank][name] = memory
    return found


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["balanced", "contiguous", "zigzag"])
def test_packed_documents_on_streams_in_any_order(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layout: Any, groups: int, kept: bool, seed: int
) -> None:
    """Five calls in a row, whose slots are reused; each rank's hosts enqueue all of theirs before anything runs."""
    cu, calls, at_once = [0, 5, 17, 23, 40, 54], 5, KV_HEADS // groups
    heads = tuple(slice(start, start + at_once) for start in range(0, KV_HEADS, at_once))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, cu[-1], number, DIM) for number in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    whole = [[torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes] for _ in range(calls)]
    params, arenas, found = Params(0.3), memories(), []
    plans = [plan_packed(cu, layout=layout, causal=True, rank=rank, world_size=WORLD) for rank in range(WORLD)]
    if kept and groups > 1:
        pytest.skip("groups take turns in their buffers")

    def enqueue(rank: int, given: list[Tensor], lanes: tuple[Lane, Lane]) -> list[Tensor]:
        plan = make_plan(plans[rank].problem, rank, "gather")
        assert isinstance(plan, GatherPlan)
        truth = [plans[rank].shard(x, dim=1) for x in given]
        q, k, v, dout = inputs = [torch.full_like(x, torch.nan) for x in truth]
        machine.put(lambda: [x.copy_(y) for x, y in zip(inputs, truth, strict=True)])

        def moved(way: Lane, **options: Any) -> GatherTransport:
            courier = PeerCourier(plan, arenas[rank].__getitem__, lanes)
            urgent = way if groups == 1 and plan.home is not None else None
            return GatherTransport(plan, courier, heads, urgent=urgent, **options)

        there, back = lanes
        out, lse = torch.full_like(q, torch.nan), q.new_full((1, HEADS, q.shape[1]), torch.nan)
        common: dict[str, Any] = {"plan": plan, "backend": PutOff(machine), "params": params}
        transport = moved(there, keep=kept)
        forward(q, k, v, out, lse, transport=transport, **common)
        transport = moved(back, gathered=transport.gathered)
        dq, dk, dv, _ = backward(dout, None, q, k, v, out, lse, transport=transport, writes_gradients=True, **common)
        results = [torch.empty_like(x) for x in (out, dq, dk, dv)]
        memory = [*inputs, out, lse, dq, dk, dv, *machine.pulled]
        machine.pulled = []
        machine.alive += memory

        def used_for_something_else() -> None:
            for x, y in zip(results, (out, dq, dk, dv), strict=True):
                x.copy_(y)
            for x in memory:
                x.fill_(torch.nan)

        machine.put(used_for_something_else)
        return results

    for rank in range(WORLD):
        machine.rank = rank
        own = Lane(Stream(machine)), Lane(Stream(machine))  # type: ignore[arg-type]
        others = {1: Stream(machine), lane.URGENT: Stream(machine)}
        monkeypatch.setattr(lane, "_streams", lambda device, others=others: others)
        with machine.on(Stream(machine)):
            found.append([enqueue(rank, given, own) for given in whole])
    machine.run(random.Random(seed))
    for number, (q, k, v, dout) in enumerate(whole):
        parts = [slice(start, stop) for start, stop in pairwise(cu)]
        truths = [
            attention_oracle(*(x[:, part] for x in (q, k, v)), dout=dout[:, part], causal=True, scale=0.3)
            for part in parts
        ]
        for place, name in enumerate(("out", "dq", "dk", "dv")):
            want = torch.cat([getattr(truth, name) for truth in truths], dim=1)
            for rank in range(WORLD):
                mine = plans[rank].shard(want, dim=1)
                torch.testing.assert_close(found[rank][number][place], mine, rtol=1e-11, atol=1e-12)
