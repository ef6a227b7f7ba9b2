"""Documents packed into one stream: who sees whom, and how much work a stretch of queries is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ring_core.plan.problem import UNBOUNDED
from ring_core.segment import Array, count_pairs


@dataclass(frozen=True, eq=False)
class Documents:
    """Document d has queries [cu_q[d], cu_q[d + 1]) of one stream and keys [cu_k[d], cu_k[d + 1]) of another, aligned
    at their ends (bottom-right, as in flash-attn).

    Positions are counted in the stream of keys: query i of document d stands at i + cu_k[d + 1] - cu_q[d + 1]. So
    differences are those inside the document (masks, ALiBi), and no two documents share a position (dropout). They see
    each other iff -left <= key position - query position <= right; None is unbounded.
    """

    cu_q: Array  # int64 (documents + 1,)
    cu_k: Array
    left: int | None
    right: int | None

    @property
    def q_length(self) -> int:
        return int(self.cu_q[-1])

    @property
    def k_length(self) -> int:
        return int(self.cu_k[-1])

    @property
    def bounds(self) -> tuple[int, int]:
        """(left, right) with UNBOUNDED for None."""
        return (UNBOUNDED if self.left is None else self.left, UNBOUNDED if self.right is None else self.right)

    def of_query(self, index: Array) -> Array:
        """The document of each query (of the last one for the stream's end)."""
        found: Array = np.searchsorted(self.cu_q, index, side="right") - 1
        return np.minimum(found, len(self.cu_q) - 2)

    def offset(self, document: Array) -> Array:
        """What is added to a query's index in its stream to get its position in that of the keys."""
        shift: Array = self.cu_k[document + 1] - self.cu_q[document + 1]
        return shift

    def seen(self, start: Array, stop: Array, document: Array) -> tuple[Array, Array]:
        """Keys [low, high) that queries [start, stop) of one document see; nothing: low == high."""
        left, right = self.bounds
        offset = self.offset(document)
        low = np.maximum(self.cu_k[document], start + offset - left)
        high = np.minimum(self.cu_k[document + 1], stop + offset + right)
        return low, np.maximum(low, high)

    @cached_property
    def _table(self) -> tuple[Array, Array, Array, Array]:
        """Of each document: its keys, its band (counted from its first query and key), visible pairs before it."""
        left, right = self.bounds
        q_len, k_len = np.diff(self.cu_q), np.diff(self.cu_k)
        lower, upper = (np.clip(k_len - q_len + side, -q_len, k_len) for side in (-left, right))
        pairs = count_pairs(q_len, k_len, lower, upper)
        return k_len, lower, upper, np.cumsum(pairs) - pairs

    def pairs_before(self, index: Array) -> Array:
        """Visible pairs of queries [0, index), in closed form: what a stretch of queries costs is a difference."""
        if len(self.cu_q) < 2:
            return np.zeros_like(index)
        document = self.of_query(index)
        k_len, lower, upper, before = (column[document] for column in self._table)
        total: Array = before + count_pairs(index - self.cu_q[document], k_len, lower, upper)
        return total

    def cut_cost(self, index: Array) -> Array:
        """Keys that have to travel (at least) because the stream is cut before query `index`: those of its document
        that are seen from the other side."""
        if len(self.cu_q) < 2:
            return np.zeros_like(index)
        left, right = self.bounds
        document = self.of_query(index)
        cost: Array = np.minimum(index - self.cu_q[document], left) + np.minimum(
            self.cu_q[document + 1] - index, right
        ) * (index > self.cu_q[document])
        return cost
