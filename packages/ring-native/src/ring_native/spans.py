"""What has happened to rows or keys so far, by stretches with the same fate."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

UNTOUCHED, ONCE, SUMMED = range(3)


class Spans:
    """What has happened to rows [0, length), by stretches of rows with the same fate: a few, however many the rows."""

    def __init__(self, length: int) -> None:
        self._edges = [0, length]
        self._status = [UNTOUCHED]

    def all(self) -> Iterator[tuple[slice, int]]:
        """Every stretch and its status."""
        return ((slice(a, b), status) for (a, b), status in zip(pairwise(self._edges), self._status, strict=True))

    def touch(self, start: int, stop: int) -> list[tuple[slice, int]]:
        """The stretches in [start, stop) and their status until now; from now on they have had one call more."""
        first, last = self._cut(start), self._cut(stop)
        found = [
            (slice(self._edges[at], self._edges[at + 1]), self._status[at])
            for at in range(first, last)
            if self._edges[at] < self._edges[at + 1]
        ]
        for at in range(first, last):
            self._status[at] = ONCE if self._status[at] == UNTOUCHED else SUMMED
        return found

    def untouched(self, start: int, stop: int) -> bool:
        """Whether nothing has happened in [start, stop)."""
        for (first, last), status in zip(pairwise(self._edges), self._status, strict=True):
            if status != UNTOUCHED and max(first, start) < min(last, stop):
                return False
        return True

    def _cut(self, at: int) -> int:
        """Makes `at` an edge; which one."""
        place = bisect_left(self._edges, at)
        if self._edges[place] != at:
            self._edges.insert(place, at)
            self._status.insert(place, self._status[place - 1])
        return place
