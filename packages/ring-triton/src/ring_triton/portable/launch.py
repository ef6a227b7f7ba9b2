"""Launches the portable kernels: the contract's arguments become grids, strides and constants. Nothing here waits for
the device."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_core.backend import DeviceTable, Params, accumulation_dtype, names_every_key
from ring_core.direct import Launches, addresses, aligned, launches_of, shaped
from ring_triton import tuned
from ring_triton.portable.forward import forward_kernel
from ring_triton.portable.gradient_sinks import gradient_sinks_kernel
from ring_triton.portable.gradients_kv import gradients_kv_kernel
from ring_triton.portable.gradients_q import gradients_q_kernel
from ring_triton.portable.prepare import prepare_kernel
from ring_triton.portable.settings import INTERPRETED, Kernel, Setting, place_of, setting_of, width_of
from ring_triton.portable.work import query_work, strip_work

ELEMENTS = 8192
"""Of a tile of `prepare`: 16 loads of 16 bytes a thread and tensor, for every head dim."""

LOG2E = math.log2(math.e)


@dataclass
class BackwardState:
    """What lives from `prepare` to `finish`. fresh: dq is not written yet."""

    delta: Tensor  # (B, Hq, Sq)
    scaled_lse: Tensor  # (B, Hq, Sq), times _unit, +inf where a row has seen nothing
    dq: Tensor  # (B, Sq, Hq, D), in the accumulation dtype
    dtype: torch.dtype
    fresh: bool = True


_prepared = Launches()


class _Scores(NamedTuple):
    """What `Params` comes to: arguments and constants of the kernels."""

    slopes: Tensor
    seed: Tensor
    slope_stride: int
    score_scale: float
    cap_scale: float
    keep_from: int
    keep_scale: float
    first_head: int
    features: dict[str, Any]

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All but the tensors."""
        return *self[2:-1], *self.features.values()


def scores_of(params: Params, q: Tensor) -> _Scores:
    slopes, dropout, softcap = params.alibi_slopes, params.dropout, params.softcap
    stride, unit = 0, _unit(q.dtype)
    if slopes is not None:
        slopes = slopes if slopes.stride(-1) == 1 else slopes.contiguous()
        stride = slopes.stride(0) if slopes.dim() == 2 and slopes.shape[0] > 1 else 0
    return _Scores(
        slopes=q if slopes is None else slopes,
        seed=q if dropout is None else dropout.seed,
        slope_stride=stride,
        score_scale=params.scale / softcap if softcap else params.scale * unit,
        cap_scale=softcap * unit,
        keep_from=0 if dropout is None else int(dropout.probability * 2**32),
        keep_scale=1.0 if dropout is None else 1 / (1 - dropout.probability),
        first_head=0 if dropout is None else dropout.first_head,
        features={"SOFTCAP": bool(softcap), "ALIBI": slopes is not None, "DROPOUT": dropout is not None},
    )


def _shape(kernel: Kernel, table: DeviceTable, q: Tensor, *tensors: Tensor) -> dict[str, Any]:
    """The constants of a launch that its setting and dtype, and the strides of all `tensors`, decide."""
    bits = q.dtype.itemsize * 8
    found = tuned.lookup(place_of(kernel, q.shape[3], tuned.mask_of(table.host), bits), q.device)
    setting = setting_of(q.device, kernel, q.shape[3], bits) if found is None else Setting(**found)
    return {
        "ROWS": setting.rows,
        "KEYS": setting.keys,
        "D": q.shape[3],
        "WIDTH": width_of(q.shape[3]),
        "LONG": _long(q, *tensors),
        "ACC": _sums(q.dtype),
        "UNIT": _unit(q.dtype),
        "UPCAST": INTERPRETED and q.dtype != torch.float64,
        "PRECISION": setting.precision,
        "num_warps": setting.warps,
        "num_stages": setting.stages,
    }


def _long(*tensors: Tensor) -> bool:
    """Whether a tile of 256 tokens spans more elements than 31 bits count; tokens are the third dimension from last."""
    return any(x.stride(-3) >= 1 << 23 for x in tensors)


