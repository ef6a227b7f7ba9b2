"""Mixes of document lengths for packed sequences, by name. Pure numpy; the same on every rank and in every run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

MIXES = ("realistic", "equal64")
_MEDIAN, _SIGMA, _SHORTEST = 600.0, 1.2, 16
_SEED = 2026


def document_lengths(mix: str, total: int) -> tuple[int, ...]:
    """Lengths that sum to `total`.

    "realistic": log-normal, as the lengths of web and instruction data are: median 600 tokens, mean twice that, a tail
    of documents that fill a good part of the sequence. "equal64": 64 of the same length. Raises ValueError where the
    mix is unknown or does not fill `total`.
    """
    if mix == "realistic":
        return _realistic(total)
    if mix.startswith("equal") and mix.removeprefix("equal").isdecimal():
        count = int(mix.removeprefix("equal"))
        if not count or total % count:
            raise ValueError(f"{total} tokens are not {count} documents of one length")
        return (total // count,) * count
    raise ValueError(f"unknown mix of documents {mix!r}; there are {', '.join(MIXES)} and equalN")


def _realistic(total: int) -> tuple[int, ...]:
    generator = np.random.default_rng(_SEED)
    lengths: list[int] = []
    left = total
    while left:
        drawn = max(_SHORTEST, int(generator.lognormal(np.log(_MEDIAN), _SIGMA)))
        lengths.append(min(drawn, left))  # the last document is cut, as packing does
        left -= lengths[-1]
    return tuple(lengths)


def boundaries(lengths: Sequence[int]) -> tuple[int, ...]:
    """cu_seqlens: 0 and the end of every document."""
    return (0, *(int(end) for end in np.cumsum(np.asarray(lengths, dtype=np.int64))))


def pieces(positions: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cuts local tokens at global `positions` into runs of consecutive ones inside one document.

    Returns (document start, first position, last position + 1) of each run, in local order; `ends` is cu_seqlens.
    """
    place = np.asarray(positions, dtype=np.int64)
    if not len(place):
        return []
    document = np.searchsorted(np.asarray(ends), place, side="right") - 1
    breaks = np.flatnonzero((np.diff(place) != 1) | (np.diff(document) != 0)) + 1
    found = []
    for low, high in pairwise((0, *breaks.tolist(), len(place))):
        found.append((int(ends[document[low]]), int(place[low]), int(place[high - 1]) + 1))
    return found
