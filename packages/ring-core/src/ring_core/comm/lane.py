"""What runs beside what: communication beside computation, and computations that do not wait for each other. Streams on
CUDA, nothing elsewhere.

A pass records and awaits some fifteen marks, and on small problems the host decides how fast it is. So streams are made
to by `torch.Stream`, whose methods are C: those of `torch.cuda.Stream` do the same in Python, for three times the time.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch.distributed import ProcessGroup

from ring_core._torch import OnStream, current_stream

HERE = nullcontext()
"""Where one is already."""


class Lane:
    """Work enqueued inside `on()` runs on the lane's stream; without one (CPU) it is done at once, by the host."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    def on(self) -> AbstractContextManager[object]:
        return HERE if self.stream is None else OnStream(self.stream)

    def after_compute(self) -> None:
        """What comes next on the lane comes after everything the current stream holds now: that is so anyway where it
        is the lane's own."""
        if self.stream is not None:
            current = current_stream(self.stream.device_index)
            if current.stream_id != self.stream.stream_id:
                torch.Stream.wait_stream(self.stream, current)

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


_latest: weakref.WeakKeyDictionary[ProcessGroup, dict[int, torch.cuda.Stream]] = weakref.WeakKeyDictionary()
"""Of each GPU, the stream of the latest call."""


def follow_calls(group: ProcessGroup, device: torch.device) -> None:
    """Calls of a group share buffers, lanes and channels, so one after the other runs, also where a later one is made
    on another stream. In a CUDA graph what was enqueued before it cannot be waited for: its replays are then ordered by
    whoever starts them."""
    if device.type != "cuda":
        return
    here = current_stream(device.index)
    latest = _latest.setdefault(group, {})
    before = latest.get(device.index)
    if before is here or torch.cuda.is_current_stream_capturing():
        return
    if before is not None:
        torch.Stream.wait_stream(here, before)
    latest[device.index] = here


URGENT = 2
"""The turn whose tiles go first, whenever they can: what others wait for."""


class Turns:
    """Computations that do not depend on each other, on several streams: the current one (0) and one like it (1), so
    that the last tiles of one and the first of the next share the GPU, which a kernel boundary on one stream would
    leave half empty; and an URGENT one, beside which the others fill what it leaves.

    lane: is the URGENT one, of a transport whose pieces need not be waited for there, and which makes it follow what
    the current stream holds (`ring_core.comm.transport.Transport.urgent`).
    """

    def __init__(self, device: torch.device, *, several: bool, lane: Lane | None = None) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._used: set[int] = set()
        self._begin: torch.Event | None = None
        if lane is not None and lane.stream is not None:
            self._streams, self._used = {URGENT: lane.stream}, {URGENT}
        elif several and device.type == "cuda":
            self._streams = _streams(device)
            self._begin = mark_on(device.index)

    def turn(self, number: int) -> AbstractContextManager[object]:
        """Where a computation of that turn is enqueued."""
        stream = self._streams.get(number)
        if stream is None:
            return HERE
        if number not in self._used:
            self._used.add(number)
            assert self._begin is not None
            torch.Stream.wait_event(stream, self._begin)
        return OnStream(stream)

    def now(self) -> torch.Event | None:
        """A mark behind everything the current turn holds now."""
        stream = next(iter(self._streams.values()), None)
        return None if stream is None else mark_on(stream.device_index)

    def join(self) -> None:
        """The current stream goes on when all are done."""
        for number in self._used:
            stream = self._streams[number]
            torch.Stream.wait_stream(current_stream(stream.device_index), stream)


@cache
def _streams(device: torch.device) -> dict[int, torch.cuda.Stream]:
    return {1: torch.cuda.Stream(device), URGENT: torch.cuda.Stream(device, priority=-1)}
