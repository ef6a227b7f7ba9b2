"""Process groups: what a user may pass, and this process's place in it."""

from __future__ import annotations

from typing import TypeAlias

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = ProcessGroup | DeviceMesh


def process_group(group: Group | None) -> ProcessGroup | None:
    """The process group meant: of a one-axis mesh its own; for None the default group, or None where nothing is
    initialised.

    Raises:
        ValueError: a mesh with several axes, or a group that this rank is not in.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"the group is a mesh with axes {group.mesh_dim_names}; pass one of them, as in mesh['cp']"
            )
        group = group.get_group()
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if not isinstance(group, ProcessGroup) or dist.get_rank(group) < 0:  # new_group gives non-members a number
        raise ValueError(
            f"rank {dist.get_rank()} is not in the group it passed; only members may call ring attention on a group"
        )
    return group


def rank_and_size(group: Group | None) -> tuple[int, int]:
    """(rank, world_size) of this process in `group`; (0, 1) where nothing is initialised."""
    members = process_group(group)
    return (0, 1) if members is None else (dist.get_rank(members), dist.get_world_size(members))
