"""Launches the Hopper forward: descriptors, schedule, counters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from ring_core.backend import DeviceTable, Flags
from ring_core.segment import FIRST, LAST
from torch import Tensor
from triton.experimental.gluon import language as gl

from ring_triton.hopper.compat import TensorDescriptor
from ring_triton.hopper.kernel import forward_kernel
from ring_triton.hopper.schedule import make_schedule
from ring_triton.hopper.settings import CONSUMERS, TILE_ROWS, Settings, padded_head_dim, settings_for

L2_BYTES = 32 << 20
"""Keys and values that concurrent tiles should share in L2 (50 MB on an H100 or H200, also used by everything else)."""
POLLS = 1 << 24
"""Looks at an arrival flag before a wait ends by itself: about ten seconds."""
FAR, BOUNDLESS = 1 << 30, 0x7FFF0000
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table's schedule on a device, for one batch size."""

    items: Tensor  # (N, 8) int32
    walk: Tensor  # (M, 12) int32
    repeats: int  # batch entries that all items are about
    whole: bool  # every strip begins and ends in this table


def supports(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why these tensors cannot take this path, or "" if they can. It knows no softcap, ALiBi, dropout or sinks."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}, it takes {', '.join(map(str, DTYPES))}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dim {q.shape[-1]}, it takes multiples of 8 up to 256"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride * 2 % 16 for stride in x.stride()[:-1]):
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
    flags: Flags | None = None,
    settings: Settings | None = None,
) -> None:
    """Walks a query-major table in one launch, as `ring_core.backend.Backend.forward` describes.

    Args:
        q, out: (B, Sq, Hq, D), fp16 or bf16. k, v: (C, B, S, Hkv, D). lse: (B, Hq, Sq) fp32. state: (B, Sq, Hq, D)
            fp32, or None where every strip begins and ends in this table.
        scale: of the scores, positive.
        flags: arrival of the pieces; a piece's keys are read once its flag says so.
        settings: instead of those for this head dim.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}; the Hopper kernels take the largest score first and need it positive")
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[3]
    chosen = settings or settings_for(head_dim)
    prepared = prepare(table, batch, k.shape[2], chosen.block)
    if not prepared.whole and state is None:
        raise ValueError("strips begin or end outside this table, but there is no state")
    head_batches = prepared.repeats * num_heads
    total = len(prepared.items) * head_batches
    if not total:
        return
    group = num_heads // num_kv_heads
    keys = max(1, k.shape[0] * k.shape[2])
    section = min(head_batches, group * max(1, L2_BYTES // (keys * head_dim * 2 * k.element_size())))
    grid = min(total, _processors(q.device)) if chosen.persistent else total
    dummy = prepared.items
    launch_args = (
        _rows_descriptor(q),
        _keys_descriptor(k, chosen.block),
        _keys_descriptor(v, chosen.block),
        out,
        lse,
        dummy if state is None else state,
        prepared.items,
        prepared.walk,
        _counter(q.device) if chosen.dynamic and chosen.persistent else dummy,
        dummy if flags is None else flags.values,
        dummy if flags is None else flags.epoch,
        scale * math.log2(math.e),
        len(prepared.items),
        section,
        num_heads,
        head_batches,
        total,
        group,
        k.stride(1) // k.stride(2) if k.shape[1] > 1 else 0,
        POLLS,
        *_strides(out),
        lse.stride(0),
        lse.stride(1),
        *((0, 0, 0) if state is None else _strides(state)),
    )
    forward_kernel[(grid,)](
        *launch_args,
        BLOCK=chosen.block,
        D=padded_head_dim(head_dim),
        HEAD_DIM=head_dim,
        STAGES=chosen.stages,
        STATE=state is not None and not prepared.whole,
        FLAGS=flags is not None,
        DYNAMIC=chosen.dynamic and chosen.persistent,
        PING_PONG=chosen.ping_pong,
        OVERLAP=chosen.overlap,
        CONSUMERS=CONSUMERS,
        REGISTERS=chosen.registers,
        num_warps=4,
        maxnreg=168,  # 65536 registers over three warpgroups; setmaxnreg then moves them to the consumers
    )


def prepare(table: DeviceTable, batch: int, piece_length: int, block: int) -> Prepared:
    """The table's schedule on its device, made once and kept with the table."""
    key = ("hopper", str(table.device), batch, piece_length, block)
    known = table.host.cache.get(key)
    if known is None:
        schedule = make_schedule(table.host, tile_rows=TILE_ROWS, block=block, piece_length=piece_length)
        repeats = batch if schedule.every_batch else 1
        items = schedule.items if schedule.every_batch else schedule.for_batch(batch)
        walk = schedule.walk if len(schedule.walk) else schedule.walk.repeat(0, axis=0).resize((1, 12))
        known = table.host.cache[key] = Prepared(
            torch.from_numpy(items).to(table.device),
            torch.from_numpy(walk).to(table.device),
            repeats,
            all(strip[0].flags & FIRST and strip[-1].flags & LAST for strip in table.host.grouped),
        )
    prepared: Prepared = known
    return prepared


def _rows_descriptor(q: Tensor) -> TensorDescriptor:
    """q (B, Sq, Hq, D) as (B, Hq, Sq, D) in boxes of 64 rows; rows past the end are zeros."""
    box = [1, 1, 64, padded_head_dim(q.shape[-1])]
    b, s, h, d = q.shape
    return TensorDescriptor(q, [b, h, s, d], [q.stride(0), q.stride(2), q.stride(1), 1], box, _layout(box, q.dtype))


def _keys_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """k or v (C, B, S, H, D) as rows token by token whose bounds each load names: (far, end, H, key, D).

    Loading at (FAR, end, h, FAR - length + j, 0) reads row end - length + j, or zeros from j = length on: the last
    coordinate is then past its bound. The first one's stride takes the address back by FAR rows, in 64-bit wraparound
    (as `triton.tools.ragged_tma` does).
    """
    row = x.stride(2)
    box = [1, 1, 1, block, padded_head_dim(x.shape[-1])]
    shape = [BOUNDLESS, BOUNDLESS, x.shape[3], FAR, x.shape[4]]
    return TensorDescriptor(x, shape, [(1 << 34) - row, row, x.stride(3), row, 1], box, _layout(box, x.dtype))


@cache
def _shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.float16 if dtype == torch.float16 else gl.bfloat16)


def _layout(box: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return _shared_layout(tuple(box), dtype)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch entry, token and head in (B, S, H, D)."""
    return x.stride(0), x.stride(1), x.stride(2)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """A zero that kernels of the current stream share: each leaves it zero."""
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]
