"""How a packed stream is dealt out: contiguous, zigzag, or balanced by work. Token counts differ by at most one.

`balanced` splits a necklace with two kinds of beads, tokens and work (Goldberg & West, "Bisection of circle colorings",
1985; Alon, "Splitting necklaces", 1987): bend the stream into a circle, and as an arc of 1/n of its tokens moves round
it, its work is 1/n of the whole on average, so somewhere it is just that. Cut that arc out for one rank, close the gap,
go on with n - 1. Two cuts a rank make fewer than 2W runs in all, so kernels see long ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from ring_core.plan.documents import Documents
from ring_core.segment import Array

PackedLayoutName = Literal["contiguous", "zigzag", "balanced"]
PACKED_LAYOUTS: tuple[str, ...] = get_args(PackedLayoutName)

TOLERANCE = 0.0025
"""An arc may miss its share of the work by this much if it cuts documents at better places."""
SAMPLES = 256
"""Places at which an arc's work is looked at, beside the ends of documents, before the search is narrowed."""
HOLES = 3
"""More gaps than this are not left behind: the last ranks get what lies between them."""


@dataclass(frozen=True, eq=False)
class Cells:
    """A stream cut into runs, in stream order; a rank's tokens are its runs one after the other, by `local`."""

    start: Array
    stop: Array
    owner: Array
    local: Array
    """Where each run begins in its owner's tensor."""
    lengths: Array  # (W,)
    """Tokens of each rank."""

    @staticmethod
    def of(lengths: Array, owner: Array, world_size: int) -> Cells:
        """Runs of those lengths in stream order: empty ones are dropped, neighbours of one owner joined."""
        stop = np.cumsum(lengths)
        kept = lengths > 0
        start, stop, owner = (stop - lengths)[kept], stop[kept], owner[kept]
        begins = np.ones(len(owner), bool)
        begins[1:] = owner[1:] != owner[:-1]
        ends = np.ones(len(owner), bool)
        ends[:-1] = begins[1:]
        start, stop, owner = start[begins], stop[ends], owner[begins]
        by_owner = np.argsort(owner, kind="stable")
        before = np.cumsum((stop - start)[by_owner]) - (stop - start)[by_owner]
        totals = np.bincount(owner, stop - start, minlength=world_size).astype(np.int64)
        local = np.empty_like(start)
        local[by_owner] = before - (np.cumsum(totals) - totals)[owner[by_owner]]
        return Cells(start, stop, owner, local, totals)

    def of_token(self, index: Array) -> Array:
        """The run in which each token lies."""
        found: Array = np.searchsorted(self.start, index, side="right") - 1
        return found

    def runs(self, rank: int) -> list[tuple[int, int]]:
        """A rank's (start, stop) in the stream, as they lie one after the other in its tensor."""
        mine = np.flatnonzero(self.owner == rank)
        mine = mine[np.argsort(self.local[mine], kind="stable")]
        return list(zip(self.start[mine].tolist(), self.stop[mine].tolist(), strict=True))


def deal(documents: Documents, layout: str, world_size: int) -> tuple[Cells, Cells]:
    """The runs of queries and of keys. Where the streams differ, keys follow the same pattern in their own length."""
    if layout == "contiguous":
        owner = np.arange(world_size)
        shares = np.ones(world_size, np.int64)
    elif layout == "zigzag":
        owner = np.concatenate([np.arange(world_size), np.arange(world_size)[::-1]])
        shares = np.ones(2 * world_size, np.int64)
    else:
        cells = _balanced(documents, world_size)
        if np.array_equal(documents.cu_q, documents.cu_k):
            cells = _waiting_first(documents, cells)
            return cells, cells
        return cells, _spread(cells.stop - cells.start, cells.owner, documents.k_length, world_size)
    queries = _spread(shares, owner, documents.q_length, world_size)
    if documents.k_length == documents.q_length:
        return queries, queries
    return queries, _spread(shares, owner, documents.k_length, world_size)


def waits(documents: Documents, keys: Cells, start: Array, stop: Array, owner: Array) -> Array:
    """bool: whether queries [start, stop) of one document, on a rank, see keys of another rank."""
    low, high = documents.seen(start, stop, documents.of_query(start))
    seen = high > low
    if not len(keys.start):
        return seen
    first = keys.of_token(np.where(seen, low, 0))
    last = keys.of_token(np.where(seen, high - 1, 0))
    changes = np.cumsum(np.append(0, keys.owner[1:] != keys.owner[:-1]))
    found: Array = seen & ((changes[first] != changes[last]) | (keys.owner[first] != owner))
    return found


