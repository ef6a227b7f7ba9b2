"""The backend of our own CuTe kernels behind ring-core's contract: what there is on a device, and which kernel a call
takes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ring_core.backend import (
    FEATURES,
    Capabilities,
    DeviceTable,
    Flags,
    HeadDims,
    Params,
    UnsupportedError,
)
from ring_cute import library
from ring_cute.launches import current_device
from ring_cute.settings import FORWARD

HOPPER = (9, 0)
DTYPES = frozenset({torch.float16, torch.bfloat16})
HEAD_DIMS = HeadDims(smallest=8, largest=max(FORWARD), multiple=8)
_TAKEN = frozenset(range(HEAD_DIMS.smallest, HEAD_DIMS.largest + 1, HEAD_DIMS.multiple))
LACKS = frozenset({"dropout"})
"""Features that its kernels do not have."""


class CuteBackend:
    """CuTe DSL kernels for compute capability 9.0 behind the contract."""

    name = "cute"

    def capabilities(self, device: torch.device) -> Capabilities:
        if reason := _missing(device):
            return Capabilities(available=False, reason=reason)
        return Capabilities(
            available=True,
            dtypes=DTYPES,
            head_dims=HEAD_DIMS,
            features=frozenset(FEATURES) - LACKS,
            accumulate=True,
            final_gradients=True,
            flags=True,
        )

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
        """See `ring_core.backend.StagedBackend`: all kernels watch pieces."""
        return True

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Tensor | None,
        table: DeviceTable,
        *,
        params: Params,
        flags: Flags | None = None,
    ) -> None:
        if _elsewhere(q):
            with torch.cuda.device(q.device):
                return self.forward(q, k, v, out, lse, state, table, params=params, flags=flags)
        _check(q, params)
        scale = params.scale
        if scale <= 0:
            q, scale = _positive(q, scale)
        _forward()(
            q,
            k,
            v,
            out,
            lse,
            state,
            table,
            scale=scale,
            sinks=params.sinks,
            softcap=params.softcap,
            slopes=params.alibi_slopes,
            flags=flags,
        )
        return None

    def prepare(
        self,
        q: Tensor,
        k_shape: torch.Size,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        *,
        params: Params,
    ) -> Any:
        if _elsewhere(q):
            with torch.cuda.device(q.device):
                return self.prepare(q, k_shape, out, dout, lse, dlse, params=params)
        _check(q, params)
        return _backward().prepare(q, out, dout, lse, dlse)

    def backward(
        self,
        state: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        dk: Tensor,
        dv: Tensor,
        table: DeviceTable,
        *,
        params: Params,
        flags: Flags | None = None,
        departures: Tensor | None = None,
    ) -> None:
        if _elsewhere(q):
            with torch.cuda.device(q.device):
                self.backward(state, q, k, v, dout, dk, dv, table, params=params, flags=flags, departures=departures)
            return
        if params.scale <= 0:
            q, scale = _positive(q, params.scale)
            params = replace(params, scale=scale)
        _backward().backward(state, q, k, v, dout, dk, dv, table, params=params, flags=flags, departures=departures)

    def finish(self, state: Any, *, params: Params) -> tuple[Tensor, Tensor | None]:
        if _elsewhere(state.memory):
            with torch.cuda.device(state.memory.device):
                return self.finish(state, params=params)
        found: tuple[Tensor, Tensor | None]
        if params.scale > 0:
            found = _backward().finish(state, params=params)
        else:
            _, scale = _positive(None, params.scale)
            dq, dsinks = _backward().finish(state, params=replace(params, scale=scale))
            found = -dq if params.scale < 0 else torch.zeros_like(dq), dsinks  # the gradient of what `_positive` made
        return found


@cache
def _forward() -> Any:
    """Imported where it is used, so that importing the package costs nothing."""
    from ring_cute.hopper.launch import forward

    return forward


@cache
def _backward() -> Any:
    from ring_cute.hopper import backward_launch

    return backward_launch


def _elsewhere(x: Tensor) -> bool:
    """Whether the tensor's GPU is not the current one, on whose stream launches are. It is asked: a context that is
    entered at every launch takes the host as long again."""
    index = x.get_device()
    return index >= 0 and index != current_device()


Queries = TypeVar("Queries", Tensor, None)


def _positive(q: Queries, scale: float) -> tuple[Queries, float]:
    """Queries and a positive scale that give the same scores: the kernels look for the largest q·k first."""
    if scale > 0:
        return q, scale
    if q is None:
        return q, -scale or 1.0
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _check(q: Tensor, params: Params) -> None:
    """Raises UnsupportedError unless there is a kernel for such tensors and scores, if nobody has asked before."""
    head_dim = q.size(-1)
    if head_dim in _TAKEN and params.dropout is None:
        return
    reason = "it knows no dropout" if head_dim in _TAKEN else f"the head dim is {head_dim}, it takes {HEAD_DIMS}"
    raise UnsupportedError(f"backend 'cute' cannot do this call: {reason}; backend 'triton' can")


def _missing(device: torch.device) -> str:
    """Why the kernels do not run on `device`, and what would help; empty where they do."""
    elsewhere = "elsewhere take backend 'triton' (pip install ring-triton) or 'native' (ring-native)"
    if device.type != "cuda" or torch.version.hip is not None:
        return (
            f"it runs on NVIDIA GPUs of compute capability 9.0 (H100, H200, GH200), not on {device.type}; {elsewhere}"
        )
    if not torch.cuda.is_available():
        return f"there is no CUDA device; it runs on NVIDIA GPUs of compute capability 9.0; {elsewhere}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != HOPPER:
        return f"it runs on compute capability 9.0, this GPU has {major}.{minor}; {elsewhere}"
    return library.missing()
