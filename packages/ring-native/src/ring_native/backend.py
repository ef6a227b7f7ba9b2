"""The backend whose kernels are other people's: tables become calls of a provider, results are landed or merged."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ring_core.backend import Capabilities, DeviceTable, Flags, Params, has_wider_sums
from ring_core.merge import merge_
from ring_native.calls import Call, Idle, Landing, backward_calls, forward_calls, key_landings
from ring_native.gradients import QueryGradient
from ring_native.providers import PROVIDERS, Provider

_log = logging.getLogger(__name__)
VARIABLE = "RING_NATIVE_PROVIDER"
DEFAULTS = ("flash-attn", "aten")
"""On CUDA, in this order."""


@dataclass
class BackwardState:
    """What lives from `prepare` to `finish`."""

    provider: Provider
    out: Tensor  # (B, Sq, Hq, D)
    lse: Tensor  # (B, Hq, Sq)
    dlse: Tensor | None
    dq: QueryGradient
    rows: dict[tuple[int, int, int, bool], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """lse and dlse of rows that were asked for, contiguous: a ring asks for the same at every step."""


class NativeBackend:
    """Ready-made kernels behind the contract.

    Args:
        provider: whose; one of `ring_native.providers.PROVIDERS`, or an object like them. None: that of the environment
            variable RING_NATIVE_PROVIDER, else flash-attn where it is installed, else the one in torch; for CPU tensors
            always torch's.

    Raises:
        ValueError: there is no such provider.
    """

    def __init__(self, provider: str | Provider | None = None) -> None:
        default = os.environ.get(VARIABLE) or None
        for given, source in ((provider, "provider"), (default, VARIABLE)):
            if isinstance(given, str) and given not in PROVIDERS:
                known = ", ".join(map(repr, PROVIDERS))
                raise ValueError(f"{source}={given!r}: there is no such provider; there are {known}")
        self._chosen = PROVIDERS[provider] if isinstance(provider, str) else provider
        self._default = None if default is None else PROVIDERS[default]
        self._found: dict[torch.device, Provider] = {}
        self.name = "native" if self._chosen is None else f"native[{self._chosen.name}]"

    def provider(self, device: torch.device) -> Provider:
        """Whose kernels run on `device`. Logged, at level INFO, when it is first asked for."""
        if device not in self._found:
            self._found[device] = self._find(device)
            _log.info("%s on %s: the kernels of %s", self.name, device, self._found[device].name)
        return self._found[device]

    def _find(self, device: torch.device) -> Provider:
        if self._chosen is not None:
            return self._chosen
        if device.type == "cpu":
            return PROVIDERS["cpu"]
        if self._default is not None:
            return self._default
        able = (PROVIDERS[name] for name in DEFAULTS if PROVIDERS[name].capabilities(device).available)
        return next(able, PROVIDERS[DEFAULTS[-1]])

    def capabilities(self, device: torch.device) -> Capabilities:
        can = self.provider(device).capabilities(device)
        written: dict[str, Any] = {"writes_gradients": True, "final_gradients": True, "rounds_gradients": True}
        return replace(can, accumulate=True, flags=False, **written)

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
        if params.scale <= 0:
            q, params = _positive(q, params)
        provider = self.provider(q.device)
        distances = params.alibi_slopes is not None
        plan = forward_calls(table.host, k.shape[2], q.shape[0], provider.style, provider.varlen, distances)
        if state is None and plan.keeps_state:
            state = torch.empty(q.shape, dtype=lse.dtype, device=q.device)
        for idle in plan.idle:
            _land_nothing(idle, out, lse, state)
        if not q.numel():
            return
        keys, values, dim = _keys(k, v)
        for call, landings in plan.calls:
            rows, to = call.of_rows(q, out)
            some, some_values = call.of_keys(keys, values, dim=dim)
            (to_lse,) = call.of_rows(lse, dim=2)
            options: dict[str, Any] = {"mask": call.mask, "sequences": call.sequences}
            options["params"] = _params_of(call, params)
            if len(landings) > 1 or not landings[0].in_out:
                block, block_lse = provider.forward(rows, some, some_values, None, None, **options)
                _land(call, landings, call.with_entry(block), call.with_entry(block_lse), out, lse, state)
                continue
            found_out, found_lse = provider.forward(rows, some, some_values, to, to_lse, **options)
            if found_out.data_ptr() != to.data_ptr():
                to.copy_(found_out)
            if found_lse.data_ptr() != to_lse.data_ptr():
                to_lse.copy_(found_lse)

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
        return BackwardState(self.provider(q.device), out, lse, dlse, QueryGradient(q))

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
        if not q.numel():
            dk.zero_()
            dv.zero_()
            return
        if params.scale <= 0:
            q, params = _positive(q, params)
        provider = state.provider
        distances = params.alibi_slopes is not None
        calls = backward_calls(table.host, k.shape[2], q.shape[0], provider.style, provider.varlen, distances)
        keys, sums = _keys(k, v), (_joined(dk), _joined(dv))
        landings = key_landings(table.host, calls, k.shape[0] * k.shape[2], q.shape[0])
        if not landings.once and has_wider_sums(dk.dtype):  # final: rounded when all calls have added to them
            sums = torch.empty_like(sums[0], dtype=state.lse.dtype), torch.empty_like(sums[1], dtype=state.lse.dtype)
        for entries, idle in landings.idle:
            for total in sums:
                total[entries, idle].zero_()
        for call, landed in zip(calls, landings.by_call, strict=True):
            place = state.dq.place(call)
            room = None
            if len(landed) == 1 and landed[0][1]:  # nothing came before
                room = _Room.of(call, sums, k.dtype, state.provider.beside)
            dq, *parts = _run_backward(state, call, q, keys, dout, place, room, params)
            if place is None:
                state.dq.add(call, call.with_entry(dq))
            elif dq.data_ptr() != place.data_ptr():
                place.copy_(dq)
            if room is not None:
                room.land(*parts)
                continue
            for total, part in zip(sums, map(call.with_entry, parts), strict=True):
                for some, fresh in landed:
                    target = total[call.entries, some]
                    given = part if len(landed) == 1 else part[:, some.start - call.k_start : some.stop - call.k_start]
                    if fresh:
                        target.copy_(given)
                    else:
                        target.add_(given)
        for total, pieces in zip(sums, (dk, dv), strict=True):
            if total.data_ptr() != pieces.data_ptr():  # sums, or a copy: pieces that do not lie one after the other
                pieces.copy_(total.unflatten(1, pieces.shape[::2][:2]).transpose(0, 1))

    def finish(self, state: BackwardState, *, params: Params) -> tuple[Tensor, Tensor | None]:
        dq = state.dq.finish()
        if params.scale <= 0:  # the gradient of what `_positive` made
            dq = -dq if params.scale < 0 else torch.zeros_like(dq)
        return dq, None


def _positive(q: Tensor, params: Params) -> tuple[Tensor, Params]:
    """Queries and a positive scale that give the same scores: kernels look for the largest q·k, and hide keys by
    -inf, before they multiply by the scale."""
    if params.scale < 0:
        return -q, replace(params, scale=-params.scale)
    return torch.zeros_like(q), replace(params, scale=1.0)


def _joined(pieces: Tensor) -> Tensor:
    """(B, C * S, H, D) of pieces (C, B, S, H, D): a view wherever they lie one after the other, as a transport's do."""
    return pieces[0] if pieces.shape[0] == 1 else pieces.transpose(0, 1).flatten(1, 2)