def _waiting_first(documents: Documents, cells: Cells) -> Cells:
    """The same owners; a rank's queries that wait for keys of others come first in its tensor, those that see only keys
    of its own after them, so that each are one call of a kernel."""
    edges = np.unique(np.concatenate([documents.cu_q, cells.start]))
    start, stop = edges[:-1], edges[1:]
    cell = cells.of_token(start)
    owner = cells.owner[cell]
    waiting = waits(documents, cells, start, stop, owner)
    begins = np.ones(len(start), bool)
    begins[1:] = (cell[1:] != cell[:-1]) | (waiting[1:] != waiting[:-1])
    ends = np.append(begins[1:], True) if len(begins) else begins
    start, stop, owner, waiting = start[begins], stop[ends], owner[begins], waiting[begins]
    order = np.lexsort([start, ~waiting, owner])
    length = (stop - start)[order]
    local = np.empty_like(start)
    local[order] = np.cumsum(length) - length - (np.cumsum(cells.lengths) - cells.lengths)[owner[order]]
    return Cells(start, stop, owner, local, cells.lengths)


def quotas(length: int, world_size: int) -> Array:
    """Tokens of each rank: boundary r at r * length // world_size."""
    return np.diff(np.arange(world_size + 1) * length // world_size)


def _spread(shares: Array, owner: Array, length: int, world_size: int) -> Cells:
    """Runs in proportion to `shares`, each rank's together its quota."""
    quota = quotas(length, world_size)
    lengths = np.zeros(len(owner), np.int64)
    for rank in range(world_size):
        mine = np.flatnonzero(owner == rank)
        if not len(mine):  # more ranks than tokens on the other side: its share is one run at the end
            owner, lengths = np.append(owner, rank), np.append(lengths, quota[rank])
            continue
        reached = np.cumsum(shares[mine]) * quota[rank] // max(1, shares[mine].sum())
        reached[-1] = quota[rank]
        lengths[mine] = np.diff(reached, prepend=0)
    return Cells.of(lengths, owner, world_size)


class _Circle:
    """What is left of the stream, bent into a circle: runs [start, stop) in stream order, the last one followed by the
    first."""

    def __init__(self, documents: Documents, start: Array, stop: Array) -> None:
        self.documents = documents
        self.start, self.stop = start, stop
        self.ends = np.cumsum(stop - start)
        self.begins = self.ends - (stop - start)
        self.length = int(self.ends[-1])
        first, last = documents.pairs_before(np.stack([start, stop]))
        self.work = int((last - first).sum())
        self._gap = np.cumsum(last - first) - last  # pairs_before on the circle is that on the stream plus this

    def at(self, place: Array) -> Array:
        """The token at each place of the circle."""
        place = place % self.length
        run = np.searchsorted(self.ends, place, side="right")
        token: Array = self.start[run] + place - self.begins[run]
        return token

    def work_before(self, place: Array) -> Array:
        """Pairs of all tokens from place 0, any number of times round."""
        rounds, place = place // self.length, place % self.length
        run = np.searchsorted(self.ends, place, side="right")
        inside = self.documents.pairs_before(self.start[run] + place - self.begins[run])
        total: Array = rounds * self.work + self._gap[run] + inside
        return total

    def arc(self, place: Array, tokens: int) -> Array:
        """Pairs of the tokens of an arc that begins there."""
        before, after = self.work_before(np.stack([place, place + tokens]))
        pairs: Array = after - before
        return pairs

    def without(self, place: int, tokens: int) -> tuple[list[tuple[int, int]], Array, Array]:
        """(the arc's runs, starts and stops of what is left)."""
        parts = [(place, min(place + tokens, self.length)), (0, place + tokens - self.length)]
        taken: list[tuple[int, int]] = []
        left: list[tuple[int, int]] = []
        for start, begin, end in zip(*(x.tolist() for x in (self.start, self.begins, self.ends)), strict=True):
            cuts = sorted({begin, end, *(cut for part in parts for cut in part if begin < cut < end)})
            for a, b in pairwise(cuts):
                inside = any(low <= a and b <= high for low, high in parts)
                (taken if inside else left).append((start + a - begin, start + b - begin))
        starts, stops = np.array(left, np.int64).reshape(-1, 2).T
        return taken, starts, stops


def _balanced(documents: Documents, world_size: int) -> Cells:
    length = documents.q_length
    circle = _Circle(documents, np.zeros(1, np.int64), np.array([length])) if length else None
    arcs: list[list[tuple[int, int]]] = []
    for number, tokens in enumerate(sorted(quotas(length, world_size).tolist(), reverse=True)):
        if circle is None or not tokens:
            arcs.append([])
        elif number == world_size - 1 or tokens == circle.length:
            arcs.append(list(zip(circle.start.tolist(), circle.stop.tolist(), strict=True)))
            circle = None
        else:
            taken, start, stop = circle.without(_place(circle, tokens), tokens)
            arcs.append(taken)
            circle = _Circle(documents, start, stop)
    # In stream order, as the ring goes: what a rank needs is held by those just before it.
    arcs.sort(key=lambda runs: runs[0][0] if runs else length)
    runs = sorted((start, stop, rank) for rank, arc in enumerate(arcs) for start, stop in arc)
    start, stop, owner = np.array(runs, np.int64).reshape(-1, 3).T
    return Cells.of(stop - start, owner, world_size)


def _place(circle: _Circle, tokens: int) -> int:
    """Where to cut out an arc of so many tokens with its share of the work: of all such places the one that makes few
    runs and sends few keys."""
    documents, length = circle.documents, circle.length
    share = circle.work * tokens / length
    edges = documents.cu_q[:: max(1, len(documents.cu_q) // SAMPLES)]
    run = np.clip(np.searchsorted(circle.start, edges, side="right") - 1, 0, None)
    edges, run = (x[(circle.start[run] <= edges) & (edges <= circle.stop[run])] for x in (edges, run))
    good = np.concatenate([circle.begins, edges - circle.start[run] + circle.begins[run]])
    even = np.arange(SAMPLES) * length // SAMPLES
    place = np.unique(np.concatenate([good, good - tokens, even, even - tokens]) % length)
    miss = circle.arc(place, tokens) - share
    allowed = TOLERANCE * share
    more, missed = _crossings(circle, tokens, share, place, miss)
    place, miss = np.concatenate([place, more]), np.concatenate([miss, missed])
    close = np.abs(miss) <= max(allowed, np.abs(miss).min())
    place, miss = place[close], miss[close]
    return int(place[np.lexsort([np.abs(miss), _cost(circle, place, tokens)])[0]])


def _crossings(circle: _Circle, tokens: int, share: float, place: Array, miss: Array) -> tuple[Array, Array]:
    """(places, misses) between those given: between two on both sides of the share there is one that has it, up to one
    token. Fewer than SAMPLES of them."""
    above = miss > 0
    crossing = np.flatnonzero(above != np.roll(above, -1))
    crossing = crossing[:: len(crossing) // SAMPLES + 1]
    low, high = place[crossing], np.append(place[1:], place[0] + circle.length)[crossing]
    rising = ~above[crossing]
    found, missed = low, miss[crossing]
    while ((high - low > 1) & (np.abs(missed) > TOLERANCE * share)).any():
        found = (low + high) // 2
        missed = circle.arc(found, tokens) - share
        before = (missed <= 0) == rising
        low, high = np.where(before, found, low), np.where(before, high, found)
    return found % circle.length, missed


def _cost(circle: _Circle, place: Array, tokens: int) -> Array:
    """Of an arc: its runs, gaps left behind, and keys that travel because of its two cuts, in arcs."""
    gaps = circle.begins  # places where the stream is cut already
    inside = ((gaps - place[:, None] - 1) % circle.length < tokens - 1).sum(axis=1)
    cost = 0.25 * inside + np.maximum(0, inside - HOLES)
    for end in (place, place + tokens):
        old = np.isin(end % circle.length, gaps)
        inside = inside + old
        cost = cost + np.where(old, 0, circle.documents.cut_cost(circle.at(end)) / tokens)
    result: Array = cost + np.maximum(0, len(gaps) - inside + 1 - HOLES)
    return result
