"""Transports: the dead are named, buffers are reused, groups do not disturb each other, results repeat to the bit."""

from __future__ import annotations

import glob
import os
import signal
import tempfile
import time
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ring_core import (
    RingCommError,
    local_positions,
    plan_packed,
    ring_attention,
    ring_attention_packed,
    shard_sequence,
    unshard_sequence,
)
from ring_core.comm import channel as channels
from ring_core.comm import gather_through
from ring_core.comm.contributions import arrivals, sum_in_rank_order
from ring_core.comm.peer import GENERATIONS, PUBLISHED, READ
from ring_core.comm.shared_memory import SharedMemory, shared_memory
from ring_core.group import rank_and_size
from ring_core.interface import attend as attend_in_groups
from ring_core.layout import LAYOUTS
from ring_core.plan import GatherPlan, Problem, make_plan
from ring_core.testing import attention_oracle, compare
from ring_core.testing.plugin import RunRanks

TRANSPORTS = ["ring", "gather", "shared_memory"]
PATIENCE = 3.0  # seconds of RING_TIMEOUT


def attend(transport: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    schedule: Any = "ring" if transport == "ring" else "gather"
    with gather_through("shared_memory") if transport == "shared_memory" else nullcontext():
        return ring_attention(q, k, v, schedule=schedule, **options)


def local(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# --- the dead


def killed_neighbour(transport: str, victim: int, in_backward: bool) -> tuple[str, str, float]:
    q, k, v = local(1, 8, 2, 8), local(1, 8, 2, 8), local(1, 8, 2, 8)
    attend(transport, q, k, v).sum().backward()  # everybody is connected
    out = attend(transport, q, k, v) if in_backward else None
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        if out is not None:
            out.sum().backward()
        for _ in range(4):  # a rank that does not wait for the dead one itself learns of it one call later
            attend(transport, q, k, v).sum().backward()
    except RingCommError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "no error", "", time.monotonic() - start


@pytest.mark.parametrize(
    ("transport", "in_backward"), [("ring", False), ("ring", True), ("gather", False), ("shared_memory", True)]
)
def test_a_killed_neighbour_is_named_in_time(ranks: RunRanks, transport: str, in_backward: bool) -> None:
    results = ranks(
        3, killed_neighbour, transport, 1, in_backward, may_die={1}, timeout=60, env={"RING_TIMEOUT": str(PATIENCE)}
    )
    assert results[1] is None
    for rank in (0, 2):
        name, message, seconds = results[rank]
        assert name == "RingCommError", (rank, results[rank])
        assert seconds < 3 * PATIENCE + 5, "bounded"
        assert message.startswith(f"rank {rank} of 3: ")
    # Whoever waits for the dead rank itself names it; another may name a survivor that has given up.
    assert any("rank 1 " in results[rank][1].removeprefix(f"rank {rank} of 3") for rank in (0, 2)), results


def silent_neighbour(transport: str) -> str:
    """One rank is alive but never calls."""
    q = local(1, 8, 2, 8)
    attend(transport, q, q, q)
    if dist.get_rank() == 1:
        time.sleep(2.5)
        return "slept"
    with pytest.raises(RingCommError, match="rank 1") as caught:
        attend(transport, q, q, q)
    return str(caught.value)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_silent_neighbour_is_named_after_ring_timeout(ranks: RunRanks, transport: str) -> None:
    from ring_core.testing import get_pool

    result = ranks(2, silent_neighbour, transport, env={"RING_TIMEOUT": "0.7"}, timeout=30)
    get_pool(2).stop()  # messages were left unanswered
    assert result[0].startswith("rank 0 of 2: ") and "RING_TIMEOUT sets how many seconds to wait for it" in result[0]


def test_unknown_transport() -> None:
    with pytest.raises(
        ValueError, match="unknown transport 'pigeon'; there are 'auto', 'collectives', 'peer_memory', 'shared_memory'"
    ):
        gather_through("pigeon").__enter__()


# --- shared memory by itself


def poisoned_memory() -> str:
    memory = SharedMemory(dist.group.WORLD, "poisoned")  # type: ignore[arg-type]
    epoch = memory.next_epoch()
    if dist.get_rank() == 1:
        memory.poison()
        dist.barrier()
        return ""
    with pytest.raises(RingCommError) as caught:
        memory.wait(PUBLISHED, epoch, (1,))
    dist.barrier()
    return str(caught.value)


def test_poison_is_noticed_at_once(ranks: RunRanks) -> None:
    start = time.monotonic()
    assert ranks(2, poisoned_memory, timeout=30)[0] == "rank 0 of 2: rank 1 has failed (poisoned)"
    assert time.monotonic() - start < 25


def failing_rank_poisons() -> str:
    """An error inside one rank's call ends the others' waiting, long before any timeout."""
    q = local(1, 8, 2, 8)
    attend("shared_memory", q, q, q)
    memory = shared_memory(dist.group.WORLD, "keys")  # type: ignore[arg-type]
    if dist.get_rank() == 1:
        memory.signal = lambda counter, epoch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(ZeroDivisionError):
            attend("shared_memory", q, q, q)
        return ""
    start = time.monotonic()
    with pytest.raises(RingCommError) as caught:
        attend("shared_memory", q, q, q)
    assert time.monotonic() - start < 20
    return str(caught.value)


def test_a_rank_that_raises_frees_the_others(ranks: RunRanks) -> None:
    from ring_core.testing import get_pool

    assert ranks(2, failing_rank_poisons, timeout=40)[0] == "rank 0 of 2: rank 1 has failed (keys)"
    get_pool(2).stop()  # its arena stays poisoned


def late_publisher() -> list[int]:
    """A rank that is late is waited for, and what it wrote before the signal is there after it."""
    memory = SharedMemory(dist.group.WORLD, "late")  # type: ignore[arg-type]
    memory.reserve(64)
    seen = []
    for _ in range(5):
        epoch = memory.next_epoch()
        for peer in range(memory.world_size):
            memory.wait(READ, epoch - GENERATIONS, (peer,))
        time.sleep(0.05 * ((memory.rank + epoch) % 2))
        memory.slot(memory.rank, epoch % GENERATIONS).fill_(10 * memory.rank + epoch)
        memory.signal(PUBLISHED, epoch)
        other = 1 - memory.rank
        memory.wait(PUBLISHED, epoch, (other,))
        seen.append(int(memory.slot(other, epoch % GENERATIONS).unique()))
        memory.signal(READ, epoch)
    return seen


def test_a_late_publisher_is_waited_for(ranks: RunRanks) -> None:
    assert ranks(2, late_publisher) == [[11, 12, 13, 14, 15], [1, 2, 3, 4, 5]]


def many_calls(transport: str, seed: int) -> float:
    """Sizes go up and down, ranks dawdle at random: every call gives its own answer."""
    generator = torch.Generator().manual_seed(seed)
    rank = dist.get_rank()
    dawdling = torch.Generator().manual_seed(seed + rank)
    worst = 0.0
    for number, length in enumerate((12, 24, 6, 48, 12, 96, 6, 96, 24, 12)):
        shapes = [(1, length, heads, 8) for heads in (2, 1, 1, 2)]
        q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        expected = attention_oracle(q, k, v, dout=dout, causal=number % 2 == 0)
        layout: Any = LAYOUTS[number % 3]
        a, b, c, d = (shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v, dout))
        time.sleep(0.01 * float(torch.rand(1, generator=dawdling)))
        out = attend(transport, a, b, c, causal=number % 2 == 0, layout=layout)
        time.sleep(0.01 * float(torch.rand(1, generator=dawdling)))
        found = (out, *torch.autograd.grad(out, (a, b, c), d))
        for x, y in zip(found, (expected.out, expected.dq, expected.dk, expected.dv), strict=True):
            assert y is not None
            worst = max(worst, compare(x, shard_sequence(y, layout=layout)).max_abs)
    return worst


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_buffers_are_reused_over_calls_of_changing_size(ranks: RunRanks, transport: str, seed: int) -> None:
    assert max(ranks(3, many_calls, transport, seed)) < 1e-12


def slow_reader(transport: str) -> float:
    """Under a causal mask rank 0 waits for nobody's keys: only the two generations keep it from running away."""
    generator = torch.Generator().manual_seed(4)
    worst = 0.0
    for number in range(6):
        if number == 1 and dist.get_rank() == 1:  # not before the first: that makes the arena, together
            time.sleep(0.5)
        q, k, v = (torch.randn(1, 16, 1, 8, generator=generator, dtype=torch.float64) for _ in range(3))
        parts = [shard_sequence(x, layout="contiguous") for x in (q, k, v)]
        expected = shard_sequence(attention_oracle(q, k, v, causal=True).out, layout="contiguous")
        worst = max(worst, compare(attend(transport, *parts, causal=True), expected).max_abs)
    return worst


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_overwritten_before_it_is_read(ranks: RunRanks, transport: str) -> None:
    assert max(ranks(2, slow_reader, transport)) < 1e-12


def left_behind() -> list[str]:
    q = local(1, 8, 2, 8)
    for length in (8, 64):
        x = local(1, length, 2, 8)
        attend("shared_memory", x, x, x).sum().backward()
    attend("shared_memory", q, q, q)
    dist.barrier()
    return glob.glob(os.path.join(tempfile.gettempdir(), f"ring-{os.getpid()}-*"))


def test_shared_memory_leaves_no_files(ranks: RunRanks) -> None:
    assert ranks(2, left_behind) == [[], []]


# --- buffers


def persistent_buffers() -> bool:
    q = local(1, 16, 2, 8)

    def slots() -> dict[tuple[str, str], int]:
        return {
            (kind, name): slot.data_ptr()
            for links in channels._channels.values()
            for (_, kind), link in links.items()
            for name, slot in link._slots.items()
        }

    attend("ring", q, q, q).sum().backward()
    first = slots()
    for _ in range(3):
        attend("ring", q, q, q).sum().backward()
    small = local(1, 4, 2, 8)
    attend("ring", small, small, small).sum().backward()  # takes less of the same buffers
    return {kind for kind, _ in first} == {"keys", "gradients"} and slots() == first


def test_ring_buffers_stay_from_call_to_call(ranks: RunRanks) -> None:
    assert ranks(3, persistent_buffers) == [True] * 3


def inference_first(transport: str) -> bool:
    q, k, v = local(1, 16, 2, 8), local(1, 16, 2, 8), local(1, 16, 2, 8)
    with torch.inference_mode():
        first = attend(transport, q, k, v)
    for _ in range(GENERATIONS + 1):
        out = attend(transport, q, k, v)
        out.sum().backward()
    return torch.equal(first, out)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_buffers_made_in_inference_mode_serve_training(ranks: RunRanks, transport: str) -> None:
    assert ranks(2, inference_first, transport) == [True, True]


# --- bitwise


def all_results(seed: int, transports: list[str], layout: Any) -> list[list[Tensor]]:
    rank = dist.get_rank()
    found = []
    for number, transport in enumerate(transports):
        generator = torch.Generator().manual_seed(seed + rank)
        q, k, v, dout = (torch.randn(1, 12, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2, 4))
        time.sleep(0.02 * ((rank + number) % 3))  # another rank is first each time
        out, lse = attend(transport, q, k, v, causal=True, layout=layout, return_lse=True)
        found.append([out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_repeat_to_the_bit(ranks: RunRanks, layout: str, seed: int) -> None:
    """From run to run, for every schedule; and gather gives the same through collectives and through shared memory."""
    transports = ["gather", "shared_memory", "gather", "shared_memory", "ring", "ring", "ring"]
    for results in ranks(4, all_results, seed, transports, layout):
        for first, other in ((0, 1), (0, 2), (0, 3), (4, 5), (4, 6)):
            assert all(torch.equal(a, b) for a, b in zip(results[first], results[other], strict=True)), (first, other)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_contributions_are_summed_in_rank_order(rank: int) -> None:
    """1e8 + 1 - 1e8 is 0 in fp32 from left to right, and 1 if the outer two meet first."""
    plan = make_plan(Problem(6, 6, 6, 6, None, None, "contiguous", 3), rank, "gather")
    assert isinstance(plan, GatherPlan)
    values = (1e8, 1.0, -1e8)
    parts = torch.full((1, 6, 2, 1, 4), values[rank])
    arrived = torch.cat([torch.full((1, 2, 2, 1, 4), values[peer]) for peer in range(3) if peer != rank], dim=1)
    dk, dv = torch.ones(2, 1, 2, 1, 4)
    sum_in_rank_order(plan, parts, None, arrived, dk, dv)
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_the_home_step_left_in_place_is_summed_as_elsewhere(rank: int, seed: int) -> None:
    dealt = plan_packed([0, 50, 170, 230, 400], layout="balanced", causal=True, rank=rank, world_size=3)
    plan = make_plan(dealt.problem, rank, "gather")
    assert isinstance(plan, GatherPlan) and plan.home is not None
    generator = torch.Generator().manual_seed(seed)
    lengths = plan.piece_length, plan.home[1] - plan.home[0], arrivals(plan)
    parts, at_home, arrived = (torch.randn(1, n, 2, 3, 8, generator=generator).bfloat16().float() for n in lengths)
    apart, in_place = torch.full((2, 2, 1, dealt.local_length, 3, 8), torch.nan).bfloat16()
    in_place[:, :, slice(*plan.home)] = torch.stack(at_home.unbind(2)).bfloat16()
    sum_in_rank_order(plan, parts, at_home, arrived, *apart)
    sum_in_rank_order(plan, parts, None, arrived, *in_place, home_in_place=True)
    assert torch.equal(in_place, apart) and apart.isfinite().all()


# --- head groups


def in_head_groups(seed: int, at_once: int, transport: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 16, heads, 8) for heads in (8, 4, 4, 8)]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    q, k, v, dout = (shard_sequence(x, layout="zigzag") for x in whole)
    sinks = torch.randn(8, generator=generator, dtype=torch.float64)
    q, k, v, sinks = (x.requires_grad_() for x in (q, k, v, sinks))
    slopes = torch.rand(2, 8, generator=generator)
    rest = {
        "softmax_scale": None,
        "window_size": (-1, -1),
        "total_length": None,
        "softcap": 0.0,
        "deterministic": False,
    }
    with gather_through(transport):
        out, lse = attend_in_groups(
            q,
            k,
            v,
            causal=True,
            layout="zigzag",
            schedule="gather",
            backend=None,
            group=None,
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_p=0.3,
            dropout_seed=5,
            heads_at_once=at_once,
            **rest,
        )
        gradients = torch.autograd.grad([out, lse], [q, k, v, sinks], [dout, torch.ones_like(lse)])
    return [out.detach(), lse.detach(), *gradients]


@pytest.mark.parametrize("transport", ["collectives", "shared_memory"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_heads_may_be_taken_a_few_at_a_time(ranks: RunRanks, seed: int, at_once: int, transport: str) -> None:
    """Slopes, sinks and the dropout mask follow their heads."""
    for apart, together in zip(
        ranks(2, in_head_groups, seed, at_once, transport),
        ranks(2, in_head_groups, seed, 4, "collectives"),
        strict=True,
    ):
        for x, y in zip(apart, together, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def in_uneven_head_groups(seed: int, sizes: list[int], transport: str) -> list[Tensor]:
    ends = list(accumulate(sizes, initial=0))
    groups = tuple(slice(start, stop) for start, stop in pairwise(ends))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ring_core.comm.head_groups", lambda *_: groups)
        return in_head_groups(seed, 0, transport)


@pytest.mark.parametrize("transport", ["collectives", "shared_memory"])
@pytest.mark.parametrize("sizes", [[1, 3], [1, 2, 1]], ids=str)
def test_groups_of_heads_may_differ_in_size(ranks: RunRanks, seed: int, sizes: list[int], transport: str) -> None:
    for apart, together in zip(
        ranks(2, in_uneven_head_groups, seed, sizes, transport),
        ranks(2, in_head_groups, seed, 4, "collectives"),
        strict=True,
    ):
        for x, y in zip(apart, together, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def packed_in_head_groups(seed: int, sizes: list[int], transport: str) -> list[Tensor]:
    """Documents of which some cross ranks and some do not."""
    generator = torch.Generator().manual_seed(seed)
    plan = plan_packed([0, 5, 17, 23, 40], layout="balanced", causal=True)
    q, k, v, dout = (
        plan.shard(torch.randn(40, heads, 8, generator=generator, dtype=torch.float64)) for heads in (8, 4, 4, 8)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    groups = tuple(slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0)))
    with pytest.MonkeyPatch.context() as patch, gather_through(transport):
        patch.setattr("ring_core.comm.head_groups", lambda *_: groups)
        out = ring_attention_packed(*leaves, plan, schedule="gather")
        gradients = torch.autograd.grad(out, leaves, dout)
    home = make_plan(plan.problem, plan.rank, "gather").home
    return [out.detach(), *gradients, torch.tensor(home is not None)]


@pytest.mark.parametrize("transport", ["collectives", "shared_memory"])
@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 2, 1]], ids=str)
def test_queries_that_wait_for_nothing_in_head_groups(
    ranks: RunRanks, seed: int, sizes: list[int], transport: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(40, heads, 8, generator=generator, dtype=torch.float64) for heads in (8, 4, 4, 8)]
    leaves = [x.requires_grad_() for x in whole[:3]]
    plan = plan_packed([0, 5, 17, 23, 40], causal=True, rank=0, world_size=1)
    out = ring_attention_packed(*leaves, plan)
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, whole[3])]
    results = ranks(2, packed_in_head_groups, seed, sizes, transport)
    assert any(result[-1] for result in results)
    for rank, result in enumerate(results):
        dealt = plan_packed([0, 5, 17, 23, 40], layout="balanced", causal=True, rank=rank, world_size=2)
        for found, truth in zip(result, wanted, strict=False):
            torch.testing.assert_close(found, dealt.shard(truth), rtol=1e-11, atol=1e-12)


