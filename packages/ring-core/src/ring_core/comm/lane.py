"""What runs beside what: communication beside computation, and computations that do not wait for each other. Streams on
CUDA, nothing elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


class Lane:
    """Work enqueued inside `on()` runs on the lane's stream; without one (CPU) it is done at once, by the host."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    def on(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def after_compute(self) -> None:
        """What comes next on the lane comes after everything the current stream holds now."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def now(self) -> torch.cuda.Event | None:
        """A mark behind everything the lane holds now."""
        return None if self.stream is None else self.stream.record_event()

    def after(self, mark: torch.cuda.Event | None) -> None:
        """What comes next on the lane comes after a mark on another stream."""
        if self.stream is not None and mark is not None:
            self.stream.wait_event(mark)


def compute_now(lane: Lane) -> torch.cuda.Event | None:
    """A mark behind everything the current stream holds now, where the lane is a stream of its own."""
    return None if lane.stream is None else torch.cuda.current_stream().record_event()


def compute_after(mark: torch.cuda.Event | None) -> None:
    """What comes next on the current stream comes after a mark on another."""
    if mark is not None:
        torch.cuda.current_stream().wait_event(mark)


class Turns:
    """Computations that do not depend on each other, on two streams in turn: the last tiles of one and the first of the
    next share the GPU, which a kernel boundary on one stream would leave half empty."""

    def __init__(self, device: torch.device, *, several: bool) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        if several and device.type == "cuda":
            self._streams = _pair(device)
            for stream in self._streams:
                stream.wait_stream(torch.cuda.current_stream(device))

    def turn(self, number: int) -> AbstractContextManager[object]:
        """Where the number-th computation is enqueued."""
        return torch.cuda.stream(self._streams[number % 2]) if self._streams else nullcontext()

    def join(self) -> None:
        """The current stream goes on when all are done."""
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


@cache
def _pair(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
