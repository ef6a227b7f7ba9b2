"""Peer memory between GPUs: the same bits as collectives, in any order of foreign work, and every wait ends."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import RingCommError, plan_packed, ring_attention, shard_sequence
from ring_core.comm import arena_bytes, gather_through
from ring_core.comm.contributions import arrivals, sum_in_rank_order
from ring_core.comm.packing import side_by_side
from ring_core.interface import attend
from ring_core.merge import merge_
from ring_core.plan import GatherPlan, Problem, make_plan
from ring_core.testing.plugin import RunRanks

PLAIN: dict[str, Any] = {
    "window_size": (-1, -1),
    "softmax_scale": None,
    "backend": "reference",
    "group": None,
    "total_length": None,
    "softcap": 0.0,
    "alibi_slopes": None,
    "sinks": None,
    "dropout_p": 0.0,
    "dropout_seed": None,
    "deterministic": False,
}


def shards(seed: int, batch: int = 2, length: int = 512, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, 32) for heads in (8, 4, 4, 8)]
    whole = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [shard_sequence(x, layout="zigzag").requires_grad_() for x in whole]


def everything(seed: int, way: str, at_once: int, repeats: int = 1) -> list[Tensor]:
    results: list[Tensor] = []
    for repeat in range(repeats):
        q, k, v, dout = shards(seed + repeat, batch=1 + repeat % 2, length=256 * (1 + repeat % 3))
        with gather_through(way):
            out, lse = attend(q, k, v, causal=True, layout="zigzag", schedule="gather", heads_at_once=at_once, **PLAIN)
            gradients = torch.autograd.grad(out, (q, k, v), dout)
        results += [x.detach().cpu() for x in (out, lse, *gradients)]
    return results


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.multi_gpu(4))])
def test_peer_memory_gives_what_collectives_give(ranks: RunRanks, seed: int, at_once: int, world_size: int) -> None:
    """To the bit, over calls of changing sizes, whose arenas grow and whose slots are reused."""
    peer = ranks(world_size, everything, seed, "peer_memory", at_once, 7)
    plain = ranks(world_size, everything, seed, "collectives", at_once, 7)
    for mine, theirs in zip(peer, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def among_collectives(seed: int, at_once: int) -> bool:
    """An all-reduce of another group is enqueued before the ring call on one rank and after it on the others."""
    others = dist.new_group(list(range(dist.get_world_size())))
    number = torch.ones(1 << 20, device="cuda")
    dist.all_reduce(number, group=others)
    want = everything(seed, "collectives", at_once)
    side = torch.cuda.Stream()
    for _ in range(5):
        number.fill_(1.0)
        side.wait_stream(torch.cuda.current_stream())
        if dist.get_rank() == 0:
            with torch.cuda.stream(side):
                dist.all_reduce(number, group=others)
        got = everything_enqueued(seed, at_once)
        if dist.get_rank() != 0:
            with torch.cuda.stream(side):
                dist.all_reduce(number, group=others)
        torch.cuda.synchronize()
        assert number[0] == dist.get_world_size()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    return True


def everything_enqueued(seed: int, at_once: int) -> list[Tensor]:
    q, k, v, dout = shards(seed, batch=1, length=256)
    with gather_through("peer_memory"):
        out, lse = attend(q, k, v, causal=True, layout="zigzag", schedule="gather", heads_at_once=at_once, **PLAIN)
        return [x.detach() for x in (out, lse, *torch.autograd.grad(out, (q, k, v), dout))]


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("setting", ["", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING"])
@pytest.mark.parametrize("at_once", [2, 4])
def test_progress_beside_collectives_of_another_group(ranks: RunRanks, seed: int, setting: str, at_once: int) -> None:
    """In two head groups, and in one, whose pieces the backend waits for itself."""
    assert all(ranks(2, among_collectives, seed, at_once, env={setting: "1"} if setting else {}, timeout=120))


def silent_peer() -> str:
    q, k, v, _ = shards(0)
    with gather_through("peer_memory"):
        ring_attention(q, k, v, schedule="gather", backend="reference")
        torch.cuda.synchronize()
        if dist.get_rank() == 1:
            time.sleep(6)
            return "slept"
        start = time.monotonic()
        ring_attention(q, k, v, schedule="gather", backend="reference")
        torch.cuda.synchronize()  # the watchdog ends the wait
        assert time.monotonic() - start < 5
        with pytest.raises(RingCommError) as caught:
            ring_attention(q, k, v, schedule="gather", backend="reference")
    return str(caught.value)


@pytest.mark.multi_gpu(2)
def test_a_silent_peer_is_named(ranks: RunRanks) -> None:
    from ring_core.testing import get_pool

    message = ranks(2, silent_peer, env={"RING_TIMEOUT": "1"}, timeout=60)[0]
    get_pool(2, "cuda").stop()
    assert "rank 0 of 2: rank 1 did not answer in time" in message, message
    assert "RING_TIMEOUT sets how many seconds to wait" in message


def from_another_device(seed: int) -> bool:
    """The current device is not that of the tensors: streams of the wrong one would compute too early."""
    want = everything(seed, "peer_memory", 2)
    q, k, v, dout = shards(seed, batch=1, length=256)
    mine = torch.cuda.current_device()
    with torch.cuda.device((mine + 1) % 2), gather_through("peer_memory"):
        out, lse = attend(q, k, v, causal=True, layout="zigzag", schedule="gather", heads_at_once=2, **PLAIN)
        got = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    assert torch.cuda.current_device() == mine
    return all(torch.equal(a.detach().cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.multi_gpu(2)
def test_the_tensors_device_counts(ranks: RunRanks, seed: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("ranks share the only GPU: there is no other device")
    assert all(ranks(2, from_another_device, seed))


def arenas(seed: int) -> int:
    everything(seed, "auto", 2)
    return arena_bytes()


@pytest.mark.multi_gpu(2)
def test_auto_takes_peer_memory_on_one_host(ranks: RunRanks, seed: int) -> None:
    assert all(size > 0 for size in ranks(2, arenas, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_the_merge_kernel_does_what_torch_operations_do(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    out, block = torch.randn(2, 2, 77, 6, head_dim, dtype=torch.float64)
    lse, block_lse = torch.randn(2, 2, 6, 77, dtype=torch.float64) * 3
    lse[:, :, 5:20], block_lse[:, :, 10:30] = -torch.inf, -torch.inf
    out.masked_fill_((lse == -torch.inf).transpose(1, 2)[..., None], torch.nan)
    block.masked_fill_((block_lse == -torch.inf).transpose(1, 2)[..., None], torch.nan)
    block = block.to(dtype).double()
    wide = out.float().cuda().repeat(1, 1, 2, 1)[:, :, :6]  # strided, as a group of heads is
    kernel = wide, lse.float().cuda(), block.to(dtype).cuda(), block_lse.float().cuda()
    result = torch.empty(2, 77, 6, head_dim, dtype=dtype, device="cuda")
    other = kernel[1].clone()
    merge_(kernel[0], other, *kernel[2:], result)
    assert torch.equal(kernel[0].isnan(), out.isnan().cuda()), "`out` stays as it was where there is a result"
    merge_(*kernel)
    merge_(out, lse, block, block_lse)
    torch.testing.assert_close(kernel[0].double().cpu(), out, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(kernel[1].double().cpu(), lse, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(result.double().cpu(), out, rtol=1e-2, atol=1e-2)
    assert torch.equal(other, kernel[1])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_sum_kernel_adds_as_torch_operations_do(layout: str, rank: int, seed: int) -> None:
    """In the same order, hence to the bit; also where a window leaves keys without contributors."""
    plan = make_plan(Problem(360, 360, 360, 360, 70, 0, layout, 3), rank, "gather")
    assert isinstance(plan, GatherPlan)
    generator = torch.Generator().manual_seed(seed)
    span = plan.piece_count * plan.piece_length
    parts, arrived = (torch.randn(2, n, 2, 3, 40, generator=generator) for n in (span, arrivals(plan)))
    plain, kernel = torch.full((2, 2, 120, 9, 40), torch.nan), torch.full((2, 2, 120, 9, 40), torch.nan).cuda()
    sum_in_rank_order(plan, parts, None, arrived, *plain[:, :, :, 3:6])
    sum_in_rank_order(plan, parts.cuda(), None, arrived.cuda(), *kernel[:, :, :, 3:6])
    assert torch.equal(kernel.cpu()[:, :, :, 3:6], plain[:, :, :, 3:6])
    assert kernel[:, :, :, :3].isnan().all() and kernel[:, :, :, 6:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_sum_kernel_adds_what_was_computed_at_home(rank: int, seed: int) -> None:
    dealt = plan_packed([0, 50, 170, 230, 400], layout="balanced", causal=True, rank=rank, world_size=3)
    plan = make_plan(dealt.problem, rank, "gather")
    assert isinstance(plan, GatherPlan) and plan.home is not None
    generator = torch.Generator().manual_seed(seed)
    lengths = plan.piece_length, plan.home[1] - plan.home[0], arrivals(plan)
    contributions = [torch.randn(1, n, 2, 3, 40, generator=generator) for n in lengths]
    plain = torch.full((2, 1, dealt.local_length, 3, 40), torch.nan)
    kernel = plain.cuda()
    sum_in_rank_order(plan, *contributions, *plain)
    sum_in_rank_order(plan, *(x.cuda() for x in contributions), *kernel)
    assert torch.equal(kernel.cpu(), plain) and plain.isfinite().all()
    parts, at_home, arrived = contributions
    places = [torch.full(plain.shape, torch.nan).bfloat16() for _ in range(2)]
    for place in places:  # as the home step leaves them
        place[:, :, slice(*plan.home)] = torch.stack(at_home.unbind(2)).bfloat16()
    kernel = places[1].cuda()
    sum_in_rank_order(plan, parts, None, arrived, *places[0], home_in_place=True)
    again = kernel.clone()
    for place in (kernel, again):  # the second time by the driver
        sum_in_rank_order(plan, parts.cuda(), None, arrived.cuda(), *place, home_in_place=True)
    assert torch.equal(again, kernel) and torch.equal(kernel.cpu(), places[0]) and places[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_packing_kernel_copies_as_torch_operations_do(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 90, 6, 24, generator=generator).to(dtype) for _ in range(2))
    for heads in (slice(0, 6), slice(1, 4)):
        plain = torch.zeros(2, 70, 2, heads.stop - heads.start, 24, dtype=dtype)
        kernel, again = plain.cuda(), plain.cuda()
        places = ((3, 0, 1), (10, 5, 33), (60, 40, 30))
        side_by_side(k[:, :, heads], v[:, :, heads], plain, places)
        for target in (kernel, again):  # the second time by the driver
            side_by_side(k.cuda()[:, :, heads], v.cuda()[:, :, heads], target, places)
        assert torch.equal(kernel.cpu(), plain) and torch.equal(again, kernel)