def _keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """k, v for `Call.of_keys`, and the dimension of keys in them: single pieces as they are, others joined."""
    return (k, v, 2) if k.shape[0] == 1 else (_joined(k), _joined(v), 1)


class _Room(NamedTuple):
    """Where a call may write dk and dv that are the first of their keys."""

    given: tuple[Tensor, Tensor]
    made: Tensor | None = None
    to: Tensor | None = None
    """Where they belong, side by side, in another dtype than the kernel's; they are so in `made`: one copy will do."""

    @staticmethod
    def of(call: Call, sums: tuple[Tensor, Tensor], dtype: torch.dtype, beside: bool) -> _Room | None:
        """None where two tensors of the kernel's own do as well. beside: it may be given such as lie side by side."""
        if sums[0].dtype == dtype:
            dk, dv = call.of_keys(*sums)
            return _Room((dk, dv))
        pairs = _side_by_side(*sums) if beside else None
        if pairs is None:
            return None
        (to,) = call.of_keys(pairs)
        made = torch.empty(to.shape, dtype=dtype, device=to.device)
        dk, dv = made.unbind(-3)
        return _Room((dk, dv), made, to)

    def land(self, dk: Tensor, dv: Tensor) -> None:
        """Puts what the kernel gave, wherever it has put it, where it belongs."""
        for given, place in zip((dk, dv), self.given, strict=True):
            if given.data_ptr() != place.data_ptr():
                place.copy_(given)
        if self.to is not None and self.made is not None:
            self.to.copy_(self.made)


