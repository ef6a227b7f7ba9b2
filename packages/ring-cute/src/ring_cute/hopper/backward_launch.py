"""Launches the backward: schedule, counters, numbers, what lives from `prepare` to `finish`. Imports no DSL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ring_core.backend import DeviceTable, Flags, Params
from ring_core.key_tiles import ITEM, make_schedule
from ring_cute import library
from ring_cute.hopper.backward_order import stretches_of, turns_of
from ring_cute.hopper.backward_settings import (
    BACKWARD,
    BackwardKind,
    BackwardSettings,
    EndsKind,
    backward_settings_for,
    senders_of,
    tile_keys_of,
)
from ring_cute.hopper.launch import (
    DTYPES,
    L2_BYTES,
    LOG2E,
    POLLS,
    _counter,
    _processors,
    dense_keys,
    dense_slopes,
    score_scale,
    terms_of,
)
from ring_cute.launches import Given, Launches, LaunchesByKind, current_stream, function_of

SECTION_BYTES = 10 * L2_BYTES
"""Rows of Q, dO and dq that a section's longest tiles walk, as far as parts of groups can keep to it. With eight query
heads a key head a causal mask's sections walk 537 MB, of which the L2 holds too little: at 16384 tokens 17.5 GB are
read from memory, in two parts 5.4, in four 2.9 (ncu). The whole backward was 2 to 6 % faster in two parts, 4 to 7 in
four, from 4096 to 32768 tokens. With four heads, 268 MB undivided, it was 2 to 3 % slower in parts, and so it was with
full masks of 4096 tokens. H200, 2026-11-29."""
ROWS = 0x7FFF0000
"""Rows of dq that 32-bit coordinates reach."""


@dataclass(slots=True)
class BackwardState:
    """What lives from `prepare` to `finish`: for each row of q delta, lse times log2(e) (+inf where a row has seen
    nothing), and dq before it is scaled, one after the other in one piece of memory."""

    memory: Tensor  # (2 * pitch + rows * D,) fp32
    pitch: int  # numbers from delta to lse and from lse to the sums, a multiple of 4, so that these are aligned
    shape: tuple[int, ...]  # (B, Sq, Hq, D)
    dout: Tensor  # (B, Sq, Hq, D): that of `prepare`, or a copy of one that TMA cannot read

    def _part(self, start: int, *shape: int) -> Tensor:
        return self.memory[start : start + math.prod(shape)].view(shape)

    @property
    def delta(self) -> Tensor:
        """(B, Hq, Sq)."""
        batch, length, heads, _ = self.shape
        return self._part(0, batch, heads, length)

    @property
    def scaled_lse(self) -> Tensor:
        """(B, Hq, Sq)."""
        batch, length, heads, _ = self.shape
        return self._part(self.pitch, batch, heads, length)

    @property
    def sums(self) -> Tensor:
        """(B, Hq, Sq, D)."""
        batch, length, heads, head_dim = self.shape
        return self._part(2 * self.pitch, batch, heads, length, head_dim)


@dataclass(frozen=True, slots=True)
class PreparedKeys:
    """A table's schedule on a device, for one batch size."""

    items: Tensor  # (N, 8) int32
    count: int
    walk: Tensor  # (M, 12) int32
    repeats: int  # batch entries that all items are about
    keys: int  # in tiles that some query sees, of all batch entries
    longest: int  # rows that a tile walks, of each query head
    section: Callable[[int, int, int], int]  # `Schedule.section`
    turns: Tensor | None  # (V, 2) int32: `backward_order.turns_of`


