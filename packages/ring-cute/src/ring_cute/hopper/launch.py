"""Launches the forward: schedule, counters, numbers. Imports no DSL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ring_core.backend import DeviceTable, Flags
from ring_core.segment import COLUMNS, FIRST, LAST
from ring_core.tiles import ITEM, make_schedule, with_first_walk
from ring_cute import library
from ring_cute.launches import Given, Launches, LaunchesByKind, current_stream
from ring_cute.settings import (
    PAIRED,
    PAIRED_HEAD_DIMS,
    Settings,
    kind_for,
    padded_head_dim,
    settings_for,
    state_fits,
)

L2_BYTES = 32 << 20
"""Keys and values that concurrent tiles should share in L2 (50 MB on an H100 or H200, also used by everything else)."""
POLLS = (1 << 31) - 1
"""Looks at an arrival flag before a wait ends by itself: some twenty minutes. The transport's watchdog ends it before,
by poison, and raises; ending by itself would be silent."""
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
LARGEST = 256
LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table's schedule on a device, for one batch size."""

    items: Tensor  # (N, 16) int32
    count: int
    walk: Tensor  # (M, 12) int32
    repeats: int  # batch entries that all items are about
    whole: bool  # every strip begins and ends in this table
    blocks: int  # of all items
    section: Callable[[int, int, int], int]  # `Schedule.section`


def takes_tma(x: Tensor) -> bool:
    """Whether TMA can address x (…, B, S, H, D) by rows."""
    *strides, last = x.stride()[-4:]
    if last != 1 or x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides):
        return False
    return all(strides) or not x.numel()  # those of what is never read may be 0


def supports(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why these tensors cannot be read as they are, or "" if they can."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}, it takes {', '.join(map(str, DTYPES))}"
    if q.shape[-1] % 8 or q.shape[-1] > LARGEST:
        return f"head dim {q.shape[-1]}, it takes multiples of 8 up to {LARGEST}"
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
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    flags: Flags | None = None,
    settings: Settings | None = None,
) -> None:
    """Walks a query-major table in one launch, as `ring_core.backend.Backend.forward` describes.

    Args:
        q, out: (B, Sq, Hq, D), fp16 or bf16. k, v: (C, B, S, Hkv, D). lse: (B, Hq, Sq) fp32. state: (B, Sq, Hq, D)
            fp32, or None where every strip begins and ends in this table. What has strides that TMA does not take is
            copied (but lse and state, which may have any).
        scale: of the scores, positive.
        sinks: (Hq,), one more logit a head.
        softcap: scores become softcap tanh(score / softcap); 0: they stay.
        slopes: (Hq,) or (B, Hq), of ALiBi.
        flags: arrival of the pieces; a piece's keys are read once its flag says so.
        settings: instead of those for this head dim.

    Raises:
        ValueError: the scale is not positive, tensors are of other kinds, or a state is needed and not given.
    """
    if sinks is not None and (sinks.dtype != torch.float32 or not sinks.is_contiguous()):
        sinks = sinks.float().contiguous()
    device = q.get_device()
    stream = current_stream(device)
    arrived, epoch = (0, 0) if flags is None else (flags.values.data_ptr(), flags.epoch.data_ptr())
    given: tuple[Given, ...] = (q, k, v, out, lse, state, sinks, _counter(device, stream), arrived, epoch, stream)
    if softcap or slopes is not None:
        slopes = None if slopes is None else dense_slopes(slopes)
        given = *given, slopes
    known = table.host.cache.get("cute forward")
    if known is None:
        known = table.host.cache["cute forward"] = LaunchesByKind()
    launches: Launches = known[device, scale, softcap, slopes is None, flags is None, settings]
    if not launches(*given):
        others: dict[str, Any] = {"sinks": sinks, "softcap": softcap, "slopes": slopes, "flags": flags}
        _launch_anew(launches, given, q, k, v, out, lse, state, table, scale=scale, settings=settings, **others)


