"""Which keys of which rank some queries see: what has to travel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ring_core.layout import local_runs
from ring_core.plan.problem import UNBOUNDED, Problem
from ring_core.ranges import Ranges
from ring_core.segment import Array


@dataclass(frozen=True, slots=True)
class Keys:
    """The runs of keys of several ranks, as arrays (sources, runs): local start, true length, global index; one
    stride."""

    source: Array
    start: Array
    length: Array
    index: Array
    stride: int

    @staticmethod
    def of(problem: Problem, sources: Array) -> Keys:
        # A run's index is affine in the rank: two ranks give all of them without a loop over 1,024.
        world_size = problem.world_size
        zero = local_runs(problem.layout, 0, world_size, problem.k_length)
        one = local_runs(problem.layout, 1, world_size, problem.k_length) if world_size > 1 else zero
        index = np.array([a.index for a in zero]) + sources[:, None] * np.array(
            [b.index - a.index for a, b in zip(zero, one, strict=True)]
        )
        start = np.broadcast_to(np.array([run.start for run in zero]), index.shape)
        stride = zero[0].stride
        true = -(-(problem.k_total - index) // stride)
        length = np.clip(true, 0, np.array([run.length for run in zero]))
        return Keys(sources, start, length, index, stride)


def needed(problem: Problem, keys: Keys, first: Array, last: Array) -> tuple[Array, Array]:
    """Which keys the queries of ranks first..last (inclusive; arrays over sources) see: half-open local ranges.

    Returns two arrays (sources, runs, families): a family is the k-th run of each of those ranks. Because runs of
    neighbouring ranks lie side by side, a family's queries see one unbroken stretch of any run of keys.
    """
    left, right = problem.bounds
    stride, world_size = keys.stride, problem.world_size
    zero = local_runs(problem.layout, 0, world_size, problem.q_length)
    one = local_runs(problem.layout, 1, world_size, problem.q_length) if world_size > 1 else zero
    low, high = [], []
    for a, b in zip(zero, one, strict=True):
        pace = b.index - a.index
        near, far = (first, last) if pace >= 0 else (last, first)
        begin = a.index + pace * near
        end = np.minimum(a.index + pace * far + a.stride * (a.length - 1), problem.q_total - 1)
        if a.stride > 1:  # the last true query may be another rank's: go back to the last of these ranks'
            residue = end % a.stride
            end = end - np.where(residue > far, residue - far, np.where(residue < near, residue + a.stride - far, 0))
        nobody = (end < begin) | (first > last) | (a.length == 0)
        begin, end = (begin + problem.offset)[:, None], (end + problem.offset)[:, None]
        start = np.maximum(-((left - begin + keys.index) // stride), 0)
        stop = np.minimum((end + right - keys.index) // stride + 1, keys.length)
        # Of a stripe's keys a narrow window may fall between two: seen by nobody, however long the sequence.
        near, far = (a.index + pace * rank + problem.offset for rank in (near, far))
        between = (far[:, None] + right - keys.index) // stride < -((left - near[:, None] + keys.index) // stride)
        stop = np.where(nobody[:, None] | between | (stop <= start), start, stop)
        low.append(start)
        high.append(stop)
    return np.stack(low, -1), np.stack(high, -1)


def _as_ranges(keys: Keys, parts: list[tuple[Array, Array]]) -> list[Ranges]:
    """For each source the union of what `needed` found, as ranges of the source's chunk.

    The same as `ranges.merge` on each source, but without a Python loop over every bound: this is what a plan for 1,024
    ranks costs.
    """
    shape = (len(keys.source), -1 if len(keys.source) else 0)
    low, high = (
        np.concatenate([part[side] + keys.start[:, :, None] for part in parts], axis=-1).reshape(shape)
        for side in (0, 1)
    )
    low = np.where(high > low, low, UNBOUNDED)  # empty ones sort behind all others
    sorting = np.argsort(low, axis=1)
    low, high = np.take_along_axis(low, sorting, 1), np.take_along_axis(high, sorting, 1)
    real = low < UNBOUNDED
    reach = np.maximum.accumulate(high, axis=1)
    begins = real.copy()
    begins[:, 1:] &= low[:, 1:] > reach[:, :-1]
    ends = real.copy()
    ends[:, :-1] &= begins[:, 1:] | ~real[:, 1:]
    pairs = list(zip(low[begins].tolist(), reach[ends].tolist(), strict=True))
    stops = np.cumsum(begins.sum(axis=1)).tolist()
    return [tuple(pairs[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]


def needed_by(problem: Problem, keys: Keys, first: Array, count: Array) -> list[Ranges]:
    """For each source what the `count` ranks from `first` on, round the ring, need of its chunk."""
    world_size = problem.world_size
    first = first % world_size
    last = first + count - 1
    wrapped = last >= world_size
    before = needed(problem, keys, first, np.minimum(last, world_size - 1))
    if not wrapped.any():
        return _as_ranges(keys, [before])
    after = needed(problem, keys, np.zeros_like(first), np.where(wrapped, last - world_size, -1))
    return _as_ranges(keys, [before, after])
