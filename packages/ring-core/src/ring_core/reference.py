"""The contract in plain PyTorch: the executable specification, and what runs where no kernel does.

One block at a time, the way a kernel would: online softmax over the segments of a strip (Milakov & Gimelshein,
arXiv:1805.02867), backward from the saved lse (Dao, arXiv:2307.08691). Accuracy and clarity first; speed is what the
other backends are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_core.backend import FEATURES, Capabilities, DeviceTable, Flags, HeadDims, Params, accumulation_dtype
from ring_core.philox import keep_mask
from ring_core.segment import FIRST, LAST, Segment

SCORES = 1 << 26
"""Scores held at a time (256 MiB in fp32): longer strips are cut into blocks of rows."""


@dataclass
class BackwardState:
    """What lives from `prepare` to `finish`."""

    lse: Tensor  # (B, Hq, Sq)
    delta: Tensor  # (B, Hq, Sq)
    dq: Tensor  # (B, Sq, Hq, D), in the accumulation dtype
    dtype: torch.dtype


class ReferenceBackend:
    """Plain PyTorch on any device: fp16, bf16, fp32 (computed in fp32) and fp64, any head dim, every feature."""

    name = "reference"

    def capabilities(self, device: torch.device) -> Capabilities:
        return Capabilities(
            available=True,
            dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
            head_dims=HeadDims(largest=1 << 16),
            features=frozenset(FEATURES),
            final_gradients=True,
            flags=True,
        )

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
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
        for strip in table.host.grouped:
            for batch, rows in _blocks(strip, q):
                place = (batch, slice(strip[0].q_start + rows.start, strip[0].q_start + rows.stop))
                place_lse = (batch, slice(None), place[1])
                before = None if state is None else state[place]
                m, total, o = _begin(strip[0], q[place], before, lse[place_lse], params)
                for segment in strip:
                    keys, values = _read(k, segment, batch, flags), _read(v, segment, batch, flags)
                    s, _ = _scores(q[place], keys, segment, rows, batch, params)  # (B, H, rows, k_len)
                    m_new = torch.maximum(m, s.amax(dim=-1)) if s.shape[-1] else m
                    base = m_new.masked_fill(m_new == -torch.inf, 0.0)  # a row that has seen nothing yet
                    p = torch.exp(s - base[..., None])
                    decay = torch.exp(m - base)
                    total = total * decay + p.sum(dim=-1)
                    p = _drop(p, segment, rows, batch, params)
                    o = o * _by_row(decay) + _weigh(p, values)
                    m = m_new
                o = o / _by_row(torch.where(total == 0, 1.0, total))
                lse[place_lse] = m + torch.log(total)
                if strip[-1].flags & LAST:
                    out[place] = o.to(out.dtype)
                else:
                    assert state is not None, "a strip that does not end in this table needs a state"
                    state[place] = o

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
        dtype = accumulation_dtype(q.dtype)
        delta = (dout.to(dtype) * out.to(dtype)).sum(dim=-1).transpose(1, 2)  # (B, Hq, Sq)
        if dlse is not None:
            delta = delta - dlse.to(dtype)
        return BackwardState(lse, delta, torch.zeros(q.shape, dtype=dtype, device=q.device), q.dtype)

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
        sums = dk, dv
        final = dk.dtype != state.dq.dtype
        if final:
            assert flags is None and departures is None, "final gradients are those of keys that stay"
            sums = torch.zeros_like(dk, dtype=state.dq.dtype), torch.zeros_like(dv, dtype=state.dq.dtype)
        for strip in table.host.grouped:
            for segment in strip:
                self._add(state, segment, q, k, v, dout, *sums, params, flags)
            if departures is not None:
                entries = {segment.batch for segment in strip}
                copies = q.shape[0] if -1 in entries else len(entries)
                departures[strip[0].piece] += strip[0].k_len * copies * k.shape[3]
        if final:
            dk.copy_(sums[0])
            dv.copy_(sums[1])

    def _add(
        self,
        state: BackwardState,
        segment: Segment,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        dk: Tensor,
        dv: Tensor,
        params: Params,
        flags: Flags | None,
    ) -> None:
        """One segment's part of dq, dk and dv."""
        for batch, rows in _blocks((segment,), q):
            place = (batch, slice(segment.q_start + rows.start, segment.q_start + rows.stop))
            place_lse = (batch, slice(None), place[1])
            keys, values = _read(k, segment, batch, flags), _read(v, segment, batch, flags)
            s, visible = _scores(q[place], keys, segment, rows, batch, params)
            row_lse = state.lse[place_lse].masked_fill(state.lse[place_lse] == -torch.inf, torch.inf)
            p = torch.exp(s - row_lse[..., None])  # (B, H, rows, k_len)
            do = dout[place].to(p.dtype)
            target = (segment.piece, batch, slice(segment.k_start, segment.k_start + segment.k_len))
            dv[target] += _over_rows(_drop(p, segment, rows, batch, params), do, dv.shape[3])
            dp = _drop(_dot(do, values), segment, rows, batch, params)
            ds = p * (dp - state.delta[place_lse][..., None])
            if params.softcap:
                ds = ds * (1 - torch.tanh(_dot(q[place], keys) * (params.scale / params.softcap)) ** 2)
            ds = ds.masked_fill(~visible, 0.0) * params.scale
            state.dq[place] += _weigh(ds, keys)
            dk[target] += _over_rows(ds, q[place].to(ds.dtype), dk.shape[3])

    def finish(self, state: BackwardState, *, params: Params) -> tuple[Tensor, Tensor | None]:
        dq = state.dq.to(state.dtype)
        if params.sinks is None:
            return dq, None
        p = torch.exp(params.sinks.to(state.lse.dtype)[:, None] - state.lse)  # (B, Hq, Sq)
        share = (p * state.delta).masked_fill(state.lse == -torch.inf, 0.0)  # padding has no sink
        return dq, -share.sum(dim=(0, 2)).to(params.sinks.dtype)


