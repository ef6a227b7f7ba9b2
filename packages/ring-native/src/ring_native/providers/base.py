"""What the backend asks of a provider: one call of somebody's kernel."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ring_core.backend import Capabilities, HeadDims, Params
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style

Gradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv, in the dtype of q."""


class Provider(Protocol):
    """Somebody's attention kernel.

    Dense shapes: q, out, dout, dq (B, Sq, Hq, D), k, v, dk, dv (B, Sk, Hkv, D), lse, dlse (B, Hq, Sq). With
    `sequences` (only where `varlen`): q, out, dout, dq (T, Hq, D), k, v, dk, dv (U, Hkv, D), lse, dlse (Hq, T). The
    last dimension is dense, nothing is empty, every row sees a key, and the mask is one that `style` takes (with
    alibi_slopes: any that is not misread). lse is the natural logarithm, in fp32 (fp64 for fp64 inputs).

    alibi_slopes are (Hq,) or, without sequences, (B, Hq): a score loses slope * |distance|, the last query and the last
    key of each sequence lying at one position, and lse is that of such scores.
    """

    name: str
    style: Style
    varlen: bool
    """Whether it takes sequences of unequal lengths in one call."""
    beside: bool
    """Whether its backward writes into the dk and dv that it is given also where these lie side by side,
    (…, keys, 2, Hkv, D)."""

    def capabilities(self, device: torch.device) -> Capabilities:
        """What it can do on `device`. Cheap, never raises."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> tuple[Tensor, Tensor]:
        """out and lse: in the tensors that were handed over, where it can write there."""
        ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor | None,
        dkv: tuple[Tensor, Tensor] | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> Gradients:
        """dq, dk, dv (in the tensors that were handed over, where it can write there) from the out and lse of the whole
        row, of which these keys are a part. lse is contiguous."""
        ...


HALF = frozenset({torch.float16, torch.bfloat16})
EIGHTS = HeadDims(8, 256, 8)
THIRTY_SECONDS = HeadDims(32, 256, 32)


@cache
def imported(module: str) -> ModuleType | str:
    """The module, or why it cannot be imported (which a library compiled for another torch says in many ways)."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device, None for others."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def library(name: str, install: str) -> ModuleType:
    """The module of that name. Raises ImportError, saying how to get it, where it cannot be imported."""
    module = imported(name)
    if isinstance(module, str):
        raise ImportError(f"{module}. {install}")
    return module


def unavailable(name: str, reason: str) -> Capabilities:
    return Capabilities(available=False, reason=f"provider {name!r}: {reason}", provider=name)
