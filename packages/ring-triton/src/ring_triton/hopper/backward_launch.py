"""Launches the Hopper backward: descriptors, schedule, what lives from `prepare` to `finish`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from ring_core.backend import DeviceTable, Flags, Params, departures_of
from ring_core.direct import Launches, addresses, aligned, current_stream, launches_of, shaped
from ring_core.key_tiles import make_schedule
from ring_triton import tuned
from ring_triton.hopper.backward import backward_kernel
from ring_triton.hopper.backward_ends import finish_kernel, prepare_kernel
from ring_triton.hopper.backward_settings import (
    BACKWARD,
    TILE_KEYS,
    BackwardSettings,
    backward_head_dim,
    backward_settings_for,
)
from ring_triton.hopper.compat import TensorDescriptor
from ring_triton.hopper.launch import BOUNDLESS, DTYPES, FAR, L2_BYTES, POLLS, dense_keys, keys_descriptor, processors
from ring_triton.portable import launch as portable
from ring_triton.portable.gradient_sinks import gradient_sinks_kernel

PRODUCER_REGISTERS = 24
"""Per thread of the producer; the consumers have what is left of 504 a lane of three warpgroups: 240."""
ELEMENTS = 8192
"""Of a tile of `prepare` and `finish`."""
LOG2E = math.log2(math.e)
_prepared, _finished = Launches(), Launches()


@dataclass
class BackwardState:
    """What lives from `prepare` to `finish`."""

    copies: Tensor  # (2, 4, at least B Hq Sq) fp32: delta and scaled_lse, as TMA can read them from any row on
    delta: Tensor  # (B, Hq, Sq) fp32, in copy 0
    scaled_lse: Tensor  # (B, Hq, Sq) fp32, times log2(e), +inf where a row has seen nothing; in copy 0
    sums: Tensor | None  # (B, Hq, Sq, D) fp32: dq before it is scaled
    dtype: torch.dtype
    dout: Tensor | None  # (B, Sq, Hq, D): instead of a dout that TMA cannot read
    ordered: portable.BackwardState | None  # dq in a fixed order, by a kernel of its own
    descriptors: dict[int, tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None]] = field(
        default_factory=dict
    )
    """For blocks of so many queries: of scaled_lse, delta, sums."""


class _Call(NamedTuple):
    """What one launch is about: the arguments of `backward`, dout as TMA can read it."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dk: Tensor
    dv: Tensor
    table: DeviceTable
    params: Params
    flags: Flags | None
    departures: Tensor | None
    settings: BackwardSettings | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table's schedule on a device, for one batch size."""

    items: Tensor  # (N, 8) int32
    count: int
    walk: Tensor  # (M, 12) int32
    repeats: int  # batch entries that all items are about
    keys: int  # in tiles that some query sees, of all batch entries
    section: Callable[[int, int, int], int]  # `Schedule.section`


