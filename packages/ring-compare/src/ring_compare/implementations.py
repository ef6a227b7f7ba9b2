"""What is compared against what: every installed ring_core backend, and peers added by entry.

A peer (another library's ring, say) is a zero-argument factory that returns an `Implementation`, registered under the
entry-point group `ring_compare.implementations` or named directly on the command line as `module:factory`.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

import ring_core
from ring_compare.suites import Cell
from ring_core import backend as ring_backend

ENTRY_GROUP = "ring_compare.implementations"


@runtime_checkable
class Implementation(Protocol):
    """One way to compute attention over a sequence spread over ranks."""

    name: str

    def provider(self, device: torch.device) -> str:
        """The library whose kernels run on this device, e.g. "flash-attn"; "" for own kernels."""

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """None when the cell can run here, otherwise the reason why not."""

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of this rank's shards: out like q, lse fp32 natural log (B, Hq, Sq / world size)."""


def display_name(name: str, provider: str) -> str:
    """The name in records and reports: `native` is reserved for flash-attn, other providers stand in brackets."""
    if name == "native" and provider == "flash-attn":
        return name
    return f"{name}[{provider}]" if provider else name


class RingCoreBackend:
    """A kernel backend that ring_core finds by its entry point."""

    def __init__(self, name: str) -> None:
        self.name = name
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
        return None

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`ring_core.ring_attention` with this backend."""
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


def backend_names() -> tuple[str, ...]:
    """The installed backends of ring_core."""
    return tuple(ring_backend.backend_names())


def installed_names() -> tuple[str, ...]:
    """Names of everything that can be compared here; `native` first, since others are compared against it."""
    peers = tuple(entry.name for entry in metadata.entry_points(group=ENTRY_GROUP))
    names = dict.fromkeys((*backend_names(), *peers))
    return tuple(sorted(names, key=lambda name: name != "native"))


def load(name: str) -> Implementation:
    """The implementation of that name; imports its library. Raises ValueError for an unknown name."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _checked(name, getattr(importlib.import_module(module), attribute)())
    if name in backend_names():
        return RingCoreBackend(name)
    for entry in metadata.entry_points(group=ENTRY_GROUP):
        if entry.name == name:
            return _checked(name, entry.load()())
    raise ValueError(f"unknown implementation {name!r}; installed: {', '.join(installed_names()) or 'none'}")


def _checked(name: str, made: object) -> Implementation:
    if not isinstance(made, Implementation):
        raise TypeError(f"{name} made a {type(made).__name__}; it needs name, provider(), supports() and call()")
    return made
