"""The backend of our own Triton kernels: which path a call takes, and what there is on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from ring_core.backend import FEATURES, Capabilities, DeviceTable, Flags, HeadDims, Params, UnsupportedError
from ring_triton.portable import launch as portable
from ring_triton.portable.settings import INTERPRETED

Path = Literal["hopper", "portable"]
Direction = Literal["forward", "backward"]
PATHS: tuple[Path, ...] = ("hopper", "portable")
"""The kernels there are, fastest first. "hopper": Gluon, compute capability 9.0. "portable": compute capability 8.0 and
newer, and Triton's interpreter."""

HOPPER_HEAD_DIMS: dict[Direction, HeadDims] = {
    "forward": HeadDims(smallest=8, largest=256, multiple=8),
    "backward": HeadDims(smallest=8, largest=128, multiple=8),
}
"""What there are Hopper kernels for, 128 for the sake of registers; wider backwards take the portable ones, also where
"hopper" is forced."""

OLDEST = (8, 0)
HOPPER = (9, 0)
HOPPER_DTYPES = frozenset({torch.float16, torch.bfloat16})
HOPPER_LACKS = frozenset({"alibi", "dropout", "ring_alibi", "softcap"})
HEAD_DIMS = HeadDims(smallest=8, largest=256, multiple=8)


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

    def path_of(self, direction: Direction, q: Tensor, params: Params) -> Path:
        """The path that a call takes: the fastest of those that can do it.

        Raises:
            UnsupportedError: "hopper" is forced, and cannot.
        """
        if self.forced == "portable":
            return "portable"
        path = _fastest(direction, q.get_device(), q.dtype, q.shape[-1])
        plain = params.softcap == 0 and params.alibi_slopes is None and params.dropout is None and params.scale > 0
        if path is not None and plain:
            return path
        if self.forced:
            reason = _hopper_refuses(q.get_device(), q.dtype, q.shape[-1]) or _hopper_refuses_scores(params)
            raise UnsupportedError(
                f"backend {self.name!r} cannot do this call: {reason}; backends 'triton' and 'triton[portable]' have "
                "other kernels for it"
            )
        return "portable"

    def capabilities(self, device: torch.device) -> Capabilities:
        missing = _missing(device)
        hopper = "" if missing else _no_hopper(device)
        if missing or (hopper and self.forced == "hopper"):
            return Capabilities(available=False, reason=missing or hopper)
        dtypes = {torch.float16, torch.bfloat16, torch.float32}
        if INTERPRETED:  # for tests against the oracle; GPUs have no exp2 of fp64
            dtypes.add(torch.float64)
        features = frozenset(FEATURES)
        if self.forced == "hopper":
            dtypes, features = set(HOPPER_DTYPES), features - HOPPER_LACKS
        return Capabilities(
            available=True,
            dtypes=frozenset(dtypes),
            head_dims=HEAD_DIMS,
            features=features,
            accumulate=True,
            final_gradients=True,
            flags=not hopper and self.forced != "portable",
        )

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
        """See `ring_core.backend.StagedBackend`: the Hopper kernels watch pieces. Strides play no part in it: all ranks
        must decide alike."""
        return self.path_of("forward" if dout is None else "backward", q, params) == "hopper"

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
        path = self.path_of("forward", q, params)
        with _on(q):
            if path == "hopper":
                _hopper_forward()(q, k, v, out, lse, state, table, scale=params.scale, sinks=params.sinks, flags=flags)
            else:
                assert flags is None, "stages() said no"
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
        path = self.path_of("backward", q, params)
        with _on(q):
            if path == "portable":
                return BackwardState(path, portable.prepare(q, out, dout, lse, dlse))
            prepared = _hopper_backward().prepare(q, out, dout, lse, dlse, deterministic=params.deterministic)
            return BackwardState(path, prepared)

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
        tensors = (q, k, v, dout, dk, dv)
        with _on(q):
            if state.path == "portable":
                assert flags is None and departures is None, "stages() said no"
                portable.backward(state.inner, *tensors, table, params)
            else:
                staged: dict[str, Any] = {"flags": flags, "departures": departures}
                _hopper_backward().backward(state.inner, *tensors, table, params=params, **staged)

    def finish(self, state: BackwardState, *, params: Params) -> tuple[Tensor, Tensor | None]:
        with _on(state.inner.delta):
            if state.path == "portable":
                return portable.finish(state.inner, params)
            dq, dsinks = _hopper_backward().finish(state.inner, params=params)
            return dq, dsinks


@cache
def _hopper_forward() -> Any:
    """Imported where it is used: the interpreter does not know Gluon."""
    from ring_triton.hopper.launch import forward

    return forward


@cache
def _hopper_backward() -> Any:
    from ring_triton.hopper import backward_launch

    return backward_launch


_HERE = nullcontext()


def _on(q: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, where it is not: launches are on its current stream."""
    index = q.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


@cache
def _fastest(direction: Direction, device: int, dtype: torch.dtype, head_dim: int) -> Path | None:
    """The path for such tensors if scores are plain; None where the Hopper kernels do not take them."""
    if _hopper_refuses(device, dtype, head_dim):
        return None
    return "hopper" if head_dim in HOPPER_HEAD_DIMS[direction] else "portable"


def _hopper_refuses(device: int, dtype: torch.dtype, head_dim: int) -> str:
    """Why the Hopper kernels do not take tensors on that GPU (-1: the CPU), or "" where they do."""
    if reason := _no_hopper(torch.device("cpu") if device < 0 else torch.device("cuda", device)):
        return reason
    if dtype not in HOPPER_DTYPES:
        return f"q, k, v are {dtype}, the Hopper kernels take {', '.join(sorted(map(str, HOPPER_DTYPES)))}"
    can = HOPPER_HEAD_DIMS["forward"]
    return "" if head_dim in can else f"the head dim is {head_dim}, the Hopper kernels take {can}"


def _hopper_refuses_scores(params: Params) -> str:
    """Why they do not compute such scores, or "" where they do."""
    if params.softcap:
        return "the Hopper kernels know no softcap"
    if params.alibi_slopes is not None:
        return "the Hopper kernels know no ALiBi"
    if params.dropout is not None:
        return "the Hopper kernels know no dropout"
    if params.scale <= 0:
        return f"the scale is {params.scale}, the Hopper kernels look for the largest score and need it positive"
    return ""


def _no_hopper(device: torch.device) -> str:
    """Why there are no Hopper kernels on a device, or "" where there are."""
    if INTERPRETED or device.type != "cuda":
        return "the Hopper kernels run on GPUs of compute capability 9.0, not in the interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == HOPPER:
        return ""
    return f"the Hopper kernels run on GPUs of compute capability 9.0, this one has {major}.{minor}"


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
