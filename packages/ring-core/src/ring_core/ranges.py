"""Sorted, disjoint ranges of local token indices, and how the same tokens lie in two packed buffers.

What travels between ranks is seldom a whole chunk (windows need its edges, zigzag its first half), so a message is
described by the ranges of the owner's chunk it holds, packed one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Ranges = tuple[tuple[int, int], ...]
"""Half-open (start, stop) pairs: sorted, disjoint, none empty, none touching."""


def merge(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The union of half-open ranges in any order; empty ones count for nothing."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(pairs):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def count(ranges: Ranges) -> int:
    """Number of tokens."""
    return sum(stop - start for start, stop in ranges)


def overlaps(source: Ranges, target: Ranges) -> Iterator[tuple[int, int, int]]:
    """(offset in packed source, offset in packed target, length) for every stretch of tokens that both hold."""
    source_offset = 0
    for source_start, source_stop in source:
        target_offset = 0
        for target_start, target_stop in target:
            start, stop = max(source_start, target_start), min(source_stop, target_stop)
            if start < stop:
                yield source_offset + start - source_start, target_offset + start - target_start, stop - start
            target_offset += target_stop - target_start
        source_offset += source_stop - source_start
