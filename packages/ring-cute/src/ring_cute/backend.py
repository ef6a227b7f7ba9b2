"""The backend of our own CuTe kernels behind ring-core's contract: what there is on a device, and which kernel a call
takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
from ring_cute.hopper.backward_settings import BACKWARD
from ring_cute.launches import current_device
from ring_cute.settings import FORWARD

HOPPER = (9, 0)
DTYPES = frozenset({torch.float16, torch.bfloat16})
HEAD_DIMS = HeadDims(smallest=8, largest=max(FORWARD), multiple=8)
BACKWARD_HEAD_DIMS = HeadDims(smallest=8, largest=max(BACKWARD), multiple=8)
"""What there are backward kernels for: calls of other head dims that need gradients are refused."""
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
            gradient_head_dims=BACKWARD_HEAD_DIMS,
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
        _check(q, HEAD_DIMS, params)
        q, scale = _positive(q, params.scale)
        with _on(q):
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
        _check(q, BACKWARD_HEAD_DIMS, params)
        with _on(q):
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
        if params.scale <= 0:
            q, scale = _positive(q, params.scale)
            params = replace(params, scale=scale)
        with _on(q):
            _backward().backward(state, q, k, v, dout, dk, dv, table, params=params, flags=flags, departures=departures)

    def finish(self, state: Any, *, params: Params) -> tuple[Tensor, Tensor | None]:
        _, scale = _positive(None, params.scale)
        with _on(state.memory):
            given = params if scale == params.scale else replace(params, scale=scale)
            dq, dsinks = _backward().finish(state, params=given)
            if params.scale <= 0:  # the gradient of what `_positive` made of q
                dq = -dq if params.scale < 0 else torch.zeros_like(dq)
            return dq, dsinks


@cache
def _forward() -> Any:
    """Imported where it is used, so that importing the package costs nothing."""
    from ring_cute.hopper.launch import forward

    return forward


@cache
def _backward() -> Any:
    from ring_cute.hopper import backward_launch

    return backward_launch


_HERE = nullcontext()


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, where it is not: launches are on its current stream."""
    index = x.get_device()
    return _HERE if index < 0 or index == current_device() else torch.cuda.device(index)


Queries = TypeVar("Queries", Tensor, None)


def _positive(q: Queries, scale: float) -> tuple[Queries, float]:
    """Queries and a positive scale that give the same scores: the kernels look for the largest q·k first."""
    if scale > 0:
        return q, scale
    if q is None:
        return q, -scale or 1.0
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _check(q: Tensor, head_dims: HeadDims, params: Params) -> None:
    """Raises UnsupportedError unless there is a kernel for such tensors and scores, if nobody has asked before."""
    if reason := _refuses(q.shape[-1], head_dims, params):
        raise UnsupportedError(f"backend 'cute' cannot do this call: {reason}; backend 'triton' can")


def _refuses(head_dim: int, head_dims: HeadDims, params: Params) -> str:
    if head_dim not in head_dims:
        return f"the head dim is {head_dim}, it takes {head_dims}{'' if head_dims == HEAD_DIMS else ' with gradients'}"
    if params.dropout is not None:
        return "it knows no dropout"
    return ""


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
