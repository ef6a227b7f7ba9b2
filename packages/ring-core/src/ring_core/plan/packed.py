"""A packed stream on several ranks: who holds what, who needs what. The counterpart of `problem` and `needs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from ring_core.plan.dealing import PACKED_LAYOUTS, Cells, deal
from ring_core.plan.documents import Documents
from ring_core.ranges import Ranges
from ring_core.segment import Array

UNBOUNDED_CODE = -1
BRIEF = 12
"""Entries of cu_seqlens that an error message still shows."""


class Parts(NamedTuple):
    """Queries [start, stop) of the stream that lie in one run and one document, and the keys [low, high) they see."""

    start: Array
    stop: Array
    document: Array
    owner: Array
    local: Array  # where the queries begin in their owner's tensor
    low: Array
    high: Array


class Stretches(NamedTuple):
    """Keys [start, stop) of the stream that lie in one run and are needed whole or not at all by any rank."""

    start: Array
    stop: Array
    owner: Array
    local: Array


@dataclass(frozen=True, eq=False)
class PackedProblem:
    """What is attended, over all ranks: documents, mask, layout. Token counts of ranks differ by one where they must.

    Equal and hashed by its encoding, so that equal problems share their plans.
    """

    documents: Documents
    layout: str
    world_size: int

    def __post_init__(self) -> None:
        if self.layout not in PACKED_LAYOUTS:
            raise ValueError(
                f"unknown layout {self.layout!r} of packed documents; there are {', '.join(map(repr, PACKED_LAYOUTS))}"
            )
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")

    @staticmethod
    def of(
        cu_q: Sequence[int] | Array,
        cu_k: Sequence[int] | Array | None,
        left: int | None,
        right: int | None,
        layout: str,
        world_size: int,
    ) -> PackedProblem:
        queries = _checked("cu_seqlens", cu_q)
        keys = queries if cu_k is None else _checked("cu_seqlens_k", cu_k)
        if len(keys) != len(queries):
            raise ValueError(
                f"cu_seqlens and cu_seqlens_k pair documents by index and must have one length, got {len(queries)} and "
                f"{len(keys)} entries"
            )
        return PackedProblem(Documents(queries, keys, left, right), layout, world_size)

    @cached_property
    def code(self) -> bytes:
        """The whole problem as int64: layout, world size, number of entries, left, right, cu_seqlens of q and of k."""
        documents = self.documents
        sides = [UNBOUNDED_CODE if side is None else side for side in (documents.left, documents.right)]
        head = [PACKED_LAYOUTS.index(self.layout), self.world_size, len(documents.cu_q), *sides]
        return np.concatenate([head, documents.cu_q, documents.cu_k]).astype(np.int64).tobytes()

    @staticmethod
    def decode(code: bytes) -> PackedProblem:
        """The inverse of `code`."""
        layout, world_size, entries = (int(x) for x in np.frombuffer(code, np.int64, 3))
        left, right = (None if x == UNBOUNDED_CODE else int(x) for x in np.frombuffer(code, np.int64, 2, offset=24))
        ends = np.frombuffer(code, np.int64, offset=40)
        return PackedProblem.of(ends[:entries], ends[entries:], left, right, PACKED_LAYOUTS[layout], world_size)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PackedProblem) and self.code == other.code)

    def __hash__(self) -> int:
        return hash(self.code)

    @property
    def q_length(self) -> int:
        return self.documents.q_length

    @property
    def k_length(self) -> int:
        return self.documents.k_length

    @cached_property
    def _cells(self) -> tuple[Cells, Cells]:
        return deal(self.documents, self.layout, self.world_size)

    @property
    def queries(self) -> Cells:
        """Runs of the stream of queries."""
        return self._cells[0]

    @property
    def keys(self) -> Cells:
        """Runs of the stream of keys."""
        return self._cells[1]

    def key_chunk(self, rank: int) -> int:
        """Tokens of keys that a rank holds."""
        return self._key_chunks[rank]

    @cached_property
    def _key_chunks(self) -> list[int]:
        found: list[int] = self.keys.lengths.tolist()
        return found

    @property
    def longest_key_chunk(self) -> int:
        return max(self._key_chunks)

    def check_lengths(self, rank: int, world_size: int, q_length: int, k_length: int) -> None:
        """Raises ValueError, saying what would be right, unless a rank's tensors have that many tokens."""
        if world_size != self.world_size:
            raise ValueError(
                f"these packed documents were planned for {self.world_size} ranks, but the group has {world_size}: "
                f"pass the group to ring_core.plan_packed"
            )
        streams = (("q", q_length, self.queries, self.q_length), ("k", k_length, self.keys, self.k_length))
        for name, given, cells, total in streams:
            if given == cells.lengths[rank]:
                continue
            if given == total:
                raise ValueError(
                    f"cu_seqlens ends with {total}, the local length of {name}, though there are {world_size} ranks: "
                    f"here it describes the global packed stream of all ranks together (ring-flash-attn wants every "
                    f"document split over all ranks, and cu_seqlens // world_size). "
                    f"ring_core.global_cu_seqlens(cu_seqlens, {world_size}) converts it; then deal out the stream with "
                    f"plan_packed(...).shard(x), which takes documents as they are, without padding them"
                )
            raise ValueError(
                f"cu_seqlens describes {total} tokens, of which rank {rank} of {world_size} holds "
                f"{cells.lengths[rank]} in the {self.layout} layout, but its {name} has {given}: "
                f"plan_packed(...).shard(x) deals them out"
            )

    @cached_property
    def description(self) -> dict[str, object]:
        """What ranks must agree on, in a form to read."""
        documents = self.documents
        found: dict[str, object] = {"mask": (documents.left, documents.right), "layout": self.layout}
        for name, cu in (("q", documents.cu_q), ("k", documents.cu_k)):
            brief = f"{len(cu) - 1} documents, {cu[-1]} tokens, SHA-256 {sha256(cu.tobytes()).hexdigest()[:12]}"
            found[f"cu_seqlens of {name}"] = tuple(cu.tolist()) if len(cu) <= BRIEF else brief
        return found

    def padding_rows(self, rank: int) -> list[tuple[int, int]]:
        """There are none."""
        return []

    @cached_property
    def pairs(self) -> tuple[int, ...]:
        """Visible (query, key) pairs that each rank computes, by closed form: independent of any plan."""
        cells = self.queries
        first, last = self.documents.pairs_before(np.stack([cells.start, cells.stop]))
        total = np.zeros(self.world_size, np.int64)
        np.add.at(total, cells.owner, last - first)
        return tuple(total.tolist())

    def visible_pairs(self) -> int:
        """Visible (query, key) pairs of all documents."""
        return sum(self.pairs)

    @cached_property
    def parts(self) -> Parts:
        """All queries, in stream order."""
        documents, cells = self.documents, self.queries
        edges = np.unique(np.concatenate([documents.cu_q, cells.start]))
        start, stop = edges[:-1], edges[1:]
        document = documents.of_query(start)
        cell = cells.of_token(start)
        low, high = documents.seen(start, stop, document)
        return Parts(start, stop, document, cells.owner[cell], cells.local[cell] + start - cells.start[cell], low, high)

    @cached_property
    def stretches(self) -> Stretches:
        """All keys, in stream order."""
        parts, cells = self.parts, self.keys
        seen = parts.high > parts.low
        ends = np.unique(np.concatenate([parts.low[seen], parts.high[seen], cells.start, [0, self.k_length]]))
        start, stop = ends[:-1], ends[1:]
        cell = cells.of_token(start)
        return Stretches(start, stop, cells.owner[cell], cells.local[cell] + start - cells.start[cell])

    @cached_property
    def needed(self) -> Array:
        """bool (W, stretches): which rank needs which keys."""
        return self._needed_by(self.parts)

    def needed_by(self, parts: Parts, rank: int) -> Array:
        """bool (stretches): which keys some of a rank's parts need."""
        found: Array = self._needed_by(parts)[rank]
        return found

    def _needed_by(self, parts: Parts) -> Array:
        stretches = self.stretches
        seen = parts.high > parts.low
        change = np.zeros((self.world_size, len(stretches.start) + 1), np.int32)
        np.add.at(change, (parts.owner[seen], np.searchsorted(stretches.start, parts.low[seen])), 1)
        np.add.at(change, (parts.owner[seen], np.searchsorted(stretches.stop, parts.high[seen]) + 1), -1)
        found: Array = np.cumsum(change, axis=1)[:, :-1] > 0
        return found

    @cached_property
    def needed_at_distance(self) -> Array:
        """bool (W, stretches): whether the rank h after the owner needs them."""
        distance = np.arange(self.world_size)[:, None]
        found: Array = self.needed[
            (self.stretches.owner + distance) % self.world_size, np.arange(len(self.stretches.owner))
        ]
        return found

    @property
    def most_needed(self) -> int:
        """Tokens of keys that the rank that sees most of them needs, its own included."""
        return int((self.needed * (self.stretches.stop - self.stretches.start)).sum(axis=1).max(initial=0))

    def lengths_needed_by(self, parts: Parts) -> Array:
        """Tokens of keys that each rank's queries in some of the parts need."""
        found: Array = (self._needed_by(parts) * (self.stretches.stop - self.stretches.start)).sum(axis=1)
        return found

    @cached_property
    def travels(self) -> bool:
        """Whether some rank sees keys of another: not where documents end where chunks do."""
        return bool(self.needed_at_distance[1:].any())

    def by_owner(self, chosen: Array) -> list[Ranges]:
        """The chosen stretches (bool) as ranges of each owner's tokens."""
        at = np.flatnonzero(chosen)
        at = at[np.lexsort([self.stretches.local[at], self.stretches.owner[at]])]
        start, stop, owner, local = (column[at] for column in self.stretches)
        end = local + stop - start
        begins = np.ones(len(at), bool)
        begins[1:] = (owner[1:] != owner[:-1]) | (local[1:] != end[:-1])
        ends = np.ones(len(at), bool)
        ends[:-1] = begins[1:]
        pairs = list(zip(local[begins].tolist(), end[ends].tolist(), strict=True))
        stops = np.searchsorted(owner[begins], np.arange(self.world_size), side="right").tolist()
        return [tuple(pairs[first:last]) for first, last in zip([0, *stops], stops, strict=False)]

    def __repr__(self) -> str:
        documents = self.documents
        lengths = f"{self.q_length} tokens"
        if self.k_length != self.q_length:
            lengths = f"{self.q_length} queries and {self.k_length} keys"
        return (
            f"PackedProblem({len(documents.cu_q) - 1} documents, {lengths}, left={documents.left}, "
            f"right={documents.right}, {self.layout}, {self.world_size} ranks)"
        )


def _checked(name: str, cu_seqlens: Sequence[int] | Array) -> Array:
    ends = np.array(cu_seqlens, dtype=np.int64)
    if ends.ndim != 1 or not len(ends):
        raise ValueError(f"{name} must be one list [0, ..., tokens], got shape {ends.shape}")
    if ends[0] != 0 or (np.diff(ends) < 0).any():
        where = int(np.argmax(np.diff(ends, prepend=0) < 0)) if ends[0] == 0 else 0
        raise ValueError(
            f"{name} must begin with 0 and never fall, got {int(ends[where])} as entry {where} of {len(ends)}"
        )
    ends.setflags(write=False)
    return ends
