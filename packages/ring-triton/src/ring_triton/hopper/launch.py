"""Launches the Hopper forward: descriptors, schedule, counters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from ring_core.backend import DeviceTable, Flags
from ring_core.direct import aligned, current_stream, launches_of
from ring_core.segment import FIRST, LAST
from ring_core.tiles import make_schedule, with_first_walk
from ring_triton import tuned
from ring_triton.hopper.compat import TensorDescriptor
from ring_triton.hopper.kernel import forward_kernel
from ring_triton.hopper.settings import CONSUMERS, TILE_ROWS, Settings, padded_head_dim, settings_for

L2_BYTES = 32 << 20
"""Keys and values that concurrent tiles should share in L2 (50 MB on an H100 or H200, also used by everything else)."""
POLLS = (1 << 31) - 1
"""Looks at an arrival flag before a wait ends by itself: some twenty minutes. The transport's watchdog ends it before,
by poison, and raises; ending by itself would be silent."""
FAR, BOUNDLESS = 1 << 30, 0x7FFF0000
DTYPES = (torch.float16, torch.bfloat16)
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
SHARED_BYTES = 226 << 10
"""Of buffers in shared memory; a kilobyte is left for barriers and records."""
WIDEST_AHEAD = 128
"""Head dim up to which shared memory holds a tile's state beside its rings."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table's schedule on a device, for one batch size."""

    items: Tensor  # (N, 16) int32
    count: int
    walk: Tensor  # (M, 12) int32
    repeats: int  # batch entries that all items are about
    whole: bool  # every strip begins and ends in this table


def query_buffers(head_dim: int, settings: Settings, ahead: bool) -> int:
    """Buffers for a consumer's queries: two where shared memory holds them beside the rings and the state."""
    rings, rows = 4 * settings.stages * settings.block, (2 * 2 + 4 * ahead) * TILE_ROWS
    return 2 if (rings + rows) * padded_head_dim(head_dim) <= SHARED_BYTES else 1


def takes_tma(x: Tensor) -> bool:
    """Whether TMA can address x (…, B, S, H, D) by rows."""
    *strides, last = x.stride()[-4:]
    if last != 1 or x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides):
        return False
    return all(strides) or not x.numel()  # those of what is never read may be 0


