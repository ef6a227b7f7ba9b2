"""Every private name of torch that ring-core uses, in one place."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]


def group_by_name(name: str) -> ProcessGroup:
    """The process group that a custom op got by name, as torch's own functional collectives do."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str, in newer releases


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode (selective checkpointing, fake tensors, counters) wants to see operators."""
    return torch._C._len_torch_dispatch_stack() > 0
