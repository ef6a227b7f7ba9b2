"""One row of a segment table, and the table as a kernel reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FIRST, LAST = 1, 2


class Segment(NamedTuple):
    """One row of a table; see the package's docstring. Positions are global: key j lies at k_position + stride * j."""

    q_start: int
    q_len: int
    piece: int
    k_start: int
    k_len: int
    lower: int
    upper: int
    q_position: int
    k_position: int
    stride: int
    batch: int
    flags: int

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        return int(count_pairs(*(np.array([x]) for x in (self.q_len, self.k_len, self.lower, self.upper)))[0])


COLUMNS = Segment._fields


@dataclass(frozen=True, eq=False)
class Table:
    """Segments as a kernel reads them.

    rows: int32 (N, 12), columns as in `Segment`; groups: int32 (G + 1,), group g is rows[groups[g]:groups[g + 1]], all
        of one strip.
    """

    rows: NDArray[np.int32]
    groups: NDArray[np.int32]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """For the layers above: copies of the table on their devices."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(Segment(*row) for row in self.rows.tolist())

    @cached_property
    def grouped(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of each group."""
        edges = self.groups.tolist()
        return tuple(self.segments[start:stop] for start, stop in pairwise(edges))

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all segments."""
        return int(count_pairs(*(self.rows[:, COLUMNS.index(c)] for c in ("q_len", "k_len", "lower", "upper"))).sum())


def count_pairs(q_len: Array, k_len: Array, lower: Array, upper: Array) -> Array:
    """Pairs with 0 <= i < q_len, 0 <= j < k_len, lower <= j - i <= upper, elementwise, in closed form."""
    q_len, k_len, lower, upper = (np.asarray(x, dtype=np.int64) for x in (q_len, k_len, lower, upper))
    below: Array = _pairs_below(q_len, k_len, upper) - _pairs_below(q_len, k_len, lower - 1)
    return np.maximum(below, 0)


def _pairs_below(q_len: Array, k_len: Array, upper: Array) -> Array:
    """Pairs with j - i <= upper: sum over i of clip(i + upper + 1, 0, k_len)."""

    def ramp(stop: Array) -> Array:  # sum over i < q_len of max(i + stop, 0)
        last = q_len - 1 + stop
        terms = np.clip(last, 0, q_len)
        total: Array = terms * (2 * last - terms + 1) // 2
        return total

    found: Array = ramp(upper + 1) - ramp(upper + 1 - k_len)
    return found
