"""What runs beside what: communication beside computation, and computations that do not wait for each other. Streams on
CUDA, nothing elsewhere."""

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
            self.stream.wait_stream(current_stream(self.stream.device_index))

    def now(self) -> torch.cuda.Event | None:
        """A mark behind everything the lane holds now."""
        return None if self.stream is None else self.stream.record_event()

    def after(self, mark: torch.cuda.Event | None) -> None:
        """What comes next on the lane comes after a mark on another stream."""
        if self.stream is not None and mark is not None:
            self.stream.wait_event(mark)


def compute_now(lane: Lane) -> torch.cuda.Event | None:
    """A mark behind everything the current stream holds now, where the lane is a stream of its own."""
    return None if lane.stream is None else current_stream(lane.stream.device_index).record_event()


def compute_after(mark: torch.cuda.Event | None) -> None:
    """What comes next on the current stream comes after a mark on another."""
    if mark is not None:
        mark.wait(current_stream(mark.device.index))


URGENT = 2
"""The turn whose tiles go first, whenever they can: what others wait for."""


class Turns:
    """Computations that do not depend on each other, on several streams: two equal ones (0 and 1), so that the last
    tiles of one and the first of the next share the GPU, which a kernel boundary on one stream would leave half empty;
    and an URGENT one, beside which the others fill what it leaves."""

    def __init__(self, device: torch.device, *, several: bool) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        self._used: set[int] = set()
        self._begin: torch.cuda.Event | None = None
        if several and device.type == "cuda":
            self._streams = _streams(device)
            self._begin = current_stream(device.index).record_event()

    def turn(self, number: int) -> AbstractContextManager[object]:
        """Where a computation of that turn is enqueued."""
        if self._begin is None:
            return nullcontext()
        if number not in self._used:
            self._used.add(number)
            self._streams[number].wait_event(self._begin)
        return OnStream(self._streams[number])

    def now(self) -> torch.cuda.Event | None:
        """A mark behind everything the current turn holds now."""
        return None if self._begin is None else current_stream(self._streams[0].device_index).record_event()

    def join(self) -> None:
        """The current stream goes on when all are done."""
        for number in self._used:
            stream = self._streams[number]
            current_stream(stream.device_index).wait_stream(stream)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return *(torch.cuda.Stream(device) for _ in range(2)), torch.cuda.Stream(device, priority=-1)