# --- groups


def in_group(group: Any, seed: int, transport: str) -> float:
    """Attends to one sequence per group; the distance from the truth."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(1, 8, heads, 8, generator=generator, dtype=torch.float64) for heads in (2, 1, 1, 2))
    truth = attention_oracle(q, k, v, dout=dout, causal=True)
    a, b, c, d = (shard_sequence(x, layout="zigzag", group=group).requires_grad_() for x in (q, k, v, dout))
    out = attend(transport, a, b, c, causal=True, layout="zigzag", group=group)
    gradients = torch.autograd.grad(out, (a, b, c), d)
    wanted = (truth.out, truth.dq, truth.dk, truth.dv)
    whole = unshard_sequence(out.detach(), layout="zigzag", group=group)
    errors = [compare(whole, truth.out).max_abs]
    for x, y in zip((out, *gradients), wanted, strict=True):
        assert y is not None
        errors.append(compare(x, shard_sequence(y, layout="zigzag", group=group)).max_abs)
    return max(errors)


def two_groups(seed: int) -> list[Any]:
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]  # not neighbours; and given out of order
    mine = groups[rank % 2]
    worst = 0.0
    for transport in TRANSPORTS:
        time.sleep(0.05 * (rank % 2))  # one group runs ahead of the other
        worst = max(worst, in_group(mine, seed + rank % 2, transport))
    place = rank_and_size(mine)
    positions = local_positions(8, layout="zigzag", group=mine).tolist()
    return [worst, place, positions]


def test_two_groups_at_once(ranks: RunRanks, seed: int) -> None:
    results = ranks(4, two_groups, seed)
    assert max(worst for worst, _, _ in results) < 1e-12
    for _, (place, size), positions in results:
        assert size == 2
        assert positions == ([0, 1, 6, 7] if place == 0 else [2, 3, 4, 5])
    assert [place for _, (place, _), _ in results][:3:2] == [0, 1]
    assert sorted(place for _, (place, _), _ in results[1::2]) == [0, 1]


def mesh_axis(seed: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    rank = dist.get_rank()
    worst = max(in_group(mesh["cp"], seed + rank // 2, transport) for transport in TRANSPORTS)
    q = local(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"mesh with axes \('dp', 'cp'\); pass one of them, as in mesh\['cp'\]"):
        ring_attention(q, q, q, group=mesh)
    return [worst, rank_and_size(mesh["cp"]), rank_and_size(mesh["dp"])]


def test_an_axis_of_a_mesh_is_a_group(ranks: RunRanks, seed: int) -> None:
    results = ranks(4, mesh_axis, seed)
    assert max(worst for worst, _, _ in results) < 1e-12
    assert [place for _, place, _ in results] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [place for _, _, place in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_without_a_process_group() -> None:
    assert not dist.is_initialized()
    assert rank_and_size(None) == (0, 1)
    q = local(1, 8, 2, 8)
    for schedule in ("auto", "ring", "gather"):
        ring_attention(q, q, q, schedule=schedule).sum().backward()
    with gather_through("shared_memory"):
        ring_attention(q, q, q, schedule="gather")


def other_group_destroyed() -> bool:
    """A later group that gets an old one's name gets channels of its own."""
    for _ in range(2):
        group = dist.new_group([0, 1])
        for transport in TRANSPORTS:
            q = local(1, 4, 2, 8)
            attend(transport, q, q, q, group=group).sum().backward()
        dist.destroy_process_group(group)
    return True


def test_groups_come_and_go(ranks: RunRanks) -> None:
    assert ranks(2, other_group_destroyed) == [True, True]