def _blocks(strip: tuple[Segment, ...], q: Tensor) -> Iterator[tuple[slice, slice]]:
    """(batch entries, rows of the strip) small enough for their scores to be held at once."""
    first = strip[0]
    batch = slice(None) if first.batch < 0 else slice(first.batch, first.batch + 1)
    entries = q.shape[0] if first.batch < 0 else 1
    widest = max(1, *(segment.k_len for segment in strip), 1) * max(1, entries) * q.shape[2]
    step = max(1, SCORES // widest)
    for start in range(0, first.q_len, step):
        yield batch, slice(start, min(start + step, first.q_len))


def _begin(
    first: Segment, q: Tensor, state: Tensor | None, lse: Tensor, params: Params
) -> tuple[Tensor, Tensor, Tensor]:
    """m, l (B, Hq, rows) and O (B, rows, Hq, D) with which a strip starts."""
    empty = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    if first.flags & FIRST:
        if params.sinks is None:
            return torch.full_like(lse, -torch.inf), torch.zeros_like(lse), empty
        return params.sinks.to(lse.dtype)[None, :, None].expand_as(lse), torch.ones_like(lse), empty
    assert state is not None, "a strip that does not begin in this table needs a state"
    unseen = lse == -torch.inf
    return lse.clone(), (~unseen).to(lse.dtype), torch.where(unseen.transpose(1, 2)[..., None], empty, state)


def _read(x: Tensor, segment: Segment, batch: slice, flags: Flags | None) -> Tensor:
    """Keys or values (B, k_len, Hkv, D) of a segment, in the accumulation dtype."""
    if not segment.k_len:  # rows that see nothing: there may not even be a piece
        return x.new_empty(x[:0, batch].shape[1], 0, *x.shape[3:], dtype=accumulation_dtype(x.dtype))
    if flags is not None:
        _await(flags, segment.piece)
    return x[segment.piece, batch, segment.k_start : segment.k_start + segment.k_len].to(accumulation_dtype(x.dtype))


def _await(flags: Flags, piece: int) -> None:
    """Looks until the piece has arrived or is poisoned; on the CPU, where nobody would bring it meanwhile, once."""
    while not (flags.values[piece] >= flags.epoch[0]) | (flags.values[piece] == -1):  # POISON
        if not flags.values.is_cuda:
            raise RuntimeError(f"piece {piece} is read before it has arrived")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, rows, Hq, D), (B, k_len, Hkv, D) -> (B, Hq, rows, k_len): rows against keys, or output gradients against
    values."""
    grouped = a.to(b.dtype).unflatten(2, (b.shape[2], -1))
    return _sums("bihgd,bjhd->bhgij", grouped, b).flatten(1, 2)


def _weigh(p: Tensor, b: Tensor) -> Tensor:
    """(B, Hq, rows, k_len), (B, k_len, Hkv, D) -> (B, rows, Hq, D): sums over keys."""
    return _sums("bhgij,bjhd->bihgd", p.unflatten(1, (b.shape[2], -1)), b).flatten(2, 3)


def _over_rows(p: Tensor, a: Tensor, num_kv_heads: int) -> Tensor:
    """(B, Hq, rows, k_len), (B, rows, Hq, D) -> (B, k_len, Hkv, D): sums over rows and the query heads of a group."""
    return _sums("bhgij,bihgd->bjhd", p.unflatten(1, (num_kv_heads, -1)), a.unflatten(2, (num_kv_heads, -1)))


def _sums(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """`torch.einsum`, but under autocast as well in the tensors' own dtype."""
    kind = a.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return torch.einsum(equation, a, b)
    with torch.autocast(kind, enabled=False):
        return torch.einsum(equation, a, b)


