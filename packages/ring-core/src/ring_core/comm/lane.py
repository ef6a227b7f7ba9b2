"""Where communication runs beside computation: a stream of its own on CUDA, nothing elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
