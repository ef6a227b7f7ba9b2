"""How a sequence is dealt out to ranks.

contiguous   rank r holds chunk r of W             simple; causal work is uneven
zigzag       rank r holds half-chunks r, 2W-1-r    causal work is even (as in Megatron-LM and ring-flash-attn)
stripe       rank r holds tokens r, r+W, r+2W, …   causal work is even up to a diagonal (Brandon et al., "Striped
                                                   attention", arXiv:2311.09431)

A rank's tokens are one or two *runs*: stretches of its local tensor whose global indices are evenly spaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ring_core.group import Group, process_group, rank_and_size

LayoutName = Literal["contiguous", "zigzag", "stripe"]
LAYOUTS: tuple[str, ...] = get_args(LayoutName)


@dataclass(frozen=True, slots=True)
class Run:
    """Local tokens [start, start + length) whose global indices are index, index + stride, …"""

    start: int
    length: int
    index: int
    stride: int


def multiple(layout: str, world_size: int) -> int:
    """Global lengths must be a multiple of this: W, for zigzag 2W."""
    return 2 * world_size if layout == "zigzag" else world_size


def local_runs(layout: str, rank: int, world_size: int, length: int) -> tuple[Run, ...]:
    """The runs of `rank` for a sequence of `length` tokens, a multiple of `multiple(layout, world_size)`."""
    chunk = length // world_size
    if layout == "contiguous":
        return (Run(0, chunk, rank * chunk, 1),)
    if layout == "stripe":
        return (Run(0, chunk, rank, world_size),)
    half = chunk // 2
    return (Run(0, half, rank * half, 1), Run(half, half, (2 * world_size - 1 - rank) * half, 1))


def padded_length(length: int, *, layout: LayoutName, world_size: int) -> int:
    """The smallest length >= `length` that the layout can deal out evenly."""
    _check_layout(layout)
    return -(-length // multiple(layout, world_size)) * multiple(layout, world_size)


def pad_sequence(
    tensor: Tensor, *, layout: LayoutName, world_size: int, dim: int = 1, value: float = 0.0
) -> tuple[Tensor, int]:
    """Pads `dim` at its end to a length that divides.

    Returns the padded tensor and the true length; hand the latter to the attention functions as `total_length`, which
    keeps the padding out of every mask, also the non-causal ones.
    """
    length = tensor.shape[dim]
    missing = padded_length(length, layout=layout, world_size=world_size) - length
    if not missing:
        return tensor, length
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim), length


def shard_sequence(
    tensor: Tensor,
    *,
    layout: LayoutName,
    dim: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    group: Group | None = None,
) -> Tensor:
    """The part of a whole sequence that one rank holds. Differentiable; no communication.

    Args:
        tensor: any shape and dtype, the whole sequence along `dim`.
        layout: "contiguous", "zigzag" or "stripe".
        dim: the sequence dimension.
        rank, world_size: default to this process's place in `group` (the default group; without one, rank 0 of 1).

    Returns:
        A contiguous tensor, `dim` shortened to length / world_size.

    Raises:
        ValueError: the length does not divide; `pad_sequence` makes it.
    """
    rank, world_size = place_of(rank, world_size, group)
    length = tensor.shape[dim]
    _check_length(length, layout, world_size)
    if layout == "stripe":
        return tensor.movedim(dim, 0)[rank::world_size].movedim(0, dim).contiguous()
    runs = local_runs(layout, rank, world_size, length)
    return torch.cat([tensor.narrow(dim, run.index, run.length) for run in runs], dim=dim)


def join_shards(shards: Sequence[Tensor], *, layout: LayoutName, dim: int = 1) -> Tensor:
    """The whole sequence from the shards of all ranks, in rank order: the exact inverse of `shard_sequence`.
    Differentiable."""
    _check_layout(layout)
    if not shards:
        raise ValueError("join_shards needs the shards of all ranks, got an empty sequence")
    if layout == "contiguous":
        return torch.cat(list(shards), dim=dim)
    if layout == "stripe":
        dim %= shards[0].dim()
        return torch.stack(list(shards), dim=dim + 1).flatten(dim, dim + 1)
    half = shards[0].shape[dim] // 2
    first = [shard.narrow(dim, 0, half) for shard in shards]
    second = [shard.narrow(dim, half, half) for shard in reversed(shards)]
    return torch.cat(first + second, dim=dim)


def unshard_sequence(tensor: Tensor, *, layout: LayoutName, dim: int = 1, group: Group | None = None) -> Tensor:
    """The whole sequence on every rank, from every rank's part of it: an all-gather over `group`.

    Differentiable: the gradient of a rank's part is the sum over ranks of what reached it, so a loss that every rank
    computes on the whole sequence counts world_size times (divide it, or take it on one rank).
    """
    _check_layout(layout)
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return join_shards([tensor], layout=layout, dim=dim)
    shards = _AllGather.apply(tensor, process_group(group))  # type: ignore[no-untyped-call]
    return join_shards(shards, layout=layout, dim=dim)


def local_positions(
    length: int,
    *,
    layout: LayoutName,
    rank: int | None = None,
    world_size: int | None = None,
    group: Group | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Global positions of a rank's tokens, for rotary embeddings.

    Args:
        length: of the whole (padded) sequence.
        layout, rank, world_size, group: as in `shard_sequence`.
        device: of the result.

    Returns:
        int64 (length / world_size,), in the order of the local tokens.

    Raises:
        ValueError: the length cannot be dealt out evenly.
    """
    rank, world_size = place_of(rank, world_size, group)
    _check_length(length, layout, world_size)
    runs = local_runs(layout, rank, world_size, length)
    return torch.cat([run.index + run.stride * torch.arange(run.length, device=device) for run in runs])