def _by_row(x: Tensor) -> Tensor:
    """(B, Hq, rows) -> (B, rows, Hq, 1)."""
    return x.transpose(1, 2)[..., None]


def _scores(
    q: Tensor, keys: Tensor, segment: Segment, rows: slice, batch: slice, params: Params
) -> tuple[Tensor, Tensor]:
    """Scores (B, Hq, rows, k_len), -inf where masked, and which are visible (rows, k_len)."""
    i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    j = torch.arange(segment.k_len, device=q.device)
    visible = (segment.lower <= j - i) & (j - i <= segment.upper)
    s = _dot(q, keys) * params.scale
    if params.softcap:
        s = params.softcap * torch.tanh(s / params.softcap)
    if params.alibi_slopes is not None:
        slopes = params.alibi_slopes if params.alibi_slopes.dim() == 2 else params.alibi_slopes[None]
        slopes = slopes[batch] if slopes.shape[0] > 1 else slopes
        distance = (segment.q_position + segment.stride * i) - (segment.k_position + segment.stride * j)
        s = s - slopes[:, :, None, None].to(s.dtype) * distance.abs()
    return s.masked_fill(~visible, -torch.inf), visible


def _drop(p: Tensor, segment: Segment, rows: slice, batch: slice, params: Params) -> Tensor:
    """Dropout on (B, Hq, rows, k_len)."""
    if params.dropout is None:
        return p
    device = p.device
    kept = keep_mask(
        params.dropout.probability,
        params.dropout.seed,
        heads=params.dropout.first_head + torch.arange(p.shape[1], device=device)[:, None, None],
        batch=((batch.start or 0) + torch.arange(p.shape[0], device=device))[:, None, None, None],
        q_positions=segment.q_position + segment.stride * torch.arange(rows.start, rows.stop, device=device)[:, None],
        k_positions=segment.k_position + segment.stride * torch.arange(segment.k_len, device=device),
    )
    return p.masked_fill(~kept, 0.0) / (1 - params.dropout.probability)
