"""What runs beside what: communication beside computation, and computations that do not wait for each other. Streams on
CUDA, nothing elsewhere.

A pass records and awaits some fifteen marks, and on small problems the host decides how fast it is. So streams are made
to by `torch.Stream`, whose methods are C: those of `torch.cuda.Stream` do the same in Python, for three times the time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from ring_core._torch import OnStream, current_stream


class Lane:
    """Work enqueued inside `on()` runs on the lane's stream; without one (CPU) it is done at once, by the host."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    def on(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else OnStream(self.stream)

    def after_compute(self) -> None:
        """What comes next on the lane comes after everything the current stream holds now."""
        if self.stream is not None:
            torch.Stream.wait_stream(self.stream, current_stream(self.stream.device_index))

    def now(self) -> torch.Event | None:
        """A mark behind everything the lane holds now."""
        return None if self.stream is None else torch.Stream.record_event(self.stream)

    def after(self, mark: torch.Event | None) -> None:
        """What comes next on the lane comes after a mark on another stream."""
        if self.stream is not None and mark is not None:
            torch.Stream.wait_event(self.stream, mark)


def compute_now(lane: Lane) -> torch.Event | None:
    """A mark behind everything the current stream holds now, where the lane is a stream of its own."""
    return None if lane.stream is None else mark_on(lane.stream.device_index)


def compute_after(mark: torch.Event | None) -> None:
    """What comes next on the current stream comes after a mark on another."""
    if mark is not None:
        torch.Stream.wait_event(current_stream(mark.device.index), mark)


def mark_on(device_index: int) -> torch.Event:
    """A mark behind everything a GPU's current stream holds now."""
    return torch.Stream.record_event(current_stream(device_index))


URGENT = 2
"""The turn whose tiles go first, whenever they can: what others wait for."""


class Turns:
    """Computations that do not depend on each other, on several streams: two equal ones (0 and 1), so that the last
    tiles of one and the first of the next share the GPU, which a kernel boundary on one stream would leave half empty;
    and an URGENT one, beside which the others fill what it leaves."""

    def __init__(self, device: torch.device, *, several: bool) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        self._used: set[int] = set()
        self._begin: torch.Event | None = None
        if several and device.type == "cuda":
            self._streams = _streams(device)
            self._begin = mark_on(device.index)

    def turn(self, number: int) -> AbstractContextManager[object]:
        """Where a computation of that turn is enqueued."""
        if self._begin is None:
            return nullcontext()
        if number not in self._used:
            self._used.add(number)
            torch.Stream.wait_event(self._streams[number], self._begin)
        return OnStream(self._streams[number])

    def now(self) -> torch.Event | None:
        """A mark behind everything the current turn holds now."""
        return None if self._begin is None else mark_on(self._streams[0].device_index)

    def join(self) -> None:
        """The current stream goes on when all are done."""
        for number in self._used:
            stream = self._streams[number]
            torch.Stream.wait_stream(current_stream(stream.device_index), stream)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return *(torch.cuda.Stream(device) for _ in range(2)), torch.cuda.Stream(device, priority=-1)
