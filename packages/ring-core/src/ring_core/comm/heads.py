"""How many heads the gather schedule takes at a time, where it is not all of them (`ring_core.comm.staged`)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from torch import Tensor

from ring_core.plan import PackedProblem, Problem, attention_flops

Direction = Literal["forward", "backward"]
MOST_GROUPS: dict[Direction, int] = {"forward": 2, "backward": 4}
"""A group costs launches, and what is first to arrive and last to go home is hidden behind nothing, whatever its size.
A backward's buffers are large (gradients in fp32, the kernels' own scratch), so it takes fewer heads at a time. On 4
H200s, 32768 tokens, 32/8 heads, flash-attn forward and backward: 25.1 ms in one group and 1010 MiB of buffers, 24.5 ms
and 421 MiB in four; at 8192 tokens every further group costs 0.7 ms of the host's time, twice the computation.

Groups of unequal size, small ones first and last, gain nothing: forward 6.19 ms in groups of 4 + 4 heads, 6.16 in
2 + 6, 6.60 in 1 + 7; both 24.7 ms in 2 + 2 + 2 + 2, 25.1 in 1 + 2 + 2 + 2 + 1 (small groups leave processors idle),
24.5 in 2 + 4 + 2, which needs half as much memory again."""
FLOPS_OF_A_GROUP = 5e11
"""About a millisecond of a GPU's: what a group must have to be worth its launches."""


def head_groups(
    problem: Problem | PackedProblem, num_heads: int, k: Tensor, direction: Direction, at_once: int = 0
) -> tuple[slice, ...]:
    """Equal groups of key heads, the same on all ranks.

    Args:
        num_heads: Hq.
        k: (B, S, Hkv, D): local keys.
        direction: "forward" or "backward".
        at_once: key heads in a group; 0: as many groups, up to those of MOST_GROUPS, as leave each enough work (one on
            a CPU, where nothing runs side by side).
    """
    return _groups(problem, k.shape[0], num_heads, k.shape[2], k.shape[3], direction, k.is_cuda, at_once)


@lru_cache(maxsize=256)
def _groups(
    problem: Problem | PackedProblem,
    batch: int,
    num_heads: int,
    heads: int,
    head_dim: int,
    direction: Direction,
    cuda: bool,
    at_once: int,
) -> tuple[slice, ...]:
    if not at_once:
        size = {"batch": batch, "num_heads": num_heads, "head_dim": head_dim}
        flops = attention_flops(problem.visible_pairs(), **size, backward=direction == "backward") / problem.world_size
        wanted = min(MOST_GROUPS[direction], int(flops / FLOPS_OF_A_GROUP)) if cuda else 1
        at_once = next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= max(1, wanted))
    return tuple(slice(start, start + at_once) for start in range(0, heads, at_once))