class _AllGather(torch.autograd.Function):
    """All shards of a group; backward sums each rank's gradients home."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        ctx.group = group
        _, world_size = rank_and_size(group)
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(shards, tensor.contiguous(), group=group)
        return tuple(shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rank, _ = rank_and_size(ctx.group)
        total = torch.stack([grad.contiguous() for grad in grads])
        dist.all_reduce(total, group=ctx.group)  # gloo knows no reduce-scatter in every release
        return total[rank], None


def gather_uneven(tensor: Tensor, lengths: Sequence[int], dim: int, group: Group | None) -> list[Tensor]:
    """The tensors of all ranks, of those lengths along `dim`. Differentiable, see `unshard_sequence`."""
    if len(lengths) == 1:
        return [tensor]
    missing = list(tensor.shape)
    missing[dim] = max(lengths) - tensor.shape[dim]
    even = torch.cat([tensor, tensor.new_zeros(missing)], dim=dim) if missing[dim] else tensor
    shards = _AllGather.apply(even, process_group(group))  # type: ignore[no-untyped-call]
    return [shard.narrow(dim, 0, length) for shard, length in zip(shards, lengths, strict=True)]


def place_of(rank: int | None, world_size: int | None, group: Group | None) -> tuple[int, int]:
    """(rank, world_size) as given, else this process's in the group."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size, or neither (then the group's): got {rank=}, {world_size=}")
    if rank is None or world_size is None:
        return rank_and_size(group)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size): got {rank=}, {world_size=}")
    return rank, world_size


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; there are {', '.join(map(repr, LAYOUTS))}")


def _check_length(length: int, layout: str, world_size: int) -> None:
    _check_layout(layout)
    if length % multiple(layout, world_size):
        raise ValueError(
            f"a sequence of {length} tokens cannot be dealt out evenly to {world_size} ranks in the {layout} layout, "
            f"which needs a multiple of {multiple(layout, world_size)}: pad it with ring_core.pad_sequence and pass "
            f"the true length as total_length"
        )
