"""Who attends to what, in which order, and what has to travel for it: pure functions of lengths, mask, layout and rank.

A plan cuts one rank's share of the score matrix into *segments*: a rectangle of local queries and of keys in some
piece, of which the band `lower <= j - i <= upper` is visible (i, j counted from the rectangle's first query and key).
Causal blocks at any offset, zigzag halves, stripe diagonals and sliding windows are all bands. Nothing below this
module knows layouts or masks.

                 keys of rank 0      rank 1        rank 2 (own)
    queries of  ┌──────────────┬──────────────┬──────────────┐
    rank 2      │   full band  │   full band  │ band: upper=0│     contiguous, causal: three segments of one strip
                └──────────────┴──────────────┴──────────────┘

Segments are tabled twice. *Query-major* (forward): local queries are cut into strips whose rows all visit the same
segments; the rows of a strip's segments are adjacent, so one CTA owns a query tile and walks its keys in plan order.
Each strip begins with one segment flagged FIRST and ends with one flagged LAST. *Key-major* (backward): the same with
keys and queries exchanged, remote pieces first where all are present at once, so that their gradients go home under the
rest of the compute.

No tensors and no process groups here: a plan for any rank of 1,024 can be made, counted and tested on a laptop.
"""

from ring_core.plan.cost import attention_flops, message_bytes
from ring_core.plan.dealing import PACKED_LAYOUTS, PackedLayoutName
from ring_core.plan.make import SCHEDULES, make_plan
from ring_core.plan.packed import PackedProblem
from ring_core.plan.problem import Problem
from ring_core.plan.schedule import GatherPlan, GradientHop, Hop, Placement, Plan, RingPlan, Step
from ring_core.segment import COLUMNS, FIRST, LAST, Segment, Table, count_pairs

__all__ = [
    "COLUMNS",
    "FIRST",
    "LAST",
    "PACKED_LAYOUTS",
    "SCHEDULES",
    "GatherPlan",
    "GradientHop",
    "Hop",
    "PackedLayoutName",
    "PackedProblem",
    "Placement",
    "Plan",
    "Problem",
    "RingPlan",
    "Segment",
    "Step",
    "Table",
    "attention_flops",
    "count_pairs",
    "make_plan",
    "message_bytes",
]