def _sums(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _unit(dtype: torch.dtype) -> float:
    """Scores are kept in units of 1 / this; see `ring_triton.portable.common`."""
    return LOG2E if dtype.itemsize == 2 else 1.0


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor | None,
    table: DeviceTable,
    params: Params,
) -> None:
    """See `ring_core.backend.Backend.forward`."""
    if not q.numel() or not len(table.host):
        return
    batches, _, num_heads, _ = q.shape
    scores = scores_of(params, q)
    running = out if state is None else state
    sinks = q if params.sinks is None else params.sinks
    tensors, last = (q, k, v, out, lse, running), (scores.slopes, sinks, scores.seed)
    kind = state is None, params.sinks is None, tuned.serial(), q.get_device()
    key = shaped(*tensors, *last), params.scale, scores.numbers, kind
    launches = launches_of(table, "portable forward")
    if launches.again(key, q.get_device(), addresses(*tensors), addresses(*last)):
        return
    shape = _shape("forward", table, q, k, v)
    work = strip_work(table, "q", shape["ROWS"], batches)
    if not len(work):
        return
    plain = not params.softcap and params.alibi_slopes is None
    grid = (len(work), num_heads, work.entries)
    arguments = (
        *tensors,
        work.rows,
        table.rows,
        *last,
        *q.stride()[:3],
        *k.stride()[:4],
        *v.stride()[:4],
        *out.stride()[:3],
        *lse.stride()[:2],
        *running.stride()[:3],
        scores.slope_stride,
        num_heads // k.shape[3],
        scores.score_scale,
        scores.cap_scale,
        scores.keep_from,
        scores.keep_scale,
        scores.first_head,
    )
    with _on(q.device):
        kernel = forward_kernel[grid](
            *arguments,
            FUSED=plain and params.scale > 0,
            SINKS=params.sinks is not None,
            STATE=state is not None,
            **scores.features,
            **shape,
        )
        if aligned(*addresses(*tensors, *last)):
            launches.add(key, kernel, grid, arguments, addresses(work.rows, table.rows))


