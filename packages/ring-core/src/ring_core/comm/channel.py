"""Messages between the ranks of a group over torch.distributed: NCCL or gloo, any number of hosts.

A channel is a queue of its own: on NCCL a communicator and a stream, on gloo a tag. Keys travel on one and gradients on
another, so that a gradient waiting to be summed never holds up the next keys.

    compute stream   ─ step s ────────────► step s+1 ──────────► …
                          ▲ landed(s)  │ done(s)  ▲ landed(s+1)
    channel stream   hop s ┘── hop s+1 ─┼─────────┘── hop s+2 (writes what step s has read: waits for done(s)) …
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ring_core._torch import lasting
from ring_core.comm.traffic import count_sent

KINDS = ("keys", "gradients")
Messages = Sequence[tuple[int, Tensor]]
"""(rank in the group, contiguous tensor)"""


class RingCommError(RuntimeError):
    """A neighbour did not answer; the message names its rank."""


def timeout() -> timedelta | None:
    """How long to wait for a neighbour: RING_TIMEOUT seconds, by default what the process group was given."""
    seconds = os.environ.get("RING_TIMEOUT")
    return timedelta(seconds=float(seconds)) if seconds else None


class Pending:
    """A posted exchange."""

    def __init__(self, channel: Channel, works: list[tuple[str, int, Work]], messages: Messages) -> None:
        self._channel = channel
        self._messages: Messages | None = messages  # alive until they have been sent
        self._works = works
        self._landed: torch.cuda.Event | None = None
        if channel.stream is not None:
            with channel.on_stream():
                for _, _, work in works:
                    work.wait()  # on NCCL: this stream waits, the host does not
            self._landed = torch.cuda.Event()
            self._landed.record(channel.stream)

    def wait(self) -> None:
        """Until all has been received and may be read, and all that was sent may be overwritten.

        On CUDA the current stream waits, elsewhere the host.

        Raises:
            RingCommError: naming the rank that failed or did not answer in time.
        """
        if self._landed is not None:
            torch.cuda.current_stream().wait_event(self._landed)
            self._messages = None
            return
        limit = timeout()
        while self._works:
            action, peer, work = self._works.pop(0)
            try:
                work.wait(limit) if limit else work.wait()
            except RuntimeError as error:
                raise RingCommError(
                    f"rank {self._channel.rank} of {self._channel.world_size}: {action} rank {peer} failed ({error}). "
                    f"Is that process alive? RING_TIMEOUT sets how many seconds to wait for it."
                ) from error
        self._messages = None


class Channel:
    """One of a group's queues of messages on one device."""

    def __init__(self, group: ProcessGroup, device: torch.device, kind: str) -> None:
        self._group = weakref.ref(group)  # whose end is this channel's
        self.device = device
        self.kind = kind
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.stream: torch.cuda.Stream | None = None
        self._ranks = dist.get_process_group_ranks(group)
        self._own: ProcessGroup | None = None
        self._slots: dict[str, Tensor] = {}
        self._captured = False
        self._retired: list[Tensor] = []
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            if kind != KINDS[0]:  # NCCL runs one group's messages in one queue, whatever their tag
                self._own = dist.new_group(self._ranks, use_local_synchronization=True)
            # NCCL wants all ranks in a communicator's first call; an exchange may concern only some of them.
            dist.all_reduce(torch.zeros(1, device=device), group=self._members)

    @property
    def _members(self) -> ProcessGroup:
        """The group that messages go through."""
        found = self._own or self._group()
        assert found is not None, "whoever posts holds the group"
        return found

    def on_stream(self) -> AbstractContextManager[object]:
        """Work enqueued inside runs on the channel's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def after_compute(self) -> None:
        """What is posted next comes after everything the current stream holds now."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def slot(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A buffer that stays from call to call, grown when it is too small. Contents: whatever was there."""
        wanted = torch.Size(shape).numel() * dtype.itemsize
        kept = self._slots.get(name)
        if self.stream is not None:
            self._captured |= torch.cuda.is_current_stream_capturing()
        if kept is None or kept.numel() < wanted:
            if kept is not None and self.stream is not None:
                self._retire(kept, self.stream)
            with lasting():
                kept = self._slots[name] = torch.empty(wanted, dtype=torch.uint8, device=self.device)
        return kept[:wanted].view(dtype).view(*shape)

    def _retire(self, kept: Tensor, channel_stream: torch.cuda.Stream) -> None:
        """A buffer that is too small: its memory is free for others once what uses it now is done, but never where a
        CUDA graph may use it again."""
        if self._captured:
            self._retired.append(kept)
        for stream in (torch.cuda.current_stream(self.device), channel_stream):
            kept.record_stream(stream)

    def post(self, sends: Messages, receives: Messages) -> Pending:
        """Starts sending and receiving; tensors must live, unchanged and unread, until `Pending.wait`."""
        operations = []
        works: list[tuple[str, int]] = []
        tag = KINDS.index(self.kind)
        for action, call, messages in (("sending to", dist.isend, sends), ("receiving from", dist.irecv, receives)):
            for peer, message in messages:
                if message.numel():
                    operations.append(dist.P2POp(call, message, self._ranks[peer], self._members, tag))
                    works.append((action, peer))
        for peer, message in sends:
            count_sent(self.kind, peer, message.nbytes)
        if not operations:
            return Pending(self, [], [])
        try:
            with self.on_stream():
                started = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            peers = ", ".join(f"{action} rank {peer}" for action, peer in works)
            raise RingCommError(f"rank {self.rank} of {self.world_size}: {peers} failed ({error})") from error
        # NCCL answers a batch with one handle, gloo with one a message.
        names = works if len(started) == len(works) else [("exchanging with", works[0][1])] * len(started)
        return Pending(self, [(*name, work) for name, work in zip(names, started, strict=True)], [*sends, *receives])


_channels: weakref.WeakKeyDictionary[ProcessGroup, dict[tuple[torch.device, str], Channel]] = (
    weakref.WeakKeyDictionary()
)


def channel(group: ProcessGroup, device: torch.device, kind: str) -> Channel:
    """The group's channel for "keys" or "gradients" on this device. Made at the first call, which all ranks must
    reach.

    Raises:
        RingCommError: it would be made while a CUDA graph is captured, when no communicator can be.
    """
    known = _channels.setdefault(group, {})
    if (device, kind) not in known:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RingCommError(
                "this group has not been called through torch.distributed yet, and while a CUDA graph is captured no "
                "communicator can be made: make a call like this one before, within "
                'ring_core.comm.gather_through("collectives") where the schedule is "gather" or "auto"'
            )
        known[device, kind] = Channel(group, device, kind)
    return known[device, kind]
