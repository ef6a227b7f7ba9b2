"""Pieces that come and go while a backend computes: who decides it, what is counted, and that nothing is read or sent
too early. On the CPU everything is done in order; GPUs have tests of their own."""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_core import shard_sequence
from ring_core.backend import Params, departures_of, load_backend, on_device, register_backend, takes_flags
from ring_core.backward import backward
from ring_core.comm import gather_through, symmetric_memory
from ring_core.comm.contributions import pieces_of
from ring_core.comm.gather import GatherTransport
from ring_core.comm.lane import Lane
from ring_core.comm.peer import PeerCourier
from ring_core.comm.shared_memory import SharedMemory
from ring_core.comm.staged import StagedGather
from ring_core.comm.stream_memory import Wait, Write
from ring_core.comm.symmetric_memory import SymmetricMemory
from ring_core.forward import forward
from ring_core.interface import attend
from ring_core.layout import LAYOUTS
from ring_core.plan import GatherPlan, PackedProblem, Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.testing import attention_oracle
from ring_core.testing.plugin import RunRanks

WORLD = 3
numbers = count()
Given = list[tuple[str, bool, bool, int]]


class Recording(ReferenceBackend):
    """Stages what it is told to, and notes what it is given."""

    def __init__(self, *, forward: bool = True, backward: bool = True) -> None:
        self.directions = {"forward": forward, "backward": backward}
        self.given: Given = []

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
        return self.directions["forward" if dout is None else "backward"]

    def forward(self, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> None:
        self.given.append(("forward", options["flags"] is not None, False, k.shape[3]))
        super().forward(q, k, *rest, **options)

    def backward(self, state: Any, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> None:
        staged = options["flags"] is not None, options["departures"] is not None
        self.given.append(("backward", *staged, k.shape[3]))
        super().backward(state, q, k, *rest, **options)


def through(transport: str, backend: ReferenceBackend, layout: Any, *, at_once: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(2, 24, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (shard_sequence(x, layout=layout).requires_grad_() for x in whole)
    name = f"backend{next(numbers)}"  # how a kind of call is computed is remembered by name
    register_backend(name, backend)
    with gather_through(transport):
        out, lse = attend(
            q,
            k,
            v,
            causal=True,
            window_size=(-1, -1),
            softmax_scale=None,
            layout=layout,
            schedule="gather",
            backend=name,
            group=None,
            total_length=None,
            softcap=0.0,
            alibi_slopes=None,
            sinks=None,
            dropout_p=0.0,
            dropout_seed=None,
            deterministic=False,
            heads_at_once=at_once,
        )
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def recorded(transport: str, directions: dict[str, bool], layout: str, at_once: int) -> Given:
    backend = Recording(**directions)
    found = through(transport, backend, layout, at_once=at_once)
    plain = through("collectives", Recording(forward=False, backward=False), layout, at_once=at_once)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    return backend.given


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peer_memory_hands_over_flags_and_counters(ranks: RunRanks, layout: str) -> None:
    """In one call over all heads; but not to a rank that has one piece, whose keys are all there or all not."""
    for rank, calls in enumerate(ranks(WORLD, recorded, "shared_memory", {}, layout, 0)):
        alone = layout == "contiguous" and rank == 0
        assert calls == [("forward", not alone, False, 2), ("backward", not alone, not alone, 2)], (rank, calls)


@pytest.mark.parametrize("forward", [False, True])
def test_directions_are_asked_apart(ranks: RunRanks, forward: bool) -> None:
    directions = {"forward": forward, "backward": not forward}
    for calls in ranks(WORLD, recorded, "shared_memory", directions, "zigzag", 0):
        assert calls == [("forward", forward, False, 2), ("backward", not forward, not forward, 2)]


@pytest.mark.parametrize(("transport", "at_once"), [("collectives", 0), ("shared_memory", 1)])
def test_neither_collectives_nor_head_groups_are_staged(ranks: RunRanks, transport: str, at_once: int) -> None:
    for calls in ranks(WORLD, recorded, transport, {}, "stripe", at_once):
        assert {call[1:3] for call in calls} == {(False, False)}
        assert len(calls) == (4 if at_once else 2)


class Miscounting(ReferenceBackend):
    """One key short."""

    def backward(self, *tensors: Any, departures: Tensor | None = None, **options: Any) -> None:
        super().backward(*tensors, departures=departures, **options)
        if departures is not None:
            departures -= 1


def left_too_early() -> str:
    with pytest.raises(RuntimeError) as caught:
        through("shared_memory", Miscounting(), "zigzag")
    return str(caught.value)


def test_nothing_departs_before_it_is_complete(ranks: RunRanks) -> None:
    from ring_core.testing import get_pool

    for message in ranks(2, left_too_early, timeout=60):
        assert "departs with" in message and "keys" in message
    get_pool(2).stop()  # its arenas are poisoned


def no_flag_is_raised() -> str:
    SharedMemory.arrive = lambda *_: None  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError) as caught:
        through("shared_memory", ReferenceBackend(), "zigzag")
    return str(caught.value)


def test_nothing_is_read_before_its_flag_is_up(ranks: RunRanks) -> None:
    from ring_core.testing import get_pool

    for message in ranks(2, no_flag_is_raised, timeout=60):
        assert "is read before it has arrived" in message
    get_pool(2).stop()


problems = st.builds(
    lambda layout, world, tokens, left, right: Problem(
        tokens * 2 * world, tokens * 2 * world, tokens * 2 * world, tokens * 2 * world, left, right, layout, world
    ),
    st.sampled_from(LAYOUTS),
    st.integers(1, 6),
    st.integers(1, 40),
    st.none() | st.integers(0, 100),
    st.none() | st.integers(0, 20),
)


@given(problems)
@settings(max_examples=60, deadline=None)
def test_every_piece_has_one_owner_and_leaves_in_its_turn(problem: Problem) -> None:
    """Each piece belongs to one rank of `order`; remote ones come first in the backward's table, rank after rank."""
    for rank in range(problem.world_size):
        plan = make_plan(problem, rank, "gather")
        assert isinstance(plan, GatherPlan)
        pieces = pieces_of(plan)
        if pieces is None:
            assert plan.piece_count < 2
            continue
        assert sorted(piece for owned in pieces.values() for piece in owned) == list(range(plan.piece_count))
        owner = {piece: source for source, owned in pieces.items() for piece in owned}
        (step,) = plan.steps
        visited = list(dict.fromkeys(owner[segment.piece] for segment in step.backward.segments if segment.k_len))
        order = [source for source in plan.order if source in visited]
        assert visited == [source for source in order if source != rank] + [x for x in order if x == rank]
        for strip in step.forward.grouped:  # own keys first, as they arrive
            sources = list(dict.fromkeys(owner[segment.piece] for segment in strip if segment.k_len))
            assert sources == [source for source in plan.order if source in sources]


def test_packed_documents_are_one_piece() -> None:
    cu = [0, 10, 40, 64]
    plan = make_plan(PackedProblem.of(cu, cu, left=None, right=0, layout="zigzag", world_size=2), 1, "gather")
    assert isinstance(plan, GatherPlan) and pieces_of(plan) is None


def test_departures_count_keys_heads_and_entries() -> None:
    plan = make_plan(Problem(32, 32, 32, 32, None, 0, "contiguous", 4), 2, "gather")
    assert isinstance(plan, GatherPlan)
    (step,) = plan.steps
    assert plan.piece_count == 3
    assert departures_of(step.backward, 3, batch=5, num_kv_heads=2) == (80, 80, 80)
    k = torch.randn(3, 5, 8, 2, 8, dtype=torch.float64)
    q = torch.randn(5, 8, 4, 8, dtype=torch.float64)
    backend, params = load_backend("reference"), Params(0.3)
    assert takes_flags(backend, q, None, params)
    state = backend.prepare(q, k.shape[1:], q, q, torch.zeros(5, 4, 8, dtype=torch.float64), None, params=params)
    counters = torch.zeros(3, dtype=torch.int32)
    dk, dv = torch.zeros(2, *k.shape, dtype=torch.float64)
    table = on_device(step.backward, torch.device("cpu"))
    backend.backward(state, q, k, k, q, dk, dv, table, params=params, departures=counters)
    assert counters.tolist() == [80, 80, 80]


def test_backends_without_flags_need_not_say_when() -> None:
    class Plain:
        name = "plain"

        def capabilities(self, device: torch.device) -> Any:
            return replace(ReferenceBackend().capabilities(device), flags=False)

    backend: Any = Plain()
    assert not takes_flags(backend, torch.zeros(1), None, Params(1.0))


# --- the words of symmetric memory, without GPUs: ranks are threads, streams do everything at once


class Rank:
    """As much of a process group as `SymmetricMemory` asks for."""

    def __init__(self, rank: int, meeting: threading.Barrier, buffers: dict[tuple[int, int], Tensor]) -> None:
        self.rank, self.meeting, self.buffers = rank, meeting, buffers
        self.made = 0

    def rendezvous(self, own: Tensor) -> list[Tensor]:
        self.made += 1
        self.buffers[self.made, self.rank] = own
        self.meeting.wait(10)
        return [self.buffers[self.made, rank] for rank in range(WORLD)]


def word(address: int) -> ctypes.c_int32:
    return ctypes.c_int32.from_address(address)


def carry_out(stream: int, operations: list[Wait | Write]) -> None:
    """What a stream would do with them, while the host waits."""
    for operation in operations:
        if isinstance(operation, Write):
            word(operation.address).value = operation.value
            continue
        deadline = time.monotonic() + 10
        while word(operation.address).value < operation.value:
            assert time.monotonic() < deadline, "a wait that nobody ends"
            time.sleep(1e-4)


class CarriedOut:
    """`Signals` of a stream that does everything at once."""

    def __init__(self, written: list[int], awaited: list[int]) -> None:
        self.written, self.awaited = written, awaited

    def enqueue(self, stream: int, value: int) -> None:
        carry_out(
            stream, [*(Write(word, value) for word in self.written), *(Wait(word, value) for word in self.awaited)]
        )


@pytest.fixture
def streams_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "current_stream_handle": lambda device: 0,
        "symmetric_buffer": lambda nbytes, device: torch.zeros(nbytes, dtype=torch.uint8),
        "symmetric_rendezvous": lambda own, group: group.rendezvous(own),
        "enqueue": carry_out,
        "Signals": CarriedOut,
        "copy_all": lambda stream, target, copies: [
            ctypes.memmove(target + place, source, nbytes) for place, source, nbytes in copies
        ],
    }.items():
        monkeypatch.setattr(symmetric_memory, name, value)
    monkeypatch.setattr(symmetric_memory.dist, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(symmetric_memory.dist, "get_world_size", lambda group: WORLD)
    monkeypatch.setattr(symmetric_memory.dist, "barrier", lambda group: group.meeting.wait(10))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(SymmetricMemory, "watch", lambda self, epoch: None)


@pytest.mark.usefixtures("streams_at_once")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_symmetric_memory_stages(layout: str, seed: int) -> None:
    """Three calls, of growing size, whose arenas grow and whose slots are reused: what one rank alone computes."""
    meeting, cpu = threading.Barrier(WORLD), torch.device("cpu")
    buffers_of = {name: dict[tuple[int, int], Tensor]() for name in ("keys", "gradients")}
    groups: list[dict[str, Any]] = [
        {name: Rank(rank, meeting, buffers) for name, buffers in buffers_of.items()} for rank in range(WORLD)
    ]
    memories = [{name: SymmetricMemory(group, cpu, name) for name, group in named.items()} for named in groups]
    generator = torch.Generator().manual_seed(seed)
    params, here = Params(0.3), Lane(None)
    for length in (12, 24, 24):
        problem = Problem(length, length, length, length, None, 0, layout, WORLD)
        whole = [torch.randn(2, length, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]
        parts = [
            [shard_sequence(x, layout=layout, rank=r, world_size=WORLD) for x in whole]  # type: ignore[arg-type]
            for r in range(WORLD)
        ]

        def rank_computes(rank: int, problem: Problem = problem, parts: list[list[Tensor]] = parts) -> list[Tensor]:
            plan = make_plan(problem, rank, "gather")
            assert isinstance(plan, GatherPlan)
            q, k, v, dout = parts[rank]
            backend = Recording()

            def moved() -> StagedGather | GatherTransport:
                courier = PeerCourier(plan, memories[rank].__getitem__, (here, here))
                if courier.pieces is None:
                    return GatherTransport(plan, courier, (slice(0, 2),))
                return StagedGather(plan, courier)

            common: dict[str, Any] = {"plan": plan, "backend": backend, "params": params}
            out, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
            forward(q, k, v, out, lse, transport=moved(), **common)
            dq, dk, dv, _ = backward(dout, None, q, k, v, out, lse, transport=moved(), **common)
            staged = plan.piece_count > 1
            assert [call[1:3] for call in backend.given] == [(staged, False), (staged, staged)]
            return [out, dq, dk, dv]

        with ThreadPoolExecutor(WORLD) as pool:
            found = list(pool.map(rank_computes, range(WORLD)))
        truth = attention_oracle(*whole[:3], dout=whole[3], causal=True, scale=0.3)
        for rank, results in enumerate(found):
            for got, want in zip(results, (truth.out, truth.dq, truth.dk, truth.dv), strict=True):
                assert want is not None
                mine = shard_sequence(want, layout=layout, rank=rank, world_size=WORLD)  # type: ignore[arg-type]
                torch.testing.assert_close(got, mine, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("streams_at_once")
def test_flags_of_an_epoch_begin_down() -> None:
    """Also those that an earlier call, of other pieces, has raised."""
    memory = SymmetricMemory(Rank(0, threading.Barrier(1), {}), torch.device("cpu"), "keys")  # type: ignore[arg-type]
    own = torch.zeros(memory._header + 2 * 512, dtype=torch.uint8)
    memory._arenas, memory._addresses = [own] * WORLD, [own.data_ptr()] * WORLD
    memory._size = 512
    for epoch in range(1, 12):
        flags = memory.flags(6, epoch)
        memory.arrive((4,), epoch)
        up = (flags.values >= flags.epoch).tolist()
        assert int(flags.epoch) == epoch and up == [False] * 4 + [True, False]
        memory.arrive((0, 5), epoch)
        assert (flags.values >= flags.epoch).tolist() == [True, False, False, False, True, True]
