"""When the keys that a forward gathered stay for its backward, which then gathers none."""

from __future__ import annotations

from functools import lru_cache

from ring_core.plan import PackedProblem, Problem
from ring_core.plan.packed_schedule import most_gathered

MOST_OF_SAVED = 0.25
"""Share of what autograd saves of such a call anyway (q, k, v, out) that the gathered keys may add to it. Of packed
documents, few keys travel, and gathering them again takes a host longer than a GPU: with 8192 tokens a rank some 0.3 ms
of a backward's 1.3. A sequence whose keys all ranks need would be kept whole on each: it is gathered again."""


@lru_cache(maxsize=256)
def keeps(problem: Problem | PackedProblem, num_heads: int, num_kv_heads: int, head_groups: int) -> bool:
    """Whether the forward's keys are kept, taken in so many groups of heads; the same on all ranks, also where they
    hold more and fewer tokens."""
    if not isinstance(problem, PackedProblem) or head_groups > 1:
        return False
    saved = 2 * (problem.q_length * num_heads + problem.k_length * num_kv_heads) / problem.world_size  # heads' rows
    return 2 * most_gathered(problem) * num_kv_heads <= MOST_OF_SAVED * saved
