"""The backend of our own Triton kernels: which path a call takes, and what there is on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from ring_core.backend import FEATURES, Capabilities, DeviceTable, Flags, HeadDims, Params
from ring_triton.portable import launch as portable
from ring_triton.portable.settings import INTERPRETED

Path = Literal["portable"]
PATHS: tuple[Path, ...] = ("portable",)
"""The kernels there are. "portable": compute capability 8.0 and newer, and Triton's interpreter."""

OLDEST = (8, 0)


@dataclass
class BackwardState:
    """What lives from `prepare` to `finish`: the path's own state, and which path that is."""

    path: Path
    inner: Any


class TritonBackend:
    """Triton kernels behind the contract.

    Args:
        path: whose kernels; one of `PATHS`. None: the fastest that can do the call.

    Raises:
        ValueError: there is no such path.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None and path not in PATHS:
            raise ValueError(f"path={path!r}: there is no such path; there are {', '.join(map(repr, PATHS))}")
        self.forced = path
        self.name = "triton" if path is None else f"triton[{path}]"

    def path_of(self, q: Tensor, params: Params) -> Path:
        """The path that a call takes: the forced one, else the fastest of those that can do it."""
        return "portable"

    def capabilities(self, device: torch.device) -> Capabilities:
        missing = _missing(device)
        if missing:
            return Capabilities(available=False, reason=missing)
        dtypes = {torch.float16, torch.bfloat16, torch.float32}
        if INTERPRETED:  # for tests against the oracle; GPUs have no exp2 of fp64
            dtypes.add(torch.float64)
        return Capabilities(
            available=True,
            dtypes=frozenset(dtypes),
            head_dims=HeadDims(smallest=8, largest=256, multiple=8),
            features=frozenset(FEATURES),
            accumulate=True,
            flags=False,
        )

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
        assert flags is None, "flags=False among the capabilities"
        portable.forward(q, k, v, out, lse, state, table, params)

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
    ) -> BackwardState:
        return BackwardState(self.path_of(q, params), portable.prepare(q, out, dout, lse, dlse))

    def backward(
        self,
        state: BackwardState,
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
        assert flags is None and departures is None, "flags=False among the capabilities"
        portable.backward(state.inner, q, k, v, dout, dk, dv, table, params)

    def finish(self, state: BackwardState, *, params: Params) -> tuple[Tensor, Tensor | None]:
        return portable.finish(state.inner, params)


def _missing(device: torch.device) -> str:
    """Why the kernels do not run on `device`; empty where they do."""
    if bool(triton.knobs.runtime.interpret) != INTERPRETED:
        return "TRITON_INTERPRET was changed after triton was imported (torch and ring_core do that): set it before"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return (
            f"Triton compiles for GPUs; on {device.type}, set TRITON_INTERPRET=1 in the environment of "
            "the process, which runs the kernels in its interpreter: slowly, for tests"
        )
    if torch.version.hip is not None:
        return "it has been written for NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"it needs compute capability 8.0 or newer, this device has {capability[0]}.{capability[1]}"
    return ""
