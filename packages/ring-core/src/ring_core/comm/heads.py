"""How many heads the gather schedule takes at a time, where it is not all of them (`ring_core.comm.staged`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

from torch import Tensor

from ring_core.plan import PackedProblem, Problem, attention_flops

Direction = Literal["forward", "backward"]
MOST_GROUPS: dict[Direction, int] = {"forward": 2, "backward": 4}
"""A group costs launches. A backward's buffers are large (gradients in fp32, the kernels' own scratch), so it takes
fewer heads at a time. On 4 H200s, 32768 tokens, 32/8 heads, flash-attn forward and backward: 25.1 ms in one group and
1010 MiB of buffers, 24.5 ms and 421 MiB in four; at 8192 tokens every further group costs 0.7 ms of the host's time,
twice the computation."""
FLOPS_OF_A_GROUP = 5e11
"""About a millisecond of a GPU's: what a group must have to be worth its launches."""


def head_groups(
    problem: Problem | PackedProblem, num_heads: int, k: Tensor, direction: Direction, at_once: int = 0
) -> tuple[slice, ...]:
    """Groups of key heads, the same on all ranks: equal ones, but for small ones where nothing hides what they wait
    for, the first arrival and the last way home.

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
        return _slices(_tapered(heads, at_once, direction))
    return _slices([at_once] * (heads // at_once))


def _tapered(heads: int, at_once: int, direction: Direction) -> list[int]:
    count, small = heads // at_once, max(1, at_once // 2)
    if count == 1 or small == at_once:
        return [at_once] * count
    if direction == "forward":
        return [small // 2 or 1, *[at_once] * (count - 2), 2 * at_once - (small // 2 or 1)]
    return [small, *[at_once] * (count - 1), at_once - small]


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    ends = list(accumulate(sizes, initial=0))
    return tuple(slice(start, stop) for start, stop in pairwise(ends))
