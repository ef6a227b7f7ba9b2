"""Pieces that come and go while a backend computes: who decides it, what is counted, and that nothing is read or sent
too early. On the CPU everything is done in order; GPUs have tests of their own."""

from __future__ import annotations

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
from ring_core.comm import gather_through
from ring_core.comm.contributions import pieces_of
from ring_core.comm.shared_memory import SharedMemory
from ring_core.interface import attend
from ring_core.layout import LAYOUTS
from ring_core.plan import GatherPlan, PackedProblem, Problem, make_plan
from ring_core.reference import ReferenceBackend
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