def prepare(q: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> BackwardState:
    """See `ring_core.backend.Backend.prepare`."""
    batches, length, num_heads, head_dim = q.shape
    sums = accumulation_dtype(q.dtype)
    delta, scaled_lse = torch.empty((2, batches, num_heads, length), dtype=sums, device=q.device)
    state = BackwardState(delta, scaled_lse, torch.empty(q.shape, dtype=sums, device=q.device), q.dtype)
    if not q.numel():
        return state
    width = width_of(head_dim)
    rows = ELEMENTS // width
    given = lse if dlse is None else dlse
    tensors = (out, dout, lse, given, delta, scaled_lse)
    key = shaped(*tensors), q.dtype, dlse is None, q.get_device()
    if _prepared.again(key, q.get_device(), addresses(*tensors), ()):
        return state
    grid = (triton.cdiv(length, rows), num_heads, batches)
    arguments = (
        *tensors,
        *out.stride()[:3],
        *dout.stride()[:3],
        *lse.stride()[:2],
        *given.stride(),
        length,
    )
    with _on(q.device):
        kernel = prepare_kernel[grid](
            *arguments,
            ROWS=rows,
            D=head_dim,
            WIDTH=width,
            LONG=True,
            ACC=_sums(q.dtype),
            UNIT=_unit(q.dtype),
            DLSE=dlse is not None,
            num_warps=4,
        )
        if aligned(*addresses(*tensors)):
            _prepared.add(key, kernel, grid, arguments, ())
    return state


def backward(
    state: BackwardState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: DeviceTable,
    params: Params,
) -> None:
    """See `ring_core.backend.Backend.backward`."""
    void_unnamed(state.delta.dtype, q, dk, dv, table)
    if not q.numel() or not len(table.host):
        return
    scores = scores_of(params, q)
    with _on(q.device):
        _gradients_kv(state, q, k, v, dout, dk, dv, table, params, scores)
        launch_gradients_q(state, q, k, v, dout, table, params, scores)


def void_unnamed(sums: torch.dtype, q: Tensor, dk: Tensor, dv: Tensor, table: DeviceTable) -> None:
    """Zeros in final dk and dv, those that do not have the dtype of sums, unless the kernels write all of them."""
    if dk.dtype == sums:
        return
    pieces, batches, tokens = dk.shape[:3]
    if not q.numel() or not names_every_key(table.host, pieces, tokens, batches):
        dk.zero_()
        dv.zero_()


def _gradients_kv(
    state: BackwardState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: DeviceTable,
    params: Params,
    scores: _Scores,
) -> None:
    tensors, last = (q, k, v, dout, dk, dv, state.scaled_lse, state.delta), (scores.slopes, scores.seed)
    key = shaped(*tensors, *last), params.scale, scores.numbers, tuned.serial(), q.get_device()
    launches = launches_of(table, "portable gradients_kv")
    if launches.again(key, q.get_device(), addresses(*tensors), addresses(*last)):
        return
    batches, length, num_heads, _ = q.shape
    num_kv_heads = k.shape[3]
    shape = _shape("gradients_kv", table, q, k, v, dout)
    work = strip_work(table, "k", shape["KEYS"], batches)
    if not len(work):
        return
    grid = (len(work), num_kv_heads, work.entries)
    arguments = (
        *tensors,
        work.rows,
        table.rows,
        *last,
        *q.stride()[:3],
        *k.stride()[:4],
        *v.stride()[:4],
        *dout.stride()[:3],
        *dk.stride()[:4],
        *dv.stride()[:4],
        scores.slope_stride,
        length,
        num_heads,
        num_heads // num_kv_heads,
        params.scale,
        scores.score_scale,
        scores.cap_scale,
        scores.keep_from,
        scores.keep_scale,
        scores.first_head,
    )
    kernel = gradients_kv_kernel[grid](*arguments, **scores.features, **shape)
    if aligned(*addresses(*tensors, *last)):
        launches.add(key, kernel, grid, arguments, addresses(work.rows, table.rows))


def launch_gradients_q(
    state: BackwardState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    table: DeviceTable,
    params: Params,
    scores: _Scores,
) -> None:
    fresh, state.fresh = state.fresh, False
    tensors, last = (q, k, v, dout, state.dq, state.scaled_lse, state.delta), (scores.slopes, scores.seed)
    key = shaped(*tensors, *last), params.scale, scores.numbers, fresh, tuned.serial(), q.get_device()
    launches = launches_of(table, "portable gradients_q")
    if launches.again(key, q.get_device(), addresses(*tensors), addresses(*last)):
        return
    batches, length, num_heads, _ = q.shape
    shape = _shape("gradients_q", table, q, k, v, dout)
    work = query_work(table, shape["ROWS"], batches, length, cover=fresh)
    assert work.numbers is not None
    if not len(work):
        state.fresh = fresh
        return
    grid = (len(work), num_heads, work.entries)
    arguments = (
        *tensors,
        work.rows,
        work.numbers,
        table.rows,
        *last,
        *q.stride()[:3],
        *k.stride()[:4],
        *v.stride()[:4],
        *dout.stride()[:3],
        *state.dq.stride()[:3],
        scores.slope_stride,
        length,
        num_heads // k.shape[3],
        params.scale,
        scores.score_scale,
        scores.cap_scale,
        scores.keep_from,
        scores.keep_scale,
        scores.first_head,
    )
    kernel = gradients_q_kernel[grid](*arguments, FRESH=fresh, **scores.features, **shape)
    if aligned(*addresses(*tensors, *last)):
        launches.add(key, kernel, grid, arguments, addresses(work.rows, work.numbers, table.rows))


def finish(state: BackwardState, params: Params) -> tuple[Tensor, Tensor | None]:
    """See `ring_core.backend.Backend.finish`."""
    dq = torch.zeros_like(state.dq) if state.fresh else state.dq
    sinks = params.sinks
    if sinks is None:
        return dq.to(state.dtype), None
    batches, num_heads, length = state.scaled_lse.shape
    dsinks = torch.zeros_like(sinks)
    if state.scaled_lse.numel():
        with _on(sinks.device):
            gradient_sinks_kernel[(num_heads,)](
                dsinks,
                sinks,
                state.scaled_lse,
                state.delta,
                length,
                batches,
                BLOCK=1024,
                ACC=_sums(state.dtype),
                UNIT=_unit(state.dtype),
                num_warps=4,
            )
    return dq.to(state.dtype), dsinks
