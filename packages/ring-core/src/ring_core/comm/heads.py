"""How many heads the gather schedule takes at a time."""

from __future__ import annotations

from torch import Tensor

from ring_core.plan import PackedProblem, Problem

MOST_GROUPS = 4
TOKENS_OF_A_GROUP = 2048
"""Local tokens times key heads at which a group's kernels still fill a GPU."""


def head_groups(problem: Problem | PackedProblem, k: Tensor, at_once: int = 0) -> tuple[slice, ...]:
    """Equal groups of key heads, the same on all ranks.

    Args:
        k: (B, S, Hkv, D): local keys.
        at_once: heads in a group; 0: as many groups, up to MOST_GROUPS, as leave each enough work (one on a CPU, where
            nothing runs side by side).
    """
    heads = k.shape[2]
    if not at_once:
        tokens = problem.k_length // problem.world_size * k.shape[0]
        wanted = min(MOST_GROUPS, tokens * heads // TOKENS_OF_A_GROUP) if k.is_cuda else 1
        at_once = next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= max(1, wanted))
    return tuple(slice(start, start + at_once) for start in range(0, heads, at_once))