def supports(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why these tensors cannot take this path, or "" if they can. It knows no softcap, ALiBi or dropout."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}, it takes {', '.join(map(str, DTYPES))}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dim {q.shape[-1]}, it takes multiples of 8 up to 256"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not takes_tma(x):
            return f"{name} with strides {x.stride()}, it takes a dense last dim and 16-byte aligned others"
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] > 1 and x.stride(0) != x.shape[2] * x.stride(2):
            return f"{name} whose pieces do not follow each other token by token"
        if x.shape[1] > 1 and x.stride(1) % x.stride(2):
            return f"{name} whose batch stride is no multiple of its token stride"
    if k.shape[1] > 1 and k.stride(1) * v.stride(2) != v.stride(1) * k.stride(2):
        return "k and v with different numbers of tokens between batch entries"
    return ""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor | None,
    table: DeviceTable,
    *,
    scale: float,
    sinks: Tensor | None = None,
    flags: Flags | None = None,
    settings: Settings | None = None,
) -> None:
    """Walks a query-major table in one launch, as `ring_core.backend.Backend.forward` describes.

    Args:
        q, out: (B, Sq, Hq, D), fp16 or bf16. k, v: (C, B, S, Hkv, D). lse: (B, Hq, Sq) fp32. state: (B, Sq, Hq, D)
            fp32, or None where every strip begins and ends in this table. q, k, v whose strides TMA does not take are
            copied.
        scale: of the scores, positive.
        sinks: (Hq,), one more logit a head.
        flags: arrival of the pieces; a piece's keys are read once its flag says so.
        settings: instead of those for this head dim.
    """
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = sinks.float()
    device = q.get_device()
    key = (
        q.shape,
        k.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        lse.stride(),
        None if state is None else state.stride(),
        sinks is None,
        flags is None,
        scale,
        settings,
        tuned.serial(),
        q.dtype,
        device,
    )
    known = launches_of(table, "hopper forward").get(key)
    q_at, k_at, v_at, out_at, lse_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()
    state_at = 0 if state is None else state.data_ptr()
    sinks_at = 0 if sinks is None else sinks.data_ptr()
    if (
        known is None or (q_at | k_at | v_at | out_at | lse_at | state_at | sinks_at) & 15
    ):  # `aligned`, but for its call
        _forward(q, k, v, out, lse, state, table, scale, sinks, flags, settings, key)
        return
    stream = current_stream()(device)
    _zero, counter = _counter(q, stream)  # the former is held until the launch
    flags_at, epoch_at = (0, 0) if flags is None else (flags.values.data_ptr(), flags.epoch.data_ptr())
    known(
        stream,
        (out_at, lse_at, state_at, sinks_at, *known.note, counter, flags_at, epoch_at),
        (q_at, k_at, v_at, state_at or q_at, out_at),
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor | None,
    table: DeviceTable,
    scale: float,
    sinks: Tensor | None,
    flags: Flags | None,
    settings: Settings | None,
    key: Any,
) -> None:
    """`forward` by way of Triton, which compiles what it has not seen."""
    if scale <= 0:
        raise ValueError(f"scale is {scale}; the Hopper kernels take the largest score first and need it positive")
    if supports(q, k, v):
        q, k, v = q.clone(memory_format=torch.contiguous_format), dense_keys(k), dense_keys(v)
        if reason := supports(q, k, v):
            raise ValueError(f"the Hopper kernels do not take {reason}")
        forward(q, k, v, out, lse, state, table, scale=scale, sinks=sinks, flags=flags, settings=settings)
        return
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[3]
    chosen = settings or _settings_of(q, table)
    prepared = prepare(table, batch, k.shape[2], chosen.block)
    if not prepared.whole and state is None:
        raise ValueError("strips begin or end outside this table, but there is no state")
    head_batches = prepared.repeats * num_heads
    total = prepared.count * head_batches
    if not total:
        return
    repeatable = bool(k.numel())
    if not k.numel():  # nobody sees anything; a descriptor still wants an address
        k = v = q[None]
    group = num_heads // num_kv_heads
    keys = max(1, k.shape[0] * k.shape[2])
    section = min(head_batches, group * max(1, L2_BYTES // (keys * head_dim * 2 * k.element_size())))
    grid = (min(total, processors(q.device)),)
    dummy = prepared.items
    continued = state is not None and not prepared.whole
    ahead = continued and state is not None and padded_head_dim(head_dim) <= WIDEST_AHEAD and takes_tma(state)
    queries = query_buffers(head_dim, chosen, ahead)
    out_tma = queries > 1 and takes_tma(out)
    arguments = (
        rows_descriptor(q),
        keys_descriptor(k, chosen.block),
        keys_descriptor(v, chosen.block),
        rows_descriptor(state if ahead and state is not None else q),
        rows_descriptor(out if out_tma else q),
        out,
        lse,
        dummy if state is None else state,
        dummy if sinks is None else sinks,
        prepared.items,
        prepared.walk,
        _counter(q, current_stream()(q.get_device()))[0],
        dummy if flags is None else flags.values,
        dummy if flags is None else flags.epoch,
        scale * math.log2(math.e),
        prepared.count,
        section,
        num_heads,
        head_batches,
        total,
        group,
        k.stride(1) // k.stride(2) if k.shape[1] > 1 else 0,
        POLLS,
        *out.stride()[:3],
        lse.stride(0),
        lse.stride(1),
        *((0, 0, 0) if state is None else state.stride()[:3]),
    )
    kernel = forward_kernel[grid](
        *arguments,
        BLOCK=chosen.block,
        D=padded_head_dim(head_dim),
        HEAD_DIM=head_dim,
        STAGES=chosen.stages,
        QUERIES=queries,
        STATE=continued,
        AHEAD=ahead,
        OUT_TMA=out_tma,
        SINKS=sinks is not None,
        FLAGS=flags is not None,
        PING_PONG=chosen.ping_pong,
        OVERLAP=chosen.overlap,
        CONSUMERS=CONSUMERS,
        REGISTERS=chosen.registers,
        num_warps=4,
        maxnreg=168,  # 65536 registers over three warpgroups; setmaxnreg then moves them to the consumers
        enable_fp_fusion=True,  # off by default from triton 3.10 on
    )
    looked_at = (out, lse, *(x for x in (state, sinks) if x is not None))
    if repeatable and aligned(*(x.data_ptr() for x in looked_at)):
        launches = launches_of(table, "hopper forward")
        launches.add(key, kernel, grid, arguments, (prepared.items.data_ptr(), prepared.walk.data_ptr()))


def _settings_of(q: Tensor, table: DeviceTable) -> Settings:
    head_dim = q.shape[-1]
    place = tuned.Place("hopper forward", padded_head_dim(head_dim), tuned.mask_of(table.host), 16)
    found = tuned.lookup(place, table.device)
    return settings_for(head_dim) if found is None else Settings(**found)


def dense_keys(x: Tensor) -> Tensor:
    """k or v (C, B, S, H, D) with all tokens of a batch entry one after the other."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def prepare(table: DeviceTable, batch: int, piece_length: int, block: int) -> Prepared:
    """The table's schedule on its device, made once and kept with the table."""
    key = ("hopper", str(table.device), batch, piece_length, block)
    known = table.host.cache.get(key)
    if known is None:
        schedule = make_schedule(table.host, tile_rows=TILE_ROWS, block=block, piece_length=piece_length)
        repeats = batch if schedule.every_batch else 1
        items = schedule.items if schedule.every_batch else schedule.for_batch(batch)
        walk = schedule.walk if len(schedule.walk) else np.zeros((1, schedule.walk.shape[1]), dtype=np.int32)
        known = table.host.cache[key] = Prepared(
            torch.from_numpy(with_first_walk(items, walk)).to(table.device),
            len(items),
            torch.from_numpy(walk).to(table.device),
            repeats,
            all(strip[0].flags & FIRST and strip[-1].flags & LAST for strip in table.host.grouped),
        )
    prepared: Prepared = known
    return prepared


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a descriptor needs of a tensor, without keeping it alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


def rows_descriptor(q: Tensor) -> TensorDescriptor:
    """q (B, Sq, Hq, D) as (B, Hq, Sq, D) in boxes of 64 rows; rows past the end are zeros."""
    return _rows_descriptor(_Memory(q.data_ptr(), q.dtype), q.shape, q.stride())


def keys_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """k or v (C, B, S, H, D) as rows token by token whose bounds each load names: (far, end, H, key, D).

    Loading at (FAR, end, h, FAR - length + j, 0) reads row end - length + j, or zeros from j = length on: that
    coordinate is then past its bound. The first one's stride takes the address back by FAR rows, in 64-bit wraparound
    (as `triton.tools.ragged_tma` does).
    """
    return _keys_descriptor(_Memory(x.data_ptr(), x.dtype), x.shape[3], x.shape[4], x.stride(2), x.stride(3), block)


@lru_cache(maxsize=512)
def _rows_descriptor(base: _Memory, shape: torch.Size, strides: tuple[int, ...]) -> TensorDescriptor:
    (b, s, h, d), (stride_b, stride_s, stride_h, _) = shape, strides
    box = [1, 1, 64, padded_head_dim(d)]
    return TensorDescriptor(base, [b, h, s, d], [stride_b, stride_h, stride_s, 1], box, _layout(box, base.dtype))


@lru_cache(maxsize=512)
def _keys_descriptor(base: _Memory, heads: int, d: int, row: int, head: int, block: int) -> TensorDescriptor:
    box = [1, 1, 1, block, padded_head_dim(d)]
    shape, strides = [BOUNDLESS, BOUNDLESS, heads, FAR, d], [(1 << 34) - row, row, head, row, 1]
    return TensorDescriptor(base, shape, strides, box, _layout(box, base.dtype))


@cache
def _shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), GLUON_DTYPES[dtype])


def _layout(box: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return _shared_layout(tuple(box), dtype)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], tuple[Tensor, int]] = {}


def _counter(q: Tensor, stream: int) -> tuple[Tensor, int]:
    """A zero that a kernel leaves zero, and its address: one that those of a stream of q's GPU share. In a CUDA graph,
    which may be replayed on any stream, each has its own."""
    if torch.cuda.is_current_stream_capturing():
        zero = torch.zeros(1, dtype=torch.int32, device=q.device)
        return zero, zero.data_ptr()
    key = q.get_device(), stream
    found = _counters.get(key)
    if found is None:
        zero = torch.zeros(1, dtype=torch.int32, device=q.device)
        found = _counters[key] = zero, zero.data_ptr()
    return found
