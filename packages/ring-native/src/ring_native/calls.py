"""A table as calls of a kernel: which rows and keys each gets, under which mask, and what becomes of its result.

Made once per table, on the host, and kept with it: every layer of a model walks the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ring_core.backend import UnsupportedError
from ring_core.segment import FIRST, LAST, Segment, Table
from ring_native.blocks import Block, coalesced
from ring_native.masks import Choice, Mask, Style, in_place, split
from ring_native.spans import UNTOUCHED, Spans

EVERY = -1
"""Batch: every entry."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the sequences of one call begin, as kernels for sequences of unequal lengths want it."""

    q_edges: tuple[int, ...]  # 0, then where each ends
    k_edges: tuple[int, ...]
    _tensors: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def max_q(self) -> int:
        return max(np.diff(self.q_edges).tolist())

    @cached_property
    def max_k(self) -> int:
        return max(np.diff(self.k_edges).tolist())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cu_seqlens of queries and keys: int32 (n + 1,) each."""
        if device not in self._tensors:
            # Tensors of their own, aligned, by copies that wait: another stream may be the next to read them.
            on_host = [torch.tensor(x, dtype=torch.int32, device="cpu") for x in (self.q_edges, self.k_edges)]
            cu_q, cu_k = (edges.to(device) for edges in on_host)
            self._tensors[device] = cu_q, cu_k
        return self._tensors[device]


@dataclass(frozen=True, eq=False)
class Call:
    """One call: rows [q_start, q_stop) and keys [k_start, k_stop), counted through all pieces, of a batch entry or of
    EVERY.

    sequences: None for one block under the mask; else the rows and keys fall into that many, each under it.
    """

    batch: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    mask: Mask
    sequences: Sequences | None = None

    @property
    def rows(self) -> slice:
        return slice(self.q_start, self.q_stop)

    @property
    def keys(self) -> slice:
        return slice(self.k_start, self.k_stop)

    @property
    def entries(self) -> slice:
        return slice(None) if self.batch == EVERY else slice(self.batch, self.batch + 1)

    def of_rows(self, *some: Tensor, dim: int = 1) -> list[Tensor]:
        """Its batch entries and rows of tensors (B, Sq, …), which lie along `dim`; without B for sequences, as kernels
        want those."""
        return self._parts(some, dim, self.q_start, self.q_stop)

    def of_keys(self, *some: Tensor, dim: int = 1) -> list[Tensor]:
        """Its batch entries and keys of tensors (B, C * S, …), or where dim is 2 of single pieces (1, B, S, …); without
        B for sequences."""
        return self._parts(some, dim, self.k_start, self.k_stop, dim - 1)

    def with_entry(self, x: Tensor) -> Tensor:
        """What `of_rows` or `of_keys` gave, with B."""
        return x if self.sequences is None else x.unsqueeze(0)

    def _parts(self, some: tuple[Tensor, ...], dim: int, start: int, stop: int, entry: int = 0) -> list[Tensor]:
        """By one operation each: indexing by an entry and by a slice would be two, and take the host twice as long.
        entry: the dimension of batch entries, without those before."""
        found, begin = [], entry if self.sequences is None else entry + 1  # sequences are of one entry
        for x in some:
            size, stride = list(x.shape), x.stride()
            first = x.storage_offset() + start * stride[dim]
            size[dim] = stop - start
            if self.batch != EVERY:
                first += self.batch * stride[entry]
                size[entry] = 1
            found.append(x.as_strided(size[begin:], stride[begin:], first))
        return found


class Landing(NamedTuple):
    """What becomes of a call's result for some of its rows.

    fresh: nothing came before; else it is merged. last: the rows are finished, over the whole ring. between: the rows
    are between the two calls that make them up, and wait in `out`: what a kernel rounded to its dtype needs no state.
    """

    rows: slice
    fresh: bool
    last: bool
    between: bool = False

    @property
    def in_out(self) -> bool:
        """Whether the result goes to `out` as it is."""
        return self.fresh and (self.last or self.between)


class Idle(NamedTuple):
    """Rows in segments of the table in which they see nothing."""

    entries: slice
    rows: slice
    begins: bool
    ends: bool


@dataclass(frozen=True)
class Forward:
    """A query-major table as calls."""

    calls: tuple[tuple[Call, tuple[Landing, ...]], ...]
    idle: tuple[Idle, ...]

    @cached_property
    def keeps_state(self) -> bool:
        """Whether some result cannot go straight to `out`."""
        return any(not (landing.in_out or landing.between) for _, landings in self.calls for landing in landings)


def forward_calls(
    table: Table, piece_length: int, batch: int, style: Style, varlen: bool, distances: bool = False
) -> Forward:
    """The calls of a query-major table for inputs with so many batch entries; varlen: the kernel takes sequences of
    unequal lengths in one call; distances: what it counts as the distance of a query and a key must be theirs.

    Raises:
        UnsupportedError: the table cannot be made of what the kernel has.
    """
    key = ("ring_native.forward", piece_length, batch, style, varlen, distances)
    if key not in table.cache:
        table.cache[key] = _forward(table, piece_length, batch, style, varlen, distances)
    made: Forward = table.cache[key]
    return made


def backward_calls(
    table: Table, piece_length: int, batch: int, style: Style, varlen: bool, distances: bool = False
) -> tuple[Call, ...]:
    """The calls of a key-major table; in none of them does a key appear twice, as kernels write dk and dv."""
    key = ("ring_native.backward", piece_length, batch, style, varlen, distances)
    if key not in table.cache:
        segments = _per_entry(table.segments, batch)
        table.cache[key] = tuple(_calls(segments, piece_length, batch, style, varlen, distances))
    made: tuple[Call, ...] = table.cache[key]
    return made


@dataclass(frozen=True)
class KeyLandings:
    """What becomes of the dk and dv of calls: for each call which stretches of keys it is the first to write, and which
    it adds to; and keys that no call writes."""

    by_call: tuple[tuple[tuple[slice, bool], ...], ...]
    idle: tuple[tuple[slice, slice], ...]  # batch entries, keys

    @cached_property
    def once(self) -> bool:
        """Whether no key has a second call."""
        return all(fresh for landed in self.by_call for _, fresh in landed)


def key_landings(table: Table, calls: tuple[Call, ...], tokens: int, batch: int) -> KeyLandings:
    """For the calls that `backward_calls` made of a table, of pieces of so many tokens together."""
    key = ("ring_native.key_landings", tokens, batch, calls)
    if key not in table.cache:
        entries = [EVERY] if all(call.batch == EVERY for call in calls) else range(batch)
        spans = {entry: Spans(tokens) for entry in entries}
        landed = tuple(
            tuple((keys, status == UNTOUCHED) for keys, status in spans[call.batch].touch(call.k_start, call.k_stop))
            for call in calls
        )
        idle = tuple(
            (slice(None) if entry == EVERY else slice(entry, entry + 1), keys)
            for entry, some in spans.items()
            for keys, status in some.all()
            if status == UNTOUCHED and keys.start < keys.stop
        )
        table.cache[key] = KeyLandings(landed, idle)
    made: KeyLandings = table.cache[key]
    return made


def _forward(table: Table, piece_length: int, batch: int, style: Style, varlen: bool, distances: bool) -> Forward:
    segments = _per_entry(table.segments, batch)
    calls = _calls(segments, piece_length, batch, style, varlen, distances)
    entries = sorted({segment.batch for segment in segments})
    place = {entry: number for number, entry in enumerate(entries)}
    shape = len(entries), max((segment.q_start + segment.q_len for segment in segments), default=0)
    covered, begins, ends = (np.zeros(shape, bool) for _ in range(3))
    for segment in segments:
        rows = place[segment.batch], slice(segment.q_start, segment.q_start + segment.q_len)
        covered[rows] = True
        begins[rows] |= bool(segment.flags & FIRST)
        ends[rows] |= bool(segment.flags & LAST)
    visits, done = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for call in calls:
        visits[place[call.batch], call.rows] += 1
    landed = []
    for call in calls:
        rows = place[call.batch], call.rows
        fresh = begins[rows] & (done[rows] == 0)
        done[rows] += 1
        last = ends[rows] & (done[rows] == visits[rows])
        between = begins[rows] & ends[rows] & (visits[rows] == 2)
        landings = tuple(
            Landing(slice(call.q_start + a, call.q_start + b), bool(kind & 1), bool(kind & 2), bool(kind & 4))
            for a, b, kind in _runs(fresh + 2 * last + 4 * between)
        )
        landed.append((call, landings))
    idle = tuple(
        Idle(slice(None) if entry == EVERY else slice(entry, entry + 1), slice(a, b), bool(kind & 2), bool(kind & 4))
        for entry in entries
        for a, b, kind in _runs(((covered & (visits == 0)) * (1 + 2 * begins + 4 * ends))[place[entry]])
        if kind > 1
    )
    return Forward(tuple(landed), idle)


def _runs(values: NDArray[Any]) -> Iterable[tuple[int, int, int]]:
    """(start, stop, value) of stretches of equal values."""
    if not len(values):
        return []
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(a, b, int(values[a])) for a, b in pairwise(edges)]


def _per_entry(segments: tuple[Segment, ...], batch: int) -> list[Segment]:
    """All for every entry, or each for one; a table that mixes both (none does) gets the latter."""
    named = [segment.batch >= 0 for segment in segments]
    if not any(named) or all(named):
        return list(segments)
    return [
        segment._replace(batch=entry)
        for segment in segments
        for entry in (range(batch) if segment.batch < 0 else (segment.batch,))
    ]


def _calls(
    segments: list[Segment], piece_length: int, batch: int, style: Style, varlen: bool, distances: bool
) -> list[Call]:
    blocks = coalesced(segments, piece_length, distances)
    if distances:
        assert style is Style.BOTTOM_RIGHT, "kernels of other styles have no ALiBi"
        blocks = [in_place(block) for block in blocks]
    else:
        blocks = sorted(part for block in blocks for part in split(block, style))
    if not varlen:
        assert not distances
        return sorted((_call([block], Choice.of(block)) for block in blocks), key=_largest_first)
    chains: dict[tuple[int, int, int], _Chain] = {}  # by where they end
    closed: list[Call] = []
    for block in blocks:
        choice = Choice.of(block)
        chain = chains.pop((block.batch, block.q_start, block.k_start), None)
        joined = None if chain is None or (block.batch == EVERY and batch > 1) else chain.choice.both(choice)
        if chain is not None and joined is not None:
            chain.blocks.append(block)
            chain.choice = joined
        else:
            if chain is not None:
                closed.append(_call(chain.blocks, chain.choice))
            chain = _Chain([block], choice)
        end = block.batch, block.q_stop, block.k_stop
        if end in chains:
            other = chains.pop(end)
            closed.append(_call(other.blocks, other.choice))
        chains[end] = chain
    closed += [_call(chain.blocks, chain.choice) for chain in chains.values()]
    if distances:
        for call in closed:
            _check_reach(call)
    return sorted(closed, key=_largest_first)


def _check_reach(call: Call) -> None:
    """flash-attn reads a window without a bound on the right, but with one on the left, as reaching as far to the right
    as there are keys; where distances do not count, `split` leaves no such call."""
    longest = call.k_stop - call.k_start if call.sequences is None else call.sequences.max_k
    queries = call.q_stop - call.q_start if call.sequences is None else call.sequences.max_q
    if call.mask.left >= 0 and call.mask.right < 0 and queries > longest + 1:
        raise UnsupportedError(
            f"ALiBi: this kernel ends window_size=({call.mask.left}, -1) {longest} keys to the right of each query's "
            f"position, and some of {queries} queries see beyond"
        )


def _largest_first(call: Call) -> tuple[int, ...]:
    """Head groups run side by side: while one ends with small calls, the next begins with a large one."""
    area = (call.q_stop - call.q_start) * (call.k_stop - call.k_start)
    return -area, call.batch, call.q_start, call.k_start


@dataclass
class _Chain:
    """Blocks each of which begins, in queries and in keys, where the last ended."""

    blocks: list[Block]
    choice: Choice


def _call(blocks: list[Block], choice: Choice) -> Call:
    first, last = blocks[0], blocks[-1]
    sequences = None
    if len(blocks) > 1:
        sequences = Sequences(
            tuple(accumulate((block.q_len for block in blocks), initial=0)),
            tuple(accumulate((block.k_len for block in blocks), initial=0)),
        )
    return Call(first.batch, first.q_start, last.q_stop, first.k_start, last.k_stop, choice.mask, sequences)
