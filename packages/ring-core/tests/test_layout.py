"""Dealing out and joining: exact inverses, for any tensor and dim, differentiable; padding that no mask sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_core import (
    join_shards,
    local_positions,
    pad_sequence,
    padded_length,
    ring_attention,
    shard_sequence,
    unshard_sequence,
)
from ring_core.layout import LAYOUTS, LayoutName, multiple
from ring_core.testing import attention_oracle, compare
from ring_core.testing.plugin import RunRanks

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def shards_of(tensor: Tensor, layout: Any, world_size: int, dim: int = 1) -> list[Tensor]:
    return [shard_sequence(tensor, layout=layout, dim=dim, rank=r, world_size=world_size) for r in range(world_size)]


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@settings(deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    world_size=st.integers(1, 8),
    half_chunk=st.integers(0, 3),
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    at=st.integers(0, 3),
    negative=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_join_is_the_exact_inverse_of_shard(
    layout: Any,
    world_size: int,
    half_chunk: int,
    shape: list[int],
    at: int,
    negative: bool,
    transposed: bool,
    dtype: torch.dtype,
) -> None:
    dim = at % len(shape)
    shape[dim] = half_chunk * multiple(layout, world_size)
    whole = torch.randint(0, 255, shape[::-1] if transposed else shape).to(dtype)
    whole = whole.permute(*reversed(range(len(shape)))) if transposed else whole
    dim = dim - len(shape) if negative else dim
    shards = shards_of(whole, layout, world_size, dim)
    assert all(x.is_contiguous() and x.dtype == dtype for x in shards)
    assert len({x.shape for x in shards}) == 1 and shards[0].shape[dim] * world_size == shape[dim]
    joined = join_shards(shards, layout=layout, dim=dim)
    assert joined.shape == whole.shape and torch.equal(joined, whole)
    again = shards_of(joined, layout, world_size, dim)
    assert all(torch.equal(a, b) for a, b in zip(shards, again, strict=True))


def test_what_each_layout_deals_out() -> None:
    """Written by hand: 8 tokens, 2 ranks."""
    tokens = torch.arange(8)

    def dealt(layout: LayoutName) -> list[list[int]]:
        return [x.tolist() for x in shards_of(tokens, layout, 2, dim=0)]

    assert dealt("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dealt("zigzag") == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert dealt("stripe") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@layouts
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_local_positions_are_those_of_the_shards(layout: LayoutName, world_size: int) -> None:
    length = 6 * world_size
    for rank in range(world_size):
        place: dict[str, Any] = {"layout": layout, "rank": rank, "world_size": world_size}
        positions = local_positions(length, **place)
        assert positions.dtype == torch.int64
        assert torch.equal(positions, shard_sequence(torch.arange(length), dim=0, **place))
        assert local_positions(length, **place, device="meta").device.type == "meta"


def test_without_a_group_there_is_one_rank() -> None:
    x = torch.randn(2, 6)
    for layout in LAYOUTS:
        assert torch.equal(shard_sequence(x, layout=layout), x)  # type: ignore[arg-type]
        assert torch.equal(unshard_sequence(x, layout=layout), x)  # type: ignore[arg-type]
        assert local_positions(6, layout=layout).tolist() == list(range(6))  # type: ignore[arg-type]


@layouts
def test_gradients_of_shard_and_join(layout: LayoutName) -> None:
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 12, 3, dtype=torch.float64)
    parts = shards_of(weights, layout, 3)
    loss: Any = sum((a * w).sum() for a, w in zip(shards_of(x, layout, 3), parts, strict=True))
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, weights)
    leaves = [part.clone().requires_grad_() for part in parts]
    gradients = torch.autograd.grad((join_shards(leaves, layout=layout) * weights).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients, parts, strict=True))


def unshard(layout: LayoutName, dim: int) -> list[Any]:
    """On every rank: the rank's part joined with the others', bitwise; gradients summed over ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(2, 12, 12, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(world_size, *whole.shape, generator=generator, dtype=torch.float64)
    part = shard_sequence(whole, layout=layout, dim=dim).requires_grad_()
    joined = unshard_sequence(part, layout=layout, dim=dim)
    (joined * weights[rank]).sum().backward()
    expected = shard_sequence(weights.sum(0), layout=layout, dim=dim)
    integers = torch.randint(0, 99, (2, 12), generator=generator)
    positions = local_positions(12, layout=layout)
    strided = shard_sequence(integers, layout=layout).t()  # not contiguous
    return [
        torch.equal(joined.detach(), whole),
        compare(part.grad, expected).max_abs < 1e-13 if part.grad is not None else "no gradient",
        torch.equal(unshard_sequence(strided, layout=layout, dim=0), integers.t()),
        torch.equal(unshard_sequence(positions, layout=layout, dim=0), torch.arange(12)),
        torch.equal(unshard_sequence(positions % 2 == 0, layout=layout, dim=-1), torch.arange(12) % 2 == 0),
    ]


@layouts
@pytest.mark.parametrize(("world_size", "dim"), [(2, 1), (2, -2), (3, 1)])
def test_unshard_on_ranks(ranks: RunRanks, layout: LayoutName, world_size: int, dim: int) -> None:
    assert ranks(world_size, unshard, layout, dim) == [[True] * 5] * world_size


# --- padding


def test_padded_length() -> None:
    assert padded_length(13, layout="contiguous", world_size=4) == 16
    assert padded_length(13, layout="zigzag", world_size=4) == 16
    assert padded_length(17, layout="zigzag", world_size=4) == 24
    assert padded_length(16, layout="stripe", world_size=4) == 16
    assert padded_length(0, layout="stripe", world_size=4) == 0


def test_pad_sequence() -> None:
    x = torch.arange(10).reshape(2, 5)
    padded, length = pad_sequence(x, layout="zigzag", world_size=4, value=-1)
    assert length == 5 and padded.dtype == x.dtype
    assert padded.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [5, 6, 7, 8, 9, -1, -1, -1]]
    assert pad_sequence(x, layout="zigzag", world_size=1, dim=0)[0] is x
    assert pad_sequence(x, layout="stripe", world_size=4, dim=-2)[0].shape == (4, 5)
    leaf = torch.randn(1, 5, requires_grad=True)
    pad_sequence(leaf, layout="stripe", world_size=4)[0].sum().backward()
    assert torch.equal(leaf.grad, torch.ones(1, 5)) if leaf.grad is not None else False


MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (3, 5)},
    {"window_size": (-1, 2)},
    {"causal": True, "window_size": (4, -1)},
]


def padded_attention(layout: LayoutName, garbage: float) -> list[float]:
    """Errors of out, lse, dq, dk, dv of a padded call on ranks against the sequence without padding."""
    world_size = dist.get_world_size()
    worst = []
    for mask in MASKS:
        q, k, v, dout = (torch.randn(1, 13, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        parts = []
        for leaf in leaves:
            padded, length = pad_sequence(leaf, layout=layout, world_size=world_size, value=garbage)
            parts.append(shard_sequence(padded, layout=layout))
        out, lse = ring_attention(*parts, layout=layout, total_length=length, return_lse=True, **mask)
        whole, whole_lse = (unshard_sequence(x, layout=layout, dim=d) for x, d in ((out, 1), (lse, 2)))
        assert (whole[:, 13:] == 0).all() and (whole_lse[..., 13:] == -torch.inf).all(), "padding rows are not void"
        dout_padded = pad_sequence(dout, layout=layout, world_size=world_size, value=7.0)[0]
        gradients = torch.autograd.grad((out * shard_sequence(dout_padded, layout=layout)).sum(), leaves)
        for gradient in gradients:  # every rank has the part that its own shards contributed
            dist.all_reduce(gradient)
        reference = attention_oracle(q, k, v, dout=dout, **mask)
        pairs = [(whole[:, :13], reference.out), (whole_lse[..., :13], reference.lse)]
        pairs += zip(gradients, (reference.dq, reference.dk, reference.dv), strict=True)  # type: ignore[arg-type]
        worst.append(max(compare(a, b).max_abs for a, b in pairs))
    return worst


@layouts
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan")], ids=str)
def test_padding_changes_nothing_for_any_mask(ranks: RunRanks, layout: LayoutName, garbage: float) -> None:
    """13 tokens on 3 ranks; what the padding holds does not matter."""
    for errors in ranks(3, padded_attention, layout, garbage):
        assert max(errors) < 1e-12, dict(zip(map(str, MASKS), errors, strict=True))


# --- errors say what to do


def test_lengths_that_do_not_divide() -> None:
    message = (
        r"a sequence of 12 tokens cannot be dealt out evenly to 4 ranks in the zigzag layout, which needs a "
        r"multiple of 8: pad it with ring_core.pad_sequence and pass the true length as total_length"
    )
    with pytest.raises(ValueError, match=message):
        shard_sequence(torch.zeros(1, 12), layout="zigzag", rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"13 tokens .* multiple of 4"):
        local_positions(13, layout="stripe", rank=0, world_size=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: shard_sequence(torch.zeros(1, 8), layout="spiral"),  # type: ignore[arg-type]
        lambda: unshard_sequence(torch.zeros(1, 8), layout="spiral"),  # type: ignore[arg-type]
        lambda: join_shards([torch.zeros(1, 8)], layout="spiral"),  # type: ignore[arg-type]
        lambda: local_positions(8, layout="spiral"),  # type: ignore[arg-type]
        lambda: padded_length(8, layout="spiral", world_size=1),  # type: ignore[arg-type]
        lambda: pad_sequence(torch.zeros(1, 8), layout="spiral", world_size=1),  # type: ignore[arg-type]
    ],
)
def test_unknown_layout(call: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'spiral'; there are 'contiguous', 'zigzag', 'stripe'"):
        call()


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 4), (0, 0)])
def test_a_rank_that_does_not_exist(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"got rank={rank}, world_size={world_size}"):
        shard_sequence(torch.zeros(1, 8), layout="stripe", rank=rank, world_size=world_size)


def test_rank_without_world_size() -> None:
    with pytest.raises(ValueError, match="rank and world_size"):
        shard_sequence(torch.zeros(1, 8), layout="stripe", rank=1)


def test_nothing_to_join() -> None:
    with pytest.raises(ValueError, match="join_shards needs the shards of all ranks, got an empty sequence"):
        join_shards([], layout="stripe")