def _side_by_side(k: Tensor, v: Tensor) -> Tensor | None:
    """(B, S, 2, Hkv, D) of two (B, S, Hkv, D) that lie like that in one memory, as a transport's do; else None."""
    stride = k.stride()
    apart = (v.data_ptr() - k.data_ptr()) // k.element_size()
    if v.stride() != stride or not 0 < apart < stride[1] or apart != k.shape[2] * k.shape[3]:
        return None
    batch, tokens, *token = k.shape
    return k.as_strided((batch, tokens, 2, *token), (*stride[:2], apart, *stride[2:]))


def _run_backward(
    state: BackwardState,
    call: Call,
    q: Tensor,
    keys: tuple[Tensor, Tensor, int],
    dout: Tensor,
    dq: Tensor | None,
    room: _Room | None,
    params: Params,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a call, where the provider can, in the tensors handed over."""
    lse, dlse = _rows_of_lse(state, call)
    rows, out, do = call.of_rows(q, state.out, dout)
    some, some_values = call.of_keys(*keys[:2], dim=keys[2])
    return state.provider.backward(
        rows,
        some,
        some_values,
        out,
        do,
        lse,
        dlse,
        dq,
        None if room is None else room.given,
        mask=call.mask,
        sequences=call.sequences,
        params=_params_of(call, params),
    )


def _params_of(call: Call, params: Params) -> Params:
    """With the slopes of the call's batch entries; those of one entry are those of all its sequences."""
    slopes = params.alibi_slopes
    if slopes is None or slopes.dim() == 1:
        return params
    slopes = slopes[call.entries]
    return replace(params, alibi_slopes=slopes if call.sequences is None else slopes[0])


def _rows_of_lse(state: BackwardState, call: Call) -> tuple[Tensor, Tensor | None]:
    """lse and dlse (B or 1, Hq, rows), or without B for sequences, contiguous."""
    key = call.batch, call.q_start, call.q_stop, call.sequences is None
    found = state.rows.get(key)
    if found is None:
        given = (state.lse,) if state.dlse is None else (state.lse, state.dlse)
        lse, *dlse = (x.contiguous() for x in call.of_rows(*given, dim=2))
        found = state.rows[key] = lse, dlse[0] if dlse else None
    return found


def _land_nothing(idle: Idle, out: Tensor, lse: Tensor, state: Tensor | None) -> None:
    rows = idle.entries, idle.rows
    if idle.begins:
        lse[idle.entries, :, idle.rows] = -torch.inf
        if idle.ends:
            out[rows] = 0.0
    elif idle.ends:
        assert state is not None, "rows that did not begin in this table have a state"
        unseen = (lse[idle.entries, :, idle.rows] == -torch.inf).transpose(1, 2)[..., None]
        out[rows] = state[rows].masked_fill(unseen, 0.0).to(out.dtype)


def _land(
    call: Call,
    landings: tuple[Landing, ...],
    found: Tensor,
    found_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor | None,
) -> None:
    """Puts or merges a call's result into what its rows have so far."""
    for landing in landings:
        rows, rows_lse = (call.entries, landing.rows), (call.entries, slice(None), landing.rows)
        part = slice(landing.rows.start - call.q_start, landing.rows.stop - call.q_start)
        block, block_lse = found[:, part], found_lse[:, :, part]
        running = out if landing.between or landing.in_out else state
        assert running is not None, "rows that several calls make up have a state"
        if landing.fresh:
            running[rows].copy_(block)
            lse[rows_lse].copy_(block_lse)
        else:
            merge_(running[rows], lse[rows_lse], block, block_lse, out[rows] if landing.last else None)


__all__ = ["BackwardState", "NativeBackend"]
