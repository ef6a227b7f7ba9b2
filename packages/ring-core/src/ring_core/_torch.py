"""Every private name of torch that ring-core uses, in one place."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed._symmetric_memory as _symmetric_memory
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does, which imports the compiler to do it: that takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transforms_active() -> bool:
    """Whether something looks at what is done to inputs though none of them asks for a gradient: forward-mode
    differentiation, vmap and the like."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def group_by_name(name: str) -> ProcessGroup:
    """The process group that a custom op got by name, as torch's own functional collectives do."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str, in newer releases


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode (selective checkpointing, fake tensors, counters) wants to see operators."""
    return torch._C._len_torch_dispatch_stack() > 0


def current_stream_handle(device: torch.device) -> int:
    """The driver's name of a CUDA device's current stream; a tenth of what making a `torch.cuda.Stream` takes."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


def current_stream(device_index: int) -> torch.cuda.Stream:
    """`torch.cuda.current_stream`, without its search for the device, and one object for each stream: to make one takes
    the host 2 µs, and a pass asks twenty times."""
    return _stream(*torch._C._cuda_getCurrentStream(device_index))


@lru_cache(maxsize=256)
def _stream(stream_id: int, device_index: int, device_type: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type)


def lasting() -> torch.inference_mode:
    """A context, or decorator, for making tensors that stay from call to call: what is made under
    `torch.inference_mode`, where a first call may be, cannot be written to in training."""
    return torch.inference_mode(False)


class OnStream:
    """`torch.cuda.stream` for a stream of the current device, which it does not look up: a context costs the host 2 µs
    instead of 10, and a backward pass enters several."""

    __slots__ = ("_before", "_stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._before: tuple[int, int, int] | None = None

    def __enter__(self) -> None:
        stream = self._stream
        device = stream.device_index
        self._before = torch._C._cuda_getCurrentStream(device)
        torch._C._cuda_setStream(stream_id=stream.stream_id, device_index=device, device_type=stream.device_type)

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        stream_id, device_index, device_type = self._before
        torch._C._cuda_setStream(stream_id=stream_id, device_index=device_index, device_type=device_type)


def symmetric_buffer(nbytes: int, device: torch.device) -> Tensor:
    """uint8 (nbytes,): memory of one GPU that the other ranks of a group can map, once `symmetric_rendezvous` has been
    called on it."""
    return _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)


def ranks_may_share_gpus() -> bool:
    """Whether torch lets ranks of one GPU meet in symmetric memory: for tests, see `ring_core.testing.plugin`."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"


def symmetric_rendezvous(own: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's buffer, mapped here. Collective."""
    handle = _symmetric_memory.rendezvous(own, group.group_name)
    return [
        own if rank == handle.rank else handle.get_buffer(rank, (own.numel(),), torch.uint8)
        for rank in range(handle.world_size)
    ]
