"""One backend, one process, no process group: drives the `Backend` protocol as a plan, or as nobody yet, would."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core.accumulate import accumulating
from ring_core.backend import (
    Backend,
    Dropout,
    Flags,
    Params,
    accumulation_dtype,
    departures_of,
    has_wider_sums,
    on_device,
    takes_flags,
)
from ring_core.segment import LAST
from ring_core.testing.conformance.case import (
    AttentionCase,
    Tensors,
    check_gradients_refused,
    check_refused,
    check_results,
    make_tensors,
    oracle_options,
)
from ring_core.testing.conformance.tables import Call, Share, keys_of, rows_of, shares

EPOCH = 7


@dataclass(frozen=True, kw_only=True)
class KernelCase(AttentionCase):
    """A case of one process. World size, layout and schedule are those of simulated ranks, all of which are computed in
    turn.

    hand_made: tables that no plan makes, of `strip` rows by `block` keys in `calls` calls over `pieces` pieces of keys;
    cu_q, cu_k pack documents; per_entry: rows of the table for each batch entry by itself. strided: q, k, v, dout are
    views whose last dimension alone is dense. flags: pieces come with arrival flags where the backend reads them.
    reveal: v is one-hot, so that out is the matrix of probabilities and its zeros are the dropout mask. final: dk
    and dv are in the inputs' dtype where the backend gives them so; each of the calls is about keys of its own.
    """

    hand_made: bool = False
    strip: int = 1 << 20
    block: int = 1 << 20
    calls: int = 1
    pieces: int = 1
    per_entry: bool = False
    cu_q: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None
    strided: bool = False
    flags: bool = False
    reveal: bool = False
    final: bool = False

    @property
    def features(self) -> frozenset[str]:
        asked = {"packed"} if self.cu_q is not None or self.per_entry else set()
        if self.alibi and self.hand_made:  # whose blocks begin anywhere, as those of several ranks
            asked.add("ring_alibi")
        return super().features | asked

    @property
    def documents(self) -> list[tuple[int, int, int, int]]:
        """(q_start, q_stop, k_start, k_stop) of each."""
        if self.cu_q is None or self.cu_k is None:
            return [(0, self.q_length, 0, self.k_length)]
        return list(zip(self.cu_q, self.cu_q[1:], self.cu_k, self.cu_k[1:], strict=False))


def check_kernel_case(case: KernelCase, backend: Backend, device: torch.device | str = "cpu", *, seed: int = 0) -> None:
    """Raises AssertionError unless the backend fulfils the contract on this case.

    What its Capabilities lack is not run: `ring_attention` must refuse it by name. A backend that cannot accumulate is
    run the way ring-core runs it, inside `Accumulating`.
    """
    device = torch.device(device)
    can = backend.capabilities(device)
    if not can.available:
        pytest.skip(f"backend {backend.name!r} is not available on {device}: {can.reason}")
    case = case.resolved(can)
    if case.missing(can):
        check_refused(case, backend, device)
        return
    if not case.gradients:
        check_gradients_refused(case, backend, device)
    tensors = make_tensors(case, seed, device)
    if case.reveal:
        one_hot = torch.eye(case.head_dim, dtype=tensors.v.dtype, device=device)[: case.k_length]
        tensors = replace(tensors, v=one_hot[None, :, None].expand_as(tensors.v).contiguous())
    options = oracle_options(case, tensors)
    if case.cu_q is not None:
        options.update(cu_seqlens_q=case.cu_q, cu_seqlens_k=case.cu_k, total_length=None)
    able = accumulating(backend, device)
    results = _Run(case, able, device, tensors).all_shares()
    # dk and dv are added to numbers of size 1: each addition rounds at that size.
    rounding = 8 * torch.finfo(accumulation_dtype(tensors.q.dtype)).eps
    truth = check_results(case, tensors, results, options, slack={"dk": rounding, "dv": rounding})
    if case.reveal:
        same = torch.equal(results["out"].cpu() != 0, truth.out.cpu() != 0)
        assert same, f"{case}: the dropout mask is not Philox's, bit for bit"
    if case.deterministic:
        again = _Run(case, able, device, tensors).all_shares()
        differ = [name for name, value in results.items() if not torch.equal(value, again[name])]
        assert not differ, f"{case}: {differ} differ bitwise from run to run though deterministic=True"


class _Run:
    """All shares of one case through one backend; everything that the contract says is not read holds NaN."""

    def __init__(self, case: KernelCase, backend: Backend, device: torch.device, tensors: Tensors) -> None:
        self.case, self.backend, self.device, self.tensors = case, backend, device, tensors
        self.sums = accumulation_dtype(tensors.q.dtype)
        scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
        seed = torch.tensor([tensors.dropout_seed], device=device)
        dropout = Dropout(case.dropout_p, seed) if case.dropout_p else None
        self.params = Params(scale, case.softcap, tensors.alibi_slopes, tensors.sinks, dropout, case.deterministic)

    def all_shares(self) -> dict[str, Tensor]:
        """Global out, lse and, with gradients, dq, dk, dv and dsinks, from the parts of all simulated ranks."""
        x = self.tensors

        def wide_zeros(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=torch.float64, device=self.device)

        out, dq = torch.zeros_like(x.q), torch.zeros_like(x.q)
        lse = torch.empty(x.q.shape[0], x.q.shape[2], x.q.shape[1], dtype=self.sums, device=self.device)
        results = {"out": out, "lse": lse}
        if self.case.gradients:
            results |= {"dq": dq, "dk": wide_zeros(x.k), "dv": wide_zeros(x.v)}
            if x.sinks is not None:
                results["dsinks"] = wide_zeros(x.sinks)
        for share in shares(self.case):
            self._share(share, results)
        return results

    def _share(self, share: Share, results: dict[str, Tensor]) -> None:
        x, rows = self.tensors, share.queries.to(self.device)
        written, hidden = self._rows(share)
        q, dout = (self._laid_out(_nan_where(whole[:, rows], hidden)) for whole in (x.q, x.dout))
        dlse = None if x.dlse is None else _nan_where(x.dlse[:, :, rows].transpose(1, 2), hidden).transpose(1, 2)
        dlse = None if dlse is None else dlse.contiguous()
        pieces = [self._pieces(call) for call in share.calls]
        out, lse = self._forward(share, q, pieces)
        # Rows that no segment writes are nobody's: what backward finds there is what ring-core would have put there.
        out = out.masked_fill(~written[..., None, None], 0.0)
        lse = lse.masked_fill(hidden[:, None], -torch.inf)
        results["out"][:, rows], results["lse"][:, :, rows] = out, lse
        if not self.case.gradients:
            return
        dq, dsinks = self._backward(share, q, pieces, out, dout, lse, dlse, results)
        assert (dq.dtype, dq.shape) == (q.dtype, q.shape), f"{self.case}: dq is {dq.dtype} {tuple(dq.shape)}"
        results["dq"][:, rows] = dq
        assert (dsinks is None) == (x.sinks is None), f"{self.case}: dsinks and sinks must come together"
        if dsinks is not None:
            results["dsinks"] += dsinks.double()

    def _rows(self, share: Share) -> tuple[Tensor, Tensor]:
        """bool (B, Sq) each: rows that some call writes, and rows whose queries must not matter."""
        batch, q_length = self.tensors.q.shape[0], len(share.queries)
        written = torch.zeros(batch, q_length, dtype=torch.bool)
        for call in share.calls:
            written |= rows_of(call.forward, batch, q_length)
        hidden = ~written
        for start, stop in share.padding:
            hidden[:, start:stop] = True
        return written.to(self.device), hidden.to(self.device)

    def _pieces(self, call: Call) -> tuple[Tensor, Tensor]:
        """k, v (C, B, S_piece, Hkv, D), NaN wherever no segment reads."""
        batch = self.tensors.q.shape[0]
        read = keys_of(call.forward, batch, call.keys) | keys_of(call.backward, batch, call.keys)
        index = call.keys.clamp(min=0).to(self.device)
        k, v = (
            self._laid_out(_nan_where(whole[:, index].transpose(0, 1), ~read.to(self.device)))
            for whole in (self.tensors.k, self.tensors.v)
        )
        return k, v

    def _laid_out(self, x: Tensor) -> Tensor:
        """Contiguous, or with a gap after each head."""
        if not self.case.strided:
            return x.contiguous()
        roomy = torch.full((*x.shape[:-1], 2, x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)
        roomy[..., 1, :] = x
        return roomy[..., 1, :]

    def _flags(self, call: Call, q: Tensor, dout: Tensor | None) -> Flags | None:
        if not self.case.flags or not takes_flags(self.backend, q, dout, self.params):
            return None
        values = torch.full((call.keys.shape[0],), EPOCH, dtype=torch.int32, device=self.device)
        return Flags(values, torch.tensor([EPOCH], dtype=torch.int32, device=self.device))

    def _forward(self, share: Share, q: Tensor, pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        batch, q_length, num_heads, _ = q.shape
        out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=self.device)
        lse = torch.full((batch, num_heads, q_length), torch.nan, dtype=self.sums, device=self.device)
        state = torch.full(q.shape, torch.nan, dtype=self.sums, device=self.device) if share.spans_calls else None
        for call, (k, v) in zip(share.calls, pieces, strict=True):
            if not len(call.forward):
                continue
            before = out.clone(), lse.clone(), None if state is None else state.clone()
            table = on_device(call.forward, self.device)
            self.backend.forward(q, k, v, out, lse, state, table, params=self.params, flags=self._flags(call, q, None))
            others = ~rows_of(call.forward, batch, q_length).to(self.device)
            unfinished = ~rows_of(call.forward, batch, q_length, LAST).to(self.device)
            self._untouched("out", out, before[0], unfinished)
            self._untouched("lse", lse.transpose(1, 2), before[1].transpose(1, 2), others)
            if state is not None and before[2] is not None:
                self._untouched("state", state, before[2], others)
                # A row that has seen nothing so far has no state, whatever the backend wrote there.
                state.masked_fill_((lse == -torch.inf).transpose(1, 2)[..., None], torch.nan)
        return out, lse

    def _backward(
        self,
        share: Share,
        q: Tensor,
        pieces: list[tuple[Tensor, Tensor]],
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        results: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        k_shape = torch.Size((q.shape[0], self.case.k_length // self.case.world_size, *self.tensors.k.shape[2:]))
        state: Any = self.backend.prepare(q, k_shape, out, dout, lse, dlse, params=self.params)
        for call, (k, v) in zip(share.calls, pieces, strict=True):
            if not len(call.backward):
                continue
            # Not zeros: contributions are added to what is in the buffers already, or are all that will be there.
            generator = torch.Generator().manual_seed(1)
            before = torch.randn(2, *k.shape, generator=generator, dtype=self.sums).to(self.device)
            after = before.clone()
            can = self.backend.capabilities(torch.device(self.device))
            if self.case.final and can.final_gradients and has_wider_sums(q.dtype):
                before = before.to(q.dtype)
            if can.writes_gradients or before.dtype != self.sums:
                before, after = torch.zeros_like(before), torch.full_like(before, torch.nan)
            table = on_device(call.backward, self.device)
            flags = self._flags(call, q, dout)
            departures = None if flags is None else torch.zeros_like(flags.values)
            staged: dict[str, Any] = {"flags": flags, "departures": departures}
            self.backend.backward(state, q, k, v, dout, after[0], after[1], table, params=self.params, **staged)
            if departures is not None:
                full = departures_of(call.backward, k.shape[0], q.shape[0], k.shape[3])
                assert tuple(departures.tolist()) == full, f"{self.case}: departures {departures.tolist()}, not {full}"
            read = keys_of(call.backward, q.shape[0], call.keys).to(self.device)
            for side, name in enumerate(("dk", "dv")):
                self._untouched(name, after[side], before[side], ~read)
                added = (after[side].double() - before[side].double()).transpose(0, 1).flatten(1, 2)
                real = call.keys.flatten() >= 0
                results[name].index_add_(1, call.keys.flatten()[real].to(self.device), added[:, real.to(self.device)])
        dq, dsinks = self.backend.finish(state, params=self.params)
        return dq, dsinks

    def _untouched(self, name: str, x: Tensor, before: Tensor, where: Tensor) -> None:
        """x, before (..., H, D) or (..., H); where bool (...)."""
        a, b = x[where], before[where]
        same = bool(((a == b) | (a.isnan() & b.isnan())).all())
        assert same, f"{self.case}: {name} was written where no segment of the table says so"


def _nan_where(x: Tensor, where: Tensor) -> Tensor:
    """x (..., H, D) or (..., H), NaN where `where` (...) is."""
    return x.masked_fill(where.reshape(*where.shape, *[1] * (x.dim() - where.dim())), torch.nan)


def check_late_piece(backend: Backend, device: torch.device | str = "cpu") -> None:
    """Raises AssertionError if a backend that reads flags touches a piece that has not arrived, in forward or in
    backward.

    On the CPU nobody could make the piece arrive while the backend waits: it must raise.
    """
    device = torch.device(device)
    can = backend.capabilities(device)
    if not can.flags or device.type != "cpu":
        pytest.skip("only backends that read arrival flags, on the CPU, can be asked not to wait")
    late_case = KernelCase(name="late piece", hand_made=True, calls=1, pieces=3, block=10, flags=True).resolved(can)
    run = _Run(late_case, accumulating(backend, device), device, make_tensors(late_case, 0, device))
    (share,) = shares(late_case)
    (call,) = share.calls
    (k, v) = run._pieces(call)
    q, params = run.tensors.q, run.params
    out, lse = torch.empty_like(q), torch.zeros(*q.shape[:1], q.shape[2], q.shape[1], dtype=run.sums)
    flags = Flags(torch.tensor([EPOCH, EPOCH, EPOCH - 1], dtype=torch.int32), torch.tensor([EPOCH], dtype=torch.int32))
    table = on_device(call.forward, device)
    with pytest.raises(RuntimeError):
        run.backend.forward(q, k, v, out, lse, None, table, params=params, flags=flags)
    state = run.backend.prepare(q, run.tensors.k.shape, run.tensors.dout, run.tensors.dout, lse, None, params=params)
    dk, dv = torch.zeros(2, *k.shape, dtype=run.sums)
    table = on_device(call.backward, device)
    with pytest.raises(RuntimeError):
        run.backend.backward(state, q, k, v, run.tensors.dout, dk, dv, table, params=params, flags=flags)