def backward_supports(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> str:
    """Why these tensors cannot take this path, or "" if they can. It knows no softcap, ALiBi or dropout."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}, it takes {', '.join(map(str, DTYPES))}"
    if q.shape[-1] % 8 or q.shape[-1] > max(BACKWARD):
        return f"head dim {q.shape[-1]}, it takes multiples of 8 up to {max(BACKWARD)}"
    for name, x in (("q", q[None]), ("k", k), ("v", v)):
        if why := _unreadable(x):
            return f"{name} {why}"
    if k.shape[1] > 1 and k.stride(1) * v.stride(2) != v.stride(1) * k.stride(2):
        return "k and v with different numbers of tokens between batch entries"
    if math.prod(q.shape[:3]) * 4 >= 1 << 31:
        return f"{math.prod(q.shape[:3])} rows of q, it counts four copies of each in 32 bits"
    for name, x in (("dk", dk), ("dv", dv)):
        if x.dtype not in (torch.float32, q.dtype) or x.stride(-1) != 1:
            return f"{name} of {x.dtype} with strides {x.stride()}, it takes fp32 or q's with a dense last dim"
    return ""


def _unreadable(x: Tensor) -> str:
    """Why TMA cannot read (C, B, S, H, D) as rows token by token, or ""."""
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride * 2 % 16 or not stride for stride in x.stride()[1:-1]):
        return f"with strides {x.stride()}, it takes a dense last dim and 16-byte aligned others"
    if x.shape[0] > 1 and x.stride(0) != x.shape[2] * x.stride(2):
        return "whose pieces do not follow each other token by token"
    if x.shape[1] > 1 and x.stride(1) % x.stride(2):
        return "whose batch stride is no multiple of its token stride"
    return ""


def prepare(
    q: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, *, deterministic: bool = False
) -> BackwardState:
    """See `ring_core.backend.Backend.prepare`."""
    batch, length, num_heads, head_dim = q.shape
    shape, count = (batch, num_heads, length), q.numel() // max(1, head_dim)
    copies = torch.empty(2, 4, -(-count // 4) * 4, dtype=torch.float32, device=q.device)  # each 16-byte aligned
    delta, scaled_lse = (x[0, :count].view(shape) for x in copies)
    sums, ordered = None, None
    if deterministic:
        memory = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        ordered = portable.BackwardState(delta, scaled_lse, memory, q.dtype)
    else:
        sums = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)  # zeroed by the kernel below
    state = BackwardState(
        copies, delta, scaled_lse, sums, q.dtype, dout.contiguous() if _unreadable(dout[None]) else None, ordered
    )
    if not q.numel():
        return state
    width = triton.next_power_of_2(head_dim)
    rows = ELEMENTS // width
    given = lse if dlse is None else dlse
    tensors = (out, dout, lse, given, delta, scaled_lse, delta if sums is None else sums)
    key = shaped(*tensors), dlse is None, sums is None, q.get_device()
    if _prepared.again(key, q.get_device(), addresses(*tensors), ()):
        return state
    grid = (triton.cdiv(length, rows), num_heads, batch)
    arguments = (
        *tensors,
        *out.stride()[:3],
        *dout.stride()[:3],
        *lse.stride()[:2],
        *given.stride(),
        length,
        count,
        copies.shape[-1],
    )
    kernel = prepare_kernel[grid](
        *arguments, ROWS=rows, D=head_dim, WIDTH=width, DLSE=dlse is not None, SUMS=sums is not None, num_warps=4
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
    *,
    params: Params,
    flags: Flags | None = None,
    departures: Tensor | None = None,
    settings: BackwardSettings | None = None,
) -> None:
    """Walks a key-major table in one launch (two if deterministic), as `ring_core.backend.Backend.backward` describes.

    Args:
        state: of `prepare`.
        q, dout: (B, Sq, Hq, D), fp16 or bf16. k, v: (C, B, S, Hkv, D). dk, dv: shaped as k, fp32, added to, or in q's
            dtype, written: see `ring_core.backend.Capabilities.final_gradients`.
        params: the scale; deterministic as it was for `prepare`.
        flags: arrival of the pieces; a piece's keys are read once its flag says so.
        departures: (C,) int32: the keys of each finished tile are added, for every key head and batch entry of its
            piece: see `ring_core.backend.departures_of`.
        settings: instead of those for this head dim.
    """
    final = None if dk.dtype == torch.float32 else (dk, dv)
    if final is not None:
        assert flags is None and departures is None, "final gradients are those of keys that stay"
        dk, dv = _where_final(state, q, dk, dv, table, settings)
    if q.numel() and len(table.host):
        dout = dout if state.dout is None else state.dout
        _launch(state, _Call(q, k, v, dout, dk, dv, table, params, flags, departures, settings))
    if final is not None and dk is not final[0]:
        final[0].copy_(dk)
        final[1].copy_(dv)


def _where_final(
    state: BackwardState,
    q: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: DeviceTable,
    settings: BackwardSettings | None,
) -> tuple[Tensor, Tensor]:
    """What the kernel is given for final dk and dv: these, zeroed first where it does not write all of them; or zeros
    in fp32, where several programs have a part of each, which are calls too small for the GPU."""
    ordered, device = state.ordered is not None, q.get_device()
    key = ("hopper final", device, q.shape, dk.shape, ordered, settings, tuned.serial())
    known: tuple[bool, bool] | None = table.host.cache.get(key)
    if known is None:
        dealt_out = written = False
        if q.numel() and len(table.host):
            chosen = settings or _settings_of(q, table, ordered)
            prepared = schedule_for(table, q.shape[0], chosen.block, chosen.by_piece)
            dealt_out = _parts(prepared, q, dk.shape[3], whole=ordered) > 1
            written = prepared.keys == math.prod(dk.shape[:3])
        known = table.host.cache[key] = dealt_out, written
    dealt_out, written = known
    if dealt_out:
        sums = torch.zeros((2, *dk.shape), dtype=torch.float32, device=dk.device)
        return sums[0], sums[1]
    if not written:
        dk.zero_()
        dv.zero_()
    return dk, dv


def _launch(state: BackwardState, call: _Call) -> None:
    """By the driver alone where the same has been launched before."""
    *tensors, table, params, flags, departures, settings = call
    q, k, v, dout, dk, dv = tensors
    kind = flags is None, departures is None, state.ordered is None, tuned.serial()
    key = shaped(*tensors), params.scale, kind, settings, q.get_device()
    launches = launches_of(table, "hopper backward")
    sums = state.delta if state.sums is None else state.sums
    read = addresses(q, k, v, dout, state.scaled_lse, state.delta, sums)
    known = launches.get(key)
    if known is None or not aligned(*read, *addresses(dk, dv)):
        _launch_by_triton(state, call, key)
    else:
        waits = (0, 0) if flags is None else addresses(flags.values, flags.epoch)
        counts = 0 if departures is None else departures.data_ptr()
        stream = current_stream()(q.get_device())
        known(stream, (*addresses(dk, dv), *known.note, *waits, counts), read)
    if state.ordered is not None:
        portable.launch_gradients_q(state.ordered, q, k, v, dout, table, params, portable.scores_of(params, q))


def _launch_by_triton(state: BackwardState, call: _Call, key: Any) -> None:
    """The same by way of Triton, which compiles what it has not seen."""
    q, k, v, dout, dk, dv, table, params, flags, departures, settings = call
    dense = not backward_supports(q, k, v, dk, dv)
    if not dense:
        q, k, v = q.clone(memory_format=torch.contiguous_format), dense_keys(k), dense_keys(v)
        if reason := backward_supports(q, k, v, dk, dv):
            raise ValueError(f"the Hopper kernels do not take {reason}")
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[3]
    ordered = state.ordered is not None
    chosen = settings or _settings_of(q, table, ordered)
    by_piece = chosen.by_piece or flags is not None or departures is not None
    prepared = schedule_for(table, batch, chosen.block, by_piece)
    group = num_heads // num_kv_heads
    programs = prepared.count * prepared.repeats * num_kv_heads
    if not programs:
        return
    split = _parts(prepared, q, num_kv_heads, whole=ordered or departures is not None)
    head_batches = prepared.repeats * num_kv_heads * split
    members = group // split
    resident = max(1, L2_BYTES // (members * length * head_dim * 8))
    section = prepared.section(head_batches, resident, processors(q.device))
    lse_desc, delta_desc, dq_desc = _descriptors(state, chosen.block)
    dummy = prepared.items
    grid = (programs * split,)
    arguments = (
        keys_descriptor(q[None], chosen.block),
        keys_descriptor(k, TILE_KEYS),
        keys_descriptor(v, TILE_KEYS),
        keys_descriptor(dout[None], chosen.block),
        lse_desc,
        delta_desc,
        delta_desc if dq_desc is None else dq_desc,
        dk,
        dv,
        prepared.items,
        prepared.walk,
        dummy if flags is None else flags.values,
        dummy if flags is None else flags.epoch,
        dummy if departures is None else departures,
        params.scale * LOG2E,
        params.scale,
        prepared.count,
        section,
        num_kv_heads,
        head_batches,
        split,
        members,
        group,
        k.shape[2],
        *(x.stride(-4) // x.stride(-3) if batch > 1 else 0 for x in (q, dout, k)),
        length,
        state.copies.shape[-1],
        POLLS,
        *dk.stride()[:4],
        *dv.stride()[:4],
    )
    kernel = backward_kernel[grid](
        *arguments,
        KEYS=TILE_KEYS,
        ROWS=chosen.block,
        D=backward_head_dim(head_dim),
        HEAD_DIM=head_dim,
        Q_STAGES=chosen.q_stages,
        DO_STAGES=chosen.do_stages,
        DQ=not ordered,
        SWAP=chosen.swap,
        ORDER=chosen.order,
        PACKED=chosen.packed,
        ATOMIC=split > 1,
        FLAGS=flags is not None,
        DEPARTURES=departures is not None,
        REGISTERS=PRODUCER_REGISTERS,
        num_warps=8,
        maxnreg=168,  # 65536 registers over three warpgroups; setmaxnreg then moves them to the consumers
        enable_fp_fusion=True,  # off by default from triton 3.10 on
    )
    if dense and aligned(*addresses(dk, dv)):
        launches = launches_of(table, "hopper backward")
        launches.add(key, kernel, grid, arguments, addresses(prepared.items, prepared.walk))


def _settings_of(q: Tensor, table: DeviceTable, ordered: bool) -> BackwardSettings:
    head_dim = q.shape[-1]
    place = tuned.Place("hopper backward", backward_head_dim(head_dim), tuned.mask_of(table.host), 16)
    found = None if ordered else tuned.lookup(place, table.device)
    return backward_settings_for(head_dim, ordered=ordered) if found is None else BackwardSettings(**found)


def finish(state: BackwardState, *, params: Params) -> tuple[Tensor, Tensor | None]:
    """See `ring_core.backend.Backend.finish`."""
    if state.ordered is not None:
        return portable.finish(state.ordered, params)
    batch, num_heads, length = state.delta.shape
    sums = state.sums
    assert sums is not None
    head_dim = sums.shape[-1]
    dq = torch.empty((batch, length, num_heads, head_dim), dtype=state.dtype, device=sums.device)
    if dq.numel():
        width = triton.next_power_of_2(head_dim)
        rows = ELEMENTS // width
        grid = (triton.cdiv(length, rows), num_heads, batch)
        key = shaped(sums, dq), params.scale, sums.get_device()
        if not _finished.again(key, sums.get_device(), addresses(sums, dq), ()):
            arguments = (sums, dq, params.scale, *dq.stride()[:3], length)
            kernel = finish_kernel[grid](*arguments, ROWS=rows, D=head_dim, WIDTH=width, num_warps=4)
            if aligned(*addresses(sums, dq)):
                _finished.add(key, kernel, grid, arguments, ())
    if params.sinks is None:
        return dq, None
    dsinks = torch.zeros_like(params.sinks)
    if state.delta.numel():
        gradient_sinks_kernel[(num_heads,)](
            dsinks,
            params.sinks,
            state.scaled_lse,
            state.delta,
            length,
            batch,
            BLOCK=1024,
            ACC=gl.float32,
            UNIT=LOG2E,
            num_warps=4,
        )
    return dq, dsinks


def departure_targets(table: DeviceTable, batch: int, num_kv_heads: int, pieces: int) -> list[int]:
    """What `backward` adds to each piece's departure counter for this table."""
    return list(departures_of(table.host, pieces, batch, num_kv_heads))


def schedule_for(table: DeviceTable, batch: int, block: int, by_piece: bool) -> Prepared:
    """The table's schedule on its device, made once and kept with the table."""
    key = ("hopper backward", str(table.device), batch, block, by_piece)
    known = table.host.cache.get(key)
    if known is None:
        schedule = make_schedule(table.host, tile_keys=TILE_KEYS, block=block, by_piece=by_piece)
        items = schedule.items if schedule.every_batch else schedule.for_batch(batch)
        walk = schedule.walk if len(schedule.walk) else np.zeros((1, schedule.walk.shape[1]), dtype=np.int32)
        known = table.host.cache[key] = Prepared(
            torch.from_numpy(items).to(table.device),
            len(items),
            torch.from_numpy(walk).to(table.device),
            batch if schedule.every_batch else 1,
            schedule.seen_keys(batch),
            schedule.section,
        )
    prepared: Prepared = known
    return prepared


def _parts(prepared: Prepared, q: Tensor, num_kv_heads: int, *, whole: bool) -> int:
    """How many programs share a tile of keys of a key head; whole: it must be one."""
    programs = prepared.count * prepared.repeats * num_kv_heads
    return 1 if whole else _split(q.shape[2] // num_kv_heads, programs, q.device)


def _split(group: int, programs: int, device: torch.device) -> int:
    """Into how many parts a group's query heads are dealt out, so that there are two programs for each processor."""
    wanted = 2 * processors(device)
    return next((n for n in range(1, group) if group % n == 0 and programs * n >= wanted), group)


def _descriptors(
    state: BackwardState, block: int
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None]:
    if block not in state.descriptors:
        flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
        delta, lse = (TensorDescriptor(x, [x.numel()], [1], [block], flat) for x in state.copies.flatten(1))
        sums = None
        if state.sums is not None:
            row = state.sums.shape[-1]
            box = [1, 1, block, backward_head_dim(row)]
            layout = gl.NVMMASharedLayout.get_default_for(box, gl.float32)
            shape, strides = [BOUNDLESS, BOUNDLESS, FAR, row], [(1 << 34) - row, row, row, 1]
            sums = TensorDescriptor(state.sums, shape, strides, box, layout)
        state.descriptors[block] = lse, delta, sums
    return state.descriptors[block]
