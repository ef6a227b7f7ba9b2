"""Segments of a table joined into as few rectangles as possible: every rectangle is a call of somebody's kernel.

Pure integers. A block has absolute coordinates: queries are local rows, keys are counted through all pieces (piece *
piece_length + k_start), and its band bounds (key - query). Then two blocks are one iff
their bounding rectangle, under the narrowest band that holds both, shows as many pairs as they do.

Where distances matter (ALiBi), blocks also know what their coordinates say of positions, and are one only if that
agrees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ring_core.backend import UnsupportedError
from ring_core.segment import Segment

UNBOUNDED = 1 << 62
"""An upper bound that cuts nothing; its negative is such a lower bound."""


class Block(NamedTuple):
    """Query i and key j, q_start <= i < q_stop, k_start <= j < k_stop, see each other iff lower <= j - i <= upper.

    batch: -1 is every batch entry. Bounds that cut nothing are -UNBOUNDED and UNBOUNDED. offset: i + offset - j is how
    many positions the query lies behind the key, where distances matter, else 0.
    """

    batch: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lower: int
    upper: int
    offset: int = 0

    @property
    def q_len(self) -> int:
        return self.q_stop - self.q_start

    @property
    def k_len(self) -> int:
        return self.k_stop - self.k_start

    @property
    def bounds(self) -> tuple[int, int]:
        """lower, upper of j - i counted from the block's first query and key (of no meaning where they cut nothing)."""
        shift = self.q_start - self.k_start
        return self.lower + shift, self.upper + shift


def trimmed(block: Block) -> Block | None:
    """Without the rows that see nothing and the keys that nobody sees; None where nothing is left."""
    batch, q0, q1, k0, k1, lower, upper, offset = block
    q0, q1 = max(q0, k0 - upper), min(q1, k1 - lower)
    if q0 >= q1 or lower > upper:
        return None
    k0, k1 = max(k0, q0 + lower), min(k1, q1 + upper)
    if k0 >= k1:
        return None
    lower = -UNBOUNDED if lower <= k0 - q1 + 1 else lower
    upper = UNBOUNDED if upper >= k1 - 1 - q0 else upper
    return Block(batch, q0, q1, k0, k1, lower, upper, offset)


def pairs(block: Block) -> int:
    """Visible pairs, in closed form."""
    q_len, k_len, (lower, upper) = block.q_len, block.k_len, block.bounds
    return max(0, _pairs_up_to(q_len, k_len, upper) - _pairs_up_to(q_len, k_len, lower - 1))


def _pairs_up_to(q_len: int, k_len: int, upper: int) -> int:
    """Pairs with j - i <= upper: the sum over i of clip(i + upper + 1, 0, k_len)."""

    def ramp(stop: int) -> int:  # the sum over i < q_len of max(i + stop, 0)
        last = q_len - 1 + stop
        terms = min(max(last, 0), q_len)
        return terms * (2 * last - terms + 1) // 2

    return ramp(upper + 1) - ramp(upper + 1 - k_len)


def merged(a: Block, b: Block) -> Block | None:
    """Both, which share no pair, as one block, or None where that would show other pairs.

    If any band over the bounding rectangle shows just those, the narrowest that shows all of them does. A lower bound
    is not made where neither has one: a run of documents of one token is no window, which not every kernel has.
    """
    if (a.batch, a.offset) != (b.batch, b.offset):
        return None
    union = Block(
        a.batch,
        min(a.q_start, b.q_start),
        max(a.q_stop, b.q_stop),
        min(a.k_start, b.k_start),
        max(a.k_stop, b.k_stop),
        min(max(block.lower, block.k_start - block.q_stop + 1) for block in (a, b)),
        max(min(block.upper, block.k_stop - 1 - block.q_start) for block in (a, b)),
        a.offset,
    )
    if pairs(union) != pairs(a) + pairs(b):
        return None
    tight = trimmed(union)
    windows = max(a.lower, b.lower) > -UNBOUNDED
    return tight if tight is not None and (windows or tight.lower == -UNBOUNDED) else None


def coalesced(segments: Iterable[Segment], piece_length: int, distances: bool = False) -> list[Block]:
    """Blocks that show exactly the pairs of the segments, trimmed, sorted by batch entry, query and key; distances:
    whether those matter.

    Raises:
        UnsupportedError: they do, and positions go in larger steps than rows (as those of a stripe).
    """
    blocks = []
    for s in segments:
        k_start = s.piece * piece_length + s.k_start
        shift = k_start - s.q_start
        offset = 0
        if distances:
            if s.stride != 1:
                raise UnsupportedError(
                    f"ALiBi: neighbouring tokens lie {s.stride} positions apart here, and kernels count them as one"
                )
            offset = s.q_position - s.k_position + shift
        block = Block(
            s.batch,
            s.q_start,
            s.q_start + s.q_len,
            k_start,
            k_start + s.k_len,
            s.lower + shift,
            s.upper + shift,
            offset,
        )
        block_or_none = trimmed(block)
        if block_or_none is not None:
            blocks.append(block_or_none)
    count = len(blocks) + 1
    while len(blocks) < count:
        count = len(blocks)
        blocks = _sweep(blocks, "k_start", "k_stop")
        blocks = _sweep(blocks, "q_start", "q_stop")
    return sorted(blocks)


def _sweep(blocks: list[Block], start: str, stop: str) -> list[Block]:
    """Joins neighbours along one axis, in one pass."""
    ending: defaultdict[tuple[int, int], list[Block]] = defaultdict(list)  # by (batch entry, where they end)
    for block in sorted(blocks, key=lambda block: (getattr(block, start), block)):
        before = ending[block.batch, getattr(block, start)]
        for candidate in before:
            union = merged(candidate, block)
            if union is not None:
                before.remove(candidate)
                block = union
                break
        ending[block.batch, getattr(block, stop)].append(block)
    return [block for group in ending.values() for block in group]