def backward_supports(q: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> str:
    """Why these tensors cannot take this path, or "" if they can."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}, it takes {', '.join(map(str, DTYPES))}"
    if q.shape[-1] % 8 or q.shape[-1] > max(BACKWARD):
        return f"head dim {q.shape[-1]}, it takes multiples of 8 up to {max(BACKWARD)}"
    for name, x in (("q", q[None]), ("k", k), ("v", v)):
        if why := _unreadable(x):
            return f"{name} {why}"
    if k.shape[1] > 1 and k.stride(1) * v.stride(2) != v.stride(1) * k.stride(2):
        return "k and v with different numbers of tokens between batch entries"
    if math.prod(q.shape[:3]) > ROWS:
        return f"{math.prod(q.shape[:3])} rows of q, it counts them in 32 bits"
    for name, x in (("dk", dk), ("dv", dv)):
        if x.dtype not in (torch.float32, q.dtype) or x.stride(-1) != 1:
            return f"{name} of {x.dtype} with strides {x.stride()}, it takes fp32 or q's with a dense last dim"
        if any(stride % 2 for stride in x.stride()[:-1]) or x.data_ptr() % (2 * x.element_size()):
            return f"{name} with strides {x.stride()}, whose rows it writes in pairs"
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


_prepared: dict[torch.Size, tuple[tuple[int, ...], int, int, Launches]] = {}
"""By the shape of q: that as a plain tuple, of which tensors are made faster, numbers in a state's memory, its pitch,
what has been launched."""
_finished: dict[Any, tuple[Any, tuple[float, ...]]] = {}
REMEMBERED = 1024
"""Shapes that are remembered: those of documents may come once and never again."""


def prepare(q: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> BackwardState:
    """See `ring_core.backend.Backend.prepare`."""
    shape, device = q.shape, q.get_device()
    known = _prepared.get(shape)
    if known is None:
        if len(_prepared) == REMEMBERED:
            _prepared.clear()
        pitch = -(-math.prod(shape[:3]) // 4) * 4
        known = _prepared[shape] = (tuple(shape), 2 * pitch + q.numel(), pitch, Launches())
    plain, size, pitch, launches = known
    memory = lse.new_empty(size)
    start = memory.data_ptr()
    state = BackwardState(memory, pitch, plain, dout)
    given = (out, dout, lse, dlse, start, start + 4 * pitch, start + 8 * pitch, current_stream(device))
    if launches(*given) or not size:
        return state
    if _unreadable(out[None]) or _unreadable(dout[None]):
        out, dout = (x.clone(memory_format=torch.contiguous_format) for x in (out, dout))
        state.dout = dout
        given = (out, dout, *given[2:])
        if launches(*given):
            return state
    batch, length, num_heads, head_dim = shape
    if max(batch, num_heads) >= 1 << 16:
        raise ValueError(
            f"{batch} batch entries and {num_heads} heads: the backward's ends have a grid of less than 65536"
        )
    kernel = library.load(EndsKind("prepare", DTYPES[q.dtype], head_dim, dlse is not None))
    strides = (*out.stride()[:3], *dout.stride()[:3], *lse.stride()[:2], *((0,) * 3 if dlse is None else dlse.stride()))
    launches.add(kernel, (*(None,) * 7, *strides, length, num_heads, batch, None), given)
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
    """Walks a key-major table in one launch, as `ring_core.backend.Backend.backward` describes.

    Args:
        state: of `prepare`.
        q, dout: (B, Sq, Hq, D), fp16 or bf16; dout is that of `prepare`, whose state has it as TMA reads it.
        k, v: (C, B, S, Hkv, D).
        dk, dv: shaped as k, fp32, added to, or in q's dtype, written: see
            `ring_core.backend.Capabilities.final_gradients`.
        flags: arrival of the pieces; a piece's keys are read once its flag says so.
        departures: (C,) int32: the keys of each finished tile are added, for every key head and batch entry of its
            piece: see `ring_core.backend.departures_of`.
        settings: instead of those for this head dim.

    Raises:
        ValueError: tensors are of other kinds.
    """
    if settings is None and (params.softcap or params.alibi_slopes is not None):
        asked = {"softcap": bool(params.softcap), "alibi": params.alibi_slopes is not None}
        settings = backward_settings_for(q.shape[3], **asked)
    if params.alibi_slopes is not None:
        params = replace(params, alibi_slopes=dense_slopes(params.alibi_slopes))
    final = None if dk.dtype == torch.float32 else (dk, dv)
    if final is not None:
        assert flags is None and departures is None, "final gradients are those of keys that stay"
        dk, dv = _where_final(q, dk, dv, table, settings, params.deterministic)
    _launch(state, q, k, v, state.dout, dk, dv, table, params, flags, departures, settings)
    if final is not None and dk is not final[0]:
        final[0].copy_(dk)
        final[1].copy_(dv)


def _where_final(
    q: Tensor, dk: Tensor, dv: Tensor, table: DeviceTable, settings: BackwardSettings | None, ordered: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel is given for final dk and dv: these, zeroed first where it does not write all of them; or zeros
    in fp32, where several CTAs have a part of each."""
    key = ("cute final", q.get_device(), q.shape, dk.shape, settings, ordered)
    known: tuple[bool, bool] | None = table.host.cache.get(key)
    if known is None:
        dealt_out = written = False
        if q.numel() and len(table.host):
            chosen = settings or backward_settings_for(q.shape[-1])
            tile_keys = tile_keys_of(q.shape[-1], chosen)
            prepared = schedule_for(table, q.shape[0], tile_keys, chosen.block, False, ordered)
            dealt_out = _dealt_out(prepared, q, dk.shape[3], chosen.cluster, whole=ordered).parts > 1
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


def _launch(
    state: BackwardState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: DeviceTable,
    params: Params,
    flags: Flags | None,
    departures: Tensor | None,
    settings: BackwardSettings | None,
) -> None:
    device = q.get_device()
    stream = current_stream(device)
    arrived, epoch = (0, 0) if flags is None else (flags.values.data_ptr(), flags.epoch.data_ptr())
    departed = 0 if departures is None else departures.data_ptr()
    delta, pitch, done = state.memory.data_ptr(), 4 * state.pitch, None
    if params.deterministic:
        chosen = settings or backward_settings_for(q.shape[3])
        stretches = stretches_of(q.shape[1], chosen.block)
        counters = q.shape[0] * q.shape[2] * stretches * senders_of(q.shape[3], chosen)
        done = torch.zeros(counters, dtype=torch.int32, device=q.device)
    given: tuple[Given, ...] = (
        q, k, v, dout, delta + pitch, delta, delta + 2 * pitch, dk, dv,
        _counter(device, stream), arrived, epoch, departed, 0 if done is None else done.data_ptr(), stream,
    )  # fmt: skip
    slopes = params.alibi_slopes
    if params.softcap or slopes is not None:
        given = *given, slopes
    known = table.host.cache.get("cute backward")
    if known is None:
        known = table.host.cache["cute backward"] = LaunchesByKind()
    kind = (
        device, params.scale, params.softcap, slopes is None, params.deterministic, flags is None, departures is None,
        settings,
    )  # fmt: skip
    launches: Launches = known[kind]
    if not launches(*given):
        _launch_anew(launches, given, state, q, k, v, dout, dk, dv, table, params, flags, departures, settings)


def _launch_anew(
    launches: Launches,
    given: tuple[Given, ...],
    state: BackwardState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: DeviceTable,
    params: Params,
    flags: Flags | None,
    departures: Tensor | None,
    settings: BackwardSettings | None,
) -> None:
    """Works out what is launched for such tensors."""
    if not q.numel() or not k.numel() or not len(table.host):
        return
    if backward_supports(q, k, v, dk, dv):
        q, k, v = q.clone(memory_format=torch.contiguous_format), dense_keys(k), dense_keys(v)
        if reason := backward_supports(q, k, v, dk, dv):
            raise ValueError(f"the Hopper kernels do not take {reason}")
        _launch(state, q, k, v, dout, dk, dv, table, params, flags, departures, settings)
        return
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[3]
    chosen = settings or backward_settings_for(head_dim)
    by_piece = flags is not None or departures is not None
    ordered = params.deterministic
    prepared = schedule_for(table, batch, tile_keys_of(head_dim, chosen), chosen.block, by_piece, ordered)
    dealing = _dealt_out(prepared, q, num_kv_heads, chosen.cluster, whole=ordered or departures is not None)
    head_batches = prepared.repeats * num_kv_heads * dealing.parts
    total = prepared.count * head_batches
    if not total:
        return
    workers = _processors(q.device) // chosen.cluster
    gradients = "final" if dk.dtype != torch.float32 else "shared" if dealing.parts > 1 else "added"
    kind = BackwardKind(
        DTYPES[q.dtype], head_dim, gradients, flags is not None, departures is not None, chosen, ordered,
        bool(params.softcap), params.alibi_slopes is not None,
    )  # fmt: skip
    numbers = (
        *(None,) * 9,  # q, k, v, dout, lse, delta, dq, dk, dv
        prepared.items.data_ptr(),
        prepared.walk.data_ptr(),
        *(None,) * 4,  # counter, flags, epoch, departures
        0 if prepared.turns is None else prepared.turns.data_ptr(),
        None,  # done
        score_scale(params.scale, params.softcap),
        params.scale,
        length,
        num_heads,
        num_kv_heads,
        q.stride(1),
        q.stride(2),
        k.stride(2),
        k.stride(3),
        v.stride(2),
        v.stride(3),
        dout.stride(1),
        dout.stride(2),
        *dk.stride()[:4],
        *dv.stride()[:4],
        prepared.count,
        dealing.section,
        head_batches,
        total,
        dealing.parts,
        dealing.members,
        k.shape[2],
        *(x.stride(-4) // x.stride(-3) if batch > 1 else 0 for x in (q, dout, k)),
        POLLS,
        min(total, workers) * chosen.cluster,
        None,  # stream
        *terms_of(params.softcap, params.alibi_slopes),
    )
    launches.add(library.load(kind), numbers, given)


def finish(state: BackwardState, *, params: Params) -> tuple[Tensor, Tensor | None]:
    """See `ring_core.backend.Backend.finish`."""
    memory, shape = state.memory, state.shape
    device = memory.get_device()
    dq = state.dout.new_empty(shape)  # of its dtype: to ask for one takes as long again
    dtype = dq.dtype
    key = (shape, params.scale, dtype, device)
    known = _finished.get(key)
    if known is None and dq.numel():
        if len(_finished) == REMEMBERED:
            _finished.clear()
        batch, length, num_heads, head_dim = shape
        kernel = library.load(EndsKind("finish", DTYPES[dtype], head_dim))
        known = _finished[key] = (function_of(kernel), (params.scale, *dq.stride()[:3], length, num_heads, batch))
    if known is not None:
        kernel, numbers = known
        kernel(memory.data_ptr() + 8 * state.pitch, dq.data_ptr(), *numbers, current_stream(device))
    if params.sinks is None:
        return dq, None
    if not dq.numel():
        return dq, torch.zeros_like(params.sinks)
    # what the sink's share of a row's softmax takes from its delta
    share = torch.exp2(params.sinks.float()[:, None] * LOG2E - state.scaled_lse)
    return dq, -(share * state.delta).sum((0, 2)).to(params.sinks.dtype)


def schedule_for(
    table: DeviceTable, batch: int, tile_keys: int, block: int, by_piece: bool, ordered: bool
) -> PreparedKeys:
    """The table's schedule on its device, made once and kept with the table."""
    key = ("cute backward", str(table.device), batch, tile_keys, block, by_piece, ordered)
    known = table.host.cache.get(key)
    if known is None:
        schedule = make_schedule(table.host, tile_keys=tile_keys, block=block, by_piece=by_piece)
        items = schedule.items if schedule.every_batch else schedule.for_batch(batch)
        walk = schedule.walk if len(schedule.walk) else np.zeros((1, schedule.walk.shape[1]), dtype=np.int32)
        turns = None
        if ordered:
            items, order = turns_of(items, walk, block)
            turns = torch.from_numpy(order).to(table.device)
        known = table.host.cache[key] = PreparedKeys(
            torch.from_numpy(items).to(table.device),
            len(items),
            torch.from_numpy(walk).to(table.device),
            batch if schedule.every_batch else 1,
            schedule.seen_keys(batch),
            block * int(schedule.items[:, ITEM.index("blocks")].max(initial=0)),
            schedule.section,
            turns,
        )
    prepared: PreparedKeys = known
    return prepared


@dataclass(frozen=True, slots=True)
class Dealing:
    """How the query heads of a group are dealt out over clusters that share a tile of keys."""

    parts: int  # of a group
    members: int  # query heads of a part
    section: int  # parts, of all groups and batch entries, whose tiles come before those of the next


def _dealt_out(prepared: PreparedKeys, q: Tensor, num_kv_heads: int, cluster: int, *, whole: bool) -> Dealing:
    """In so many parts that there are two CTAs for each processor, and that rows of a section are few; whole: in one,
    as where they are added to dk and dv in a fixed order, or counted."""
    _, length, num_heads, head_dim = q.shape
    group, workers = num_heads // num_kv_heads, _processors(q.device) // cluster
    tiles, row_bytes = prepared.count * prepared.repeats * num_kv_heads, 8 * head_dim  # of Q, dO and dq
    for parts in (n for n in range(1, group + 1) if group % n == 0):
        members = group // parts
        section = prepared.section(
            prepared.repeats * num_kv_heads * parts, max(1, L2_BYTES // (members * length * row_bytes)), workers
        )
        dealing = Dealing(parts, members, section)
        few_rows = section * members * min(length, prepared.longest) * row_bytes <= SECTION_BYTES
        enough = tiles * parts >= 2 * workers and few_rows
        if whole or enough or parts == group:
            return dealing
    raise AssertionError("a group has a head")
