"""The backend of our own CuTe kernels behind ring-core's contract. So far it computes forwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from ring_core.backend import FEATURES, Capabilities, DeviceTable, Flags, HeadDims, Params, UnsupportedError

HOPPER = (9, 0)
DTYPES = frozenset({torch.float16, torch.bfloat16})
HEAD_DIMS = HeadDims(smallest=8, largest=256, multiple=8)
LACKS = frozenset({"alibi", "deterministic", "dropout", "lse_grad", "ring_alibi", "softcap"})
"""Features that it does not have; "deterministic" and "lse_grad" are about backwards."""
NO_BACKWARD = "backend 'cute' computes no gradients yet; backends 'triton' and 'native' do"


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
            flags=True,
        )

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
        """See `ring_core.backend.StagedBackend`: every forward can watch pieces arrive."""
        return dout is None

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
        if reason := _refuses(params):
            raise UnsupportedError(f"backend 'cute' cannot do this call: {reason}; backend 'triton' can")
        from ring_cute.hopper.launch import forward

        with _on(q):
            forward(q, k, v, out, lse, state, table, scale=params.scale, sinks=params.sinks, flags=flags)

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
    ) -> NoReturn:
        raise UnsupportedError(NO_BACKWARD)

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
    ) -> NoReturn:
        raise UnsupportedError(NO_BACKWARD)

    def finish(self, state: Any, *, params: Params) -> NoReturn:
        raise UnsupportedError(NO_BACKWARD)


_HERE = nullcontext()


def _on(q: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, where it is not: launches are on its current stream."""
    index = q.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def _refuses(params: Params) -> str:
    """Why there is no kernel for such scores, or "" where there is."""
    if params.softcap:
        return "it knows no softcap"
    if params.alibi_slopes is not None:
        return "it knows no ALiBi"
    if params.dropout is not None:
        return "it knows no dropout"
    if params.scale <= 0:
        return f"the scale is {params.scale}; it looks for the largest score and needs it positive"
    return ""


def _missing(device: torch.device) -> str:
    """Why the kernels do not run on `device`; empty where they do."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs of compute capability 9.0; elsewhere take backend 'triton'"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != HOPPER:
        return f"it runs on compute capability 9.0, this GPU has {major}.{minor}: take backend 'triton'"
    from ring_cute import library

    return library.missing()
