"""Every private name of torch that ring-core uses, in one place."""

from __future__ import annotations

import torch
import torch.distributed._symmetric_memory as _symmetric_memory
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]


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


def symmetric_buffer(nbytes: int, device: torch.device) -> Tensor:
    """uint8 (nbytes,): memory of one GPU that the other ranks of a group can map, once `symmetric_rendezvous` has been
    called on it."""
    return _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)


def symmetric_rendezvous(own: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's buffer, mapped here. Collective."""
    handle = _symmetric_memory.rendezvous(own, group.group_name)
    return [
        own if rank == handle.rank else handle.get_buffer(rank, (own.numel(),), torch.uint8)
        for rank in range(handle.world_size)
    ]
