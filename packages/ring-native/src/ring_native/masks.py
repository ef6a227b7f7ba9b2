"""Bands as the masks that kernels have.

Every kernel here says a band as flash-attn does, (left, right) aligned at the last query and key: query i sees key j
iff -left <= j - (i + Sk - Sq) <= right, and -1 is no bound. flash-attn reads any negative number, and any number >= Sk,
as no bound, so a block may be handed over as it is only where what it means fits in between; elsewhere it is split.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ring_core.backend import UnsupportedError
from ring_native.blocks import UNBOUNDED, Block, trimmed

MASK_ELEMENTS = 1 << 24
"""Largest mask tensor of the style ANY."""


class Mask(NamedTuple):
    """A band, aligned at the last query and key; -1: not bounded on that side."""

    left: int = -1
    right: int = -1

    @property
    def full(self) -> bool:
        return self == FULL

    @property
    def causal(self) -> bool:
        return self == CAUSAL


FULL, CAUSAL = Mask(), Mask(right=0)


class Style(Enum):
    """Which blocks a kernel takes as they are."""

    __hash__ = object.__hash__  # in C, unlike Enum's: calls are looked up by it

    BOTTOM_RIGHT = "bands with Sq <= Sk, and rectangles that are wholly visible"  # flash-attn and its relatives
    SQUARES = "causal squares, and rectangles that are wholly visible"  # cuDNN: aligned top-left, no windows
    ANY = "any band, by a mask tensor where it is not causal from the top left"  # torch's CPU kernel


def mask_of(block: Block) -> Mask:
    """A trimmed block's mask. Its last query sees its last key as far as `right` goes, and something as far as `left`
    goes, so both are >= 0 where they cut."""
    distance = block.k_len - block.q_len
    lower, upper = block.bounds
    left = -1 if block.lower == -UNBOUNDED else distance - lower
    right = -1 if block.upper == UNBOUNDED else upper - distance
    return Mask(left, right)


def split(block: Block, style: Style) -> list[Block]:
    """The trimmed block as disjoint blocks that the style takes. Rows are split rather than keys where there is a
    choice: keys cost a merge.

    Raises:
        UnsupportedError: SQUARES, and the band has a lower bound (a window's edge).
    """
    whole = block.lower == -UNBOUNDED and block.upper == UNBOUNDED
    if whole:
        return [block]
    if style is Style.BOTTOM_RIGHT:
        return [block] if block.q_len <= block.k_len else _split_rows(block, _unbounded_from(block), style)
    if style is Style.SQUARES:
        return _squares(block)
    rows = max(1, MASK_ELEMENTS // block.k_len)
    if block.q_len <= rows or (block.lower == -UNBOUNDED and block.bounds[1] == 0):
        return [block]
    return _split_rows(block, rows, style)


def in_place(block: Block) -> Block:
    """The trimmed block, whose offset counts, for a kernel of the style BOTTOM_RIGHT that adds -slope * |distance|. It
    takes the last query and the last key to lie at one position, so nothing can be cut off; nor need it be where that
    is so, as the mask is then the window that the whole call has.

    Raises:
        UnsupportedError: they do not lie at one position (blocks of several ranks), or the window reaches further to
            the right than there are keys and still cuts (more queries than keys), which would be read as no bound.
    """
    if block.k_stop - block.q_stop != block.offset:
        raise UnsupportedError(
            "ALiBi: this kernel counts distances from the last query and key that it is given, and those of a block "
            f"here lie {abs(block.k_stop - block.q_stop - block.offset)} positions apart"
        )
    if mask_of(block).right >= block.k_len:
        raise UnsupportedError(
            f"ALiBi: this kernel takes window_size=(..., {mask_of(block).right}) for no bound where there are "
            f"{block.k_len} keys, but of more queries some do not see them all"
        )
    return block


def _split_rows(block: Block, rows: int, style: Style) -> list[Block]:
    edge = block.q_start + rows
    parts = [trimmed(block._replace(q_stop=edge)), trimmed(block._replace(q_start=edge))]
    return [piece for part in parts if part is not None for piece in split(part, style)]


def _unbounded_from(block: Block) -> int:
    """Of more rows than keys, how many come before the first whose view the upper bound no longer cuts; where there is
    no such bound, before the first that the lower one cuts. Both parts then have fewer rows than keys, or see all."""
    lower, upper = block.bounds
    return block.k_len - 1 - upper if block.upper != UNBOUNDED else 1 - lower


def _squares(block: Block) -> list[Block]:
    if block.lower != -UNBOUNDED:
        raise UnsupportedError(
            "a window's edge cannot be made of causal squares and rectangles, which is all that this kernel has"
        )
    _, upper = block.bounds
    row, key = block.q_start + block.k_len - upper, block.k_start + upper
    parts = [
        block._replace(q_stop=row, k_stop=key, upper=UNBOUNDED),
        block._replace(q_stop=row, k_start=key),
        block._replace(q_start=row, upper=UNBOUNDED),
    ]
    return [part for part in map(trimmed, parts) if part is not None]


class Choice(NamedTuple):
    """Masks that show a block alike: left and right anywhere in these ranges, ends included."""

    left: tuple[int, int]
    right: tuple[int, int]

    @staticmethod
    def of(block: Block) -> Choice:
        mask = mask_of(block)
        return Choice(
            (block.k_len - 1, UNBOUNDED) if mask.left < 0 else (mask.left, mask.left),
            (block.q_len - 1, UNBOUNDED) if mask.right < 0 else (mask.right, mask.right),
        )

    def both(self, other: Choice) -> Choice | None:
        """Masks that do for either, or None."""
        left = max(self.left[0], other.left[0]), min(self.left[1], other.left[1])
        right = max(self.right[0], other.right[0]), min(self.right[1], other.right[1])
        return Choice(left, right) if left[0] <= left[1] and right[0] <= right[1] else None

    @property
    def mask(self) -> Mask:
        return Mask(*(-1 if highest == UNBOUNDED else highest for _, highest in self))