def _launch_anew(
    launches: Launches,
    given: tuple[Given, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor | None,
    table: DeviceTable,
    scale: float,
    sinks: Tensor | None,
    softcap: float,
    slopes: Tensor | None,
    flags: Flags | None,
    settings: Settings | None,
) -> None:
    """Works out what is launched for such tensors."""
    others: dict[str, Any] = {"sinks": sinks, "softcap": softcap, "slopes": slopes, "flags": flags}
    if supports(q, k, v):
        q, k, v = q.clone(memory_format=torch.contiguous_format), dense_keys(k), dense_keys(v)
        if reason := supports(q, k, v):
            raise ValueError(f"the Hopper kernels do not take {reason}")
        forward(q, k, v, out, lse, state, table, scale=scale, settings=settings, **others)
        return
    if not takes_tma(out):
        dense = out.clone(memory_format=torch.contiguous_format)
        forward(q, k, v, dense, lse, state, table, scale=scale, settings=settings, **others)
        out.copy_(dense)
        return
    if scale <= 0:
        raise ValueError(f"scale is {scale}; the Hopper kernels take the largest score first and need it positive")
    batch, q_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[3]
    chosen = settings or settings_for(head_dim, softcap=bool(softcap), alibi=slopes is not None)
    prepared = prepare(table, batch, k.shape[2], chosen.block, chosen.tile_rows)
    continued = state is not None and not prepared.whole
    if settings is None and not (softcap or slopes is not None) and (not continued or state_fits(head_dim, chosen)):
        chosen = _in_pairs(chosen, q, table, k.shape[2])
        prepared = prepare(table, batch, k.shape[2], chosen.block, chosen.tile_rows)
    if not prepared.whole and state is None:
        raise ValueError("strips begin or end outside this table, but there is no state")
    if state is not None and (state.stride(-1) != 1 or state.data_ptr() % 8 or any(s % 2 for s in state.stride()[:-1])):
        raise ValueError(f"state with strides {state.stride()}: rows must be dense, and begin at multiples of 8 bytes")
    head_batches = prepared.repeats * num_heads
    total = prepared.count * head_batches
    if not total:
        return
    keys = max(1, k.shape[0] * k.shape[2])
    group = num_heads // num_kv_heads
    resident = min(head_batches, group * max(1, L2_BYTES // (keys * head_dim * 2 * k.element_size())))
    clusters = _processors(q.device) // chosen.cluster
    kind = kind_for(
        DTYPES[q.dtype],
        head_dim,
        chosen,
        state=continued,
        sinks=sinks is not None,
        flags=flags is not None,
        state_tma=state is not None and takes_tma(state),
        softcap=bool(softcap),
        alibi=slopes is not None,
    )
    some = k.numel() > 0
    numbers = (
        *(None,) * 7,  # q, k, v, out, lse, state, sinks
        prepared.items.data_ptr(),
        prepared.walk.data_ptr(),
        *(None,) * 3,  # counter, flags, epoch
        score_scale(scale, softcap),
        batch,
        q_len,
        num_heads,
        num_kv_heads,
        *q.stride()[:3],
        *((k.stride(2), k.stride(3), v.stride(2), v.stride(3)) if some else (head_dim,) * 4),
        *out.stride()[:3],
        lse.stride(0),
        lse.stride(1),
        *((0, 0, 0) if state is None else state.stride()[:3]),
        prepared.count,
        prepared.section(head_batches, resident, clusters),
        head_batches,
        total,
        k.stride(1) // k.stride(2) if k.shape[1] > 1 and some else 0,
        POLLS,
        min(total, clusters) * chosen.cluster,
        None,  # stream
        *terms_of(softcap, slopes),
    )
    if not some:  # nobody sees anything, but a descriptor wants an address
        launches, given = Launches(), (q, q, q, *given[3:])
    launches.add(library.load(kind), numbers, given)


def _in_pairs(chosen: Settings, q: Tensor, table: DeviceTable, piece_length: int) -> Settings:
    """The settings with two CTAs a tile, which share its keys, where that pays: tiles are long and many, and few pairs
    of rows have less to do than the longer of them."""
    host, paired = table.host, replace(chosen, cluster=2)
    rows = int(host.rows[host.groups[:-1], COLUMNS.index("q_len")].sum(dtype=np.int64))
    most = next((work for keys, work in PAIRED.items() if host.pairs >= keys * rows), 0.0)
    if not most or padded_head_dim(q.shape[3]) not in PAIRED_HEAD_DIMS:
        return chosen
    alone, together = (
        prepare(table, q.shape[0], piece_length, settings.block, settings.tile_rows) for settings in (chosen, paired)
    )
    many = 2 * together.count * together.repeats * q.shape[2] >= 4 * _processors(q.device)
    return paired if many and 2 * together.blocks <= most * alone.blocks else chosen


def dense_slopes(slopes: Tensor) -> Tensor:
    """Slopes of ALiBi as kernels read them: fp32, those of neighbouring heads one after the other."""
    return slopes if slopes.dtype == torch.float32 and slopes.stride(-1) == 1 else slopes.float().contiguous()


def terms_of(softcap: float, slopes: Tensor | None) -> tuple[float | None, ...]:
    """What kernels take last, as `scores.Terms` has it; nothing where scores are not shaped."""
    if not softcap and slopes is None:
        return ()
    batches = slopes is not None and slopes.dim() == 2 and slopes.shape[0] > 1
    return softcap * LOG2E, slopes.stride(0) if slopes is not None and batches else 0, None  # the slopes


def score_scale(scale: float, softcap: float) -> float:
    """What kernels multiply products with: scores in base 2, or with a softcap what `scores.below` takes."""
    return 2 * scale * LOG2E / softcap if softcap else scale * LOG2E


def dense_keys(x: Tensor) -> Tensor:
    """k or v (C, B, S, H, D) with all tokens of a batch entry one after the other."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def prepare(table: DeviceTable, batch: int, piece_length: int, block: int, tile_rows: int) -> Prepared:
    """The table's schedule on its device, made once and kept with the table."""
    key = ("cute", str(table.device), batch, piece_length, block, tile_rows)
    known = table.host.cache.get(key)
    if known is None:
        schedule = make_schedule(table.host, tile_rows=tile_rows, block=block, piece_length=piece_length)
        repeats = batch if schedule.every_batch else 1
        items = schedule.items if schedule.every_batch else schedule.for_batch(batch)
        walk = schedule.walk if len(schedule.walk) else np.zeros((1, schedule.walk.shape[1]), dtype=np.int32)
        known = table.host.cache[key] = Prepared(
            torch.from_numpy(with_first_walk(items, walk)).to(table.device),
            len(items),
            torch.from_numpy(walk).to(table.device),
            repeats,
            all(strip[0].flags & FIRST and strip[-1].flags & LAST for strip in table.host.grouped),
            int(items[:, ITEM.index("blocks")].sum(dtype=np.int64)),
            schedule.section,
        )
    prepared: Prepared = known
    return prepared


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], tuple[int, Tensor]] = {}


def _counter(device: int, stream: int) -> Tensor | int:
    """A zero that a kernel leaves zero: the address of one that all of a GPU's stream share. In a CUDA graph, which may
    be replayed on any stream, each has its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    found = _counters.get((device, stream))
    if found is None:
        zero = torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
        found = _counters[device, stream] = zero.data_ptr(), zero
    return found[0]
