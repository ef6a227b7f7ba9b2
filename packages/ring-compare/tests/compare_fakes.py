"""Implementations for tests, named on the command line as `compare_fakes:<factory>`: good ones and bad ones."""

import os
import time

import torch
import torch.distributed as dist

from ring_compare.suites import Cell
from ring_core import UnsupportedError, join_shards, local_positions


class _Gather(torch.autograd.Function):
    """All-gather of a shard in rank order; the gradient of a shard is the sum over ranks."""

    @staticmethod
    def forward(ctx, shard, world_size):
        shards = [torch.empty_like(shard) for _ in range(world_size)]
        dist.all_gather(shards, shard.contiguous())
        return tuple(shards)

    @staticmethod
    def backward(ctx, *gradients):
        gradients = torch.stack(gradients)
        dist.all_reduce(gradients)
        return gradients[dist.get_rank()], None


class Plain:
    """Attention by all-gather and one softmax: right, and none of ring_core's schedules."""

    name = "plain"

    def provider(self, device: torch.device) -> str:
        return "torch"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        return None

    def call(self, q, k, v, cell, group):
        rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if world_size > 1:
            k, v = (join_shards(_Gather.apply(x, world_size), layout=cell.layout, dim=1) for x in (k, v))
        position = local_positions(cell.Sk, layout=cell.layout, rank=rank, world_size=world_size)[:, None]
        offset = torch.arange(cell.Sk)[None] - position
        left, right = cell.window_size
        right = 0 if cell.causal else right
        hidden = (offset > right) & (right >= 0) | (offset < -left) & (left >= 0)
        k, v = (x.repeat_interleave(cell.Hq // cell.Hkv, dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q * cell.D**-0.5, k).masked_fill(hidden, float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), v)
        return out, torch.logsumexp(scores.float(), dim=-1)


class Wrong(Plain):
    name = "wrong"

    def call(self, q, k, v, cell, group):
        out, lse = super().call(q, k, v, cell, group)
        return out * 1.01, lse


class NotANumber(Plain):
    name = "nan"

    def call(self, q, k, v, cell, group):
        out, lse = super().call(q, k, v, cell, group)
        return out * float("nan"), lse


class RaisesOnLastRank(Plain):
    name = "raises"

    def call(self, q, k, v, cell, group):
        if group is None or dist.get_rank(group) == dist.get_world_size(group) - 1:
            raise RuntimeError("this kernel cannot\ndo that")
        return super().call(q, k, v, cell, group)


class RaisesOnLastRankOfLong(RaisesOnLastRank):
    name = "raises late"

    def call(self, q, k, v, cell, group):
        fine = cell.Sq < 128
        return Plain.call(self, q, k, v, cell, group) if fine else super().call(q, k, v, cell, group)


class RaisesEverywhere(Plain):
    name = "refuses"

    def call(self, q, k, v, cell, group):
        raise ValueError("no such head dim")


class Hangs(Plain):
    name = "hangs"

    def call(self, q, k, v, cell, group):
        time.sleep(3600)
        return super().call(q, k, v, cell, group)


class Dies(Plain):
    name = "dies"

    def call(self, q, k, v, cell, group):
        os.write(2, b"illegal instruction, or so\n")
        os._exit(7)


class Unsupported(Plain):
    name = "unsupported"

    def call(self, q, k, v, cell, group):
        raise UnsupportedError("no causal masks here; reference has them")


class Onward(Plain):
    """Has no backward."""

    name = "onward"

    def call(self, q, k, v, cell, group):
        if torch.is_grad_enabled() and q.requires_grad:
            raise UnsupportedError("it computes no gradients; reference does")
        return super().call(q, k, v, cell, group)


class OnwardWrong(Onward):
    name = "onward, wrong"

    def call(self, q, k, v, cell, group):
        out, lse = super().call(q, k, v, cell, group)
        return out * 1.01, lse


class Picky(Plain):
    name = "picky"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        return "only on Sundays"


class Native(Plain):
    """Stands for ring-native with flash-attn."""

    name = "native"

    def provider(self, device: torch.device) -> str:
        return "flash-attn"
