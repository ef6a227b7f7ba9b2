"""What is compared against what: every installed ring_core backend, other libraries' rings, yardsticks.

Names may carry one option in brackets: `native[cudnn]` is the backend `native` with the provider `cudnn`,
`local[native[cudnn]]` its kernels alone. A peer (another library's ring, say) is a factory that returns an
`Implementation`: one of `BUILT_IN`, one registered under the entry-point group `ring_compare.implementations`, or one
named directly on the command line as `module:factory`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

import ring_core
from ring_compare import packed
from ring_compare.places import Positions
from ring_compare.suites import OWN, STEP_COUNTS, Cell
from ring_core import backend as ring_backend

ENTRY_GROUP = "ring_compare.implementations"


@dataclass(frozen=True)
class Traits:
    """What sets an implementation apart from a ring_core backend; it may carry them as an attribute `traits`."""

    own_schedule: bool = False
    """It has one schedule: measured once per layout, as the route "own"."""
    omits: frozenset[str] = frozenset()
    """Of out, lse, dq, dk, dv: what it does not give (None). Everything else must be there."""
    label: str = ""
    """The name in records; "" for `display_name`."""
    positions: Positions | None = None
    """Which tokens each rank holds, where that is not what ring_core's layout of the same name says."""
    arena: bool = False
    """Its gather schedule works in ring_core's peer memory, which counts as its own."""

    def routes(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells to measure it on."""
        own = [replace(cell, schedule=OWN) for cell in cells] if self.own_schedule else list(cells)
        return list(dict.fromkeys(own))

    def uses_arena(self, cell: Cell) -> bool:
        """Whether peer memory held now counts for this cell."""
        return self.arena and cell.world_size > 1 and cell.schedule in ("gather", "auto")


@runtime_checkable
class Implementation(Protocol):
    """One way to compute attention over a sequence spread over ranks. It may have `traits: Traits` besides."""

    name: str

    def provider(self, device: torch.device) -> str:
        """The library whose kernels run on this device, e.g. "flash-attn"; "" for own kernels."""

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """None when the cell can run here, otherwise the reason why not."""

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, lse) of this rank's shards: out like q, lse fp32 natural log (B, Hq, Sq / world size) or None."""


def traits(made: Implementation) -> Traits:
    """The implementation's traits, or those of any other."""
    found = getattr(made, "traits", Traits())
    if not isinstance(found, Traits):
        raise TypeError(f"{made.name}.traits is a {type(found).__name__}, not Traits")
    return found


def split_option(name: str) -> tuple[str, str]:
    """("native", "cudnn") of "native[cudnn]", ("native", "") of "native"."""
    base, bracket, option = name.partition("[")
    return (base, option.removesuffix("]")) if bracket and option.endswith("]") else (name, "")


def display_name(name: str, provider: str) -> str:
    """The name in records and reports: `native` is reserved for flash-attn, other providers stand in brackets."""
    base, _ = split_option(name)
    if base == "native" and provider == "flash-attn":
        return base
    return f"{base}[{provider}]" if provider else name


class RingCoreBackend:
    """A kernel backend that ring_core finds by its entry point, with its option if it has one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.traits = Traits(arena=True)
        self._backend = ring_backend.load_backend(name)

    def provider(self, device: torch.device) -> str:
        """The provider its capabilities name for this device."""
        return self._backend.capabilities(device).provider

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """Availability, dtype and head dim; whatever else does not fit, ring_core refuses with an UnsupportedError."""
        capabilities = self._backend.capabilities(device)
        if not capabilities.available:
            return capabilities.reason or f"not available on {device.type}"
        if getattr(torch, cell.dtype) not in capabilities.dtypes:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in capabilities.dtypes))
            return f"no {cell.dtype} on {device.type}; it takes {known}"
        if cell.D not in capabilities.head_dims:
            return f"no head dim {cell.D} on {device.type}; it takes {capabilities.head_dims}"
        if cell.documents and "packed" not in capabilities.features:
            return f"no packed documents on {device.type}"
        return None

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`ring_core.ring_attention` with this backend; for packed documents its counterpart."""
        if cell.documents:
            return packed.attention(q, k, v, cell, group, backend=self.name)
        assert cell.layout != "balanced"  # check_cell
        assert cell.schedule != "own"
        out, lse = ring_core.ring_attention(
            q,
            k,
            v,
            causal=cell.causal,
            window_size=cell.window_size,
            layout=cell.layout,
            schedule=cell.schedule,
            backend=self.name,
            group=group,
            return_lse=True,
        )
        return out, lse


BUILT_IN = {
    "ring-flash-attn": "ring_compare.peers.ring_flash_attn:RingFlashAttn",
    "torch-cp": "ring_compare.peers.torch_context_parallel:TorchContextParallel",
    "local": "ring_compare.peers.local:LocalKernels",
    "local-varlen": "ring_compare.peers.local_varlen:LocalVarlen",
    "sdpa": "ring_compare.peers.sdpa:Sdpa",
    "flex": "ring_compare.peers.flex_attention:FlexAttention",
    **{f"steps-{count}": f"ring_compare.peers.steps:steps_{count}" for count in STEP_COUNTS},
}
"""Peers and yardsticks that come with this package, by name without option; what they need may not be installed."""

OF_A_BACKEND = ("local", *(f"steps-{count}" for count in STEP_COUNTS))
"""Those whose option names a backend."""


class NotInstalledError(ValueError):
    """No implementation of that name is here."""


def backend_names() -> tuple[str, ...]:
    """The installed backends of ring_core."""
    return tuple(ring_backend.backend_names())


def installed_names() -> tuple[str, ...]:
    """Names of everything that can be compared here; `native` first, since others are compared against it."""
    peers = tuple(entry.name for entry in metadata.entry_points(group=ENTRY_GROUP))
    names = dict.fromkeys((*backend_names(), *peers))
    return tuple(sorted(names, key=lambda name: name != "native"))


def known(name: str) -> bool:
    """Whether `load` would look for it; what it needs may still be missing."""
    base, option = split_option(name)
    if base in OF_A_BACKEND:
        return known(option)
    return ":" in name or base in (*installed_names(), *BUILT_IN)


def load(name: str) -> Implementation:
    """The implementation of that name; imports its library. Raises NotInstalledError for an unknown name."""
    if ":" in name:
        return _made(name, name)
    base, option = split_option(name)
    if base in backend_names():
        return RingCoreBackend(name)
    if base in OF_A_BACKEND and option and not known(option):
        raise NotInstalledError(f"{name} is about the backend {option!r}, which is not installed")
    if base in BUILT_IN:
        return _made(name, BUILT_IN[base], *filter(None, [option]))
    for entry in metadata.entry_points(group=ENTRY_GROUP):
        if entry.name == name:
            return _checked(name, entry.load()())
    raise NotInstalledError(f"unknown implementation {name!r}; installed: {', '.join(installed_names()) or 'none'}")


def _made(name: str, place: str, *arguments: str) -> Implementation:
    module, _, attribute = place.partition(":")
    return _checked(name, getattr(importlib.import_module(module), attribute)(*arguments))


def _checked(name: str, made: object) -> Implementation:
    if not isinstance(made, Implementation):
        raise TypeError(f"{name} made a {type(made).__name__}; it needs name, provider(), supports() and call()")
    return made
