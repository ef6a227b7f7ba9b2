"""RING_CHECK=1: makes sure, at the price of a collective a call, that all ranks are making the same one.

Without it ranks whose shapes or arguments differ hang or read garbage, as with any collective.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup


def wanted() -> bool:
    """Whether the user asked for it."""
    return os.environ.get("RING_CHECK") == "1"


def check_agreement(group: ProcessGroup, description: dict[str, Any]) -> None:
    """Raises ValueError, on every rank, if some rank's description of its call differs from the first rank's."""
    described: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(described, description, group=group)
    for rank, other in enumerate(described):
        differing = sorted(name for name in described[0] if other[name] != described[0][name])
        if differing:
            there, here = ({name: x[name] for name in differing} for x in (other, described[0]))
            raise ValueError(
                f"all ranks must make the same call, but rank {rank} passes {there} and rank 0 {here}; pad shorter "
                f"parts with ring_core.pad_sequence"
            )
