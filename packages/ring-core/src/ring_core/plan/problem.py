"""What is attended, over all ranks: lengths, mask, layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ring_core.layout import Run, local_runs, multiple

UNBOUNDED = 1 << 40


@dataclass(frozen=True, slots=True)
class Problem:
    """What is attended, over all ranks.

    q_length, k_length: the global lengths, padding included; q_total, k_total: the true ones. Query i sits at position
    i + k_total - q_total, key j at position j (bottom-right alignment, as in flash-attn), and they see each other iff
    -left <= key position - query position <= right; None is unbounded.
    """

    q_length: int
    k_length: int
    q_total: int
    k_total: int
    left: int | None
    right: int | None
    layout: str
    world_size: int

    def __post_init__(self) -> None:
        step = multiple(self.layout, self.world_size)
        for name, length, total in (("q", self.q_length, self.q_total), ("k", self.k_length, self.k_total)):
            if length % step:
                raise ValueError(
                    f"{name}_length={length} is no multiple of {step} ({self.layout}, {self.world_size} ranks)"
                )
            if not 0 <= total <= length:
                raise ValueError(f"{name}_total must be in [0, {name}_length={length}]: got {total}")

    @property
    def offset(self) -> int:
        """Position of query 0."""
        return self.k_total - self.q_total

    @property
    def bounds(self) -> tuple[int, int]:
        """(left, right) with UNBOUNDED for None."""
        return (
            UNBOUNDED if self.left is None else self.left,
            UNBOUNDED if self.right is None else self.right,
        )

    @property
    def travels(self) -> bool:
        """Whether some rank sees keys of another."""
        return self.world_size > 1

    def key_chunk(self, rank: int) -> int:
        """Tokens of keys that a rank holds, padding included."""
        return self.k_length // self.world_size

    @property
    def longest_key_chunk(self) -> int:
        return self.k_length // self.world_size

    def query_runs(self, rank: int) -> list[Run]:
        """A rank's runs of queries, without the padding at their ends."""
        runs = local_runs(self.layout, rank, self.world_size, self.q_length)
        true = [-(-(self.q_total - run.index) // run.stride) for run in runs]
        return [replace(run, length=max(0, min(run.length, n))) for run, n in zip(runs, true, strict=True)]

    def padding_rows(self, rank: int) -> list[tuple[int, int]]:
        """Local rows (start, stop) of a rank that are padding."""
        whole = local_runs(self.layout, rank, self.world_size, self.q_length)
        ends = [
            (run.start + run.length, padded.start + padded.length)
            for run, padded in zip(self.query_runs(rank), whole, strict=True)
        ]
        return [(start, stop) for start, stop in ends if start < stop]

    def visible_pairs(self) -> int:
        """(query, key) pairs that see each other, by counting rows: independent of any plan."""
        left, right = self.bounds
        position = np.arange(self.q_total, dtype=np.int64) + self.offset
        first, last = np.maximum(position - left, 0), np.minimum(position + right, self.k_total - 1)
        return int(np.maximum(last - first + 1, 0).sum())
