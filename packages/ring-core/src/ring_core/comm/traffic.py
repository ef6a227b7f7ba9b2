"""What really went over the wire, for tests and reports that check a plan's prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)  # two recordings are two, however equal what they saw
class Traffic:
    """Bytes sent by this rank while recording, by (kind, rank in the group): kind is "keys" or "gradients"."""

    sent: dict[tuple[str, int], int] = field(default_factory=dict)


_recording: list[Traffic] = []


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Counts the bytes that this process sends in ring attention calls."""
    traffic = Traffic()
    _recording.append(traffic)
    try:
        yield traffic
    finally:
        _recording.remove(traffic)


def count_sent(kind: str, peer: int, nbytes: int) -> None:
    """Called by every transport for every message it sends."""
    for traffic in _recording:
        traffic.sent[kind, peer] = traffic.sent.get((kind, peer), 0) + nbytes


def counting() -> bool:
    """Whether anybody records."""
    return bool(_recording)
