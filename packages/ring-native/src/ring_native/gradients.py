"""dq over the calls of a backward pass: in q's dtype while a row has had one call, in fp32 from the second on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ring_core.backend import accumulation_dtype
from ring_native.calls import EVERY, Call

UNTOUCHED, ONCE, SUMMED = range(3)


class QueryGradient:
    """Sums exactly: a row's first contribution is kept as the kernel rounded it, and widened when a second arrives."""

    def __init__(self, q: Tensor) -> None:
        self._dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, Sq, Hq, D)
        self._sum: Tensor | None = self._dq if q.dtype == accumulation_dtype(q.dtype) else None
        self._status = np.full(q.shape[:2], UNTOUCHED, np.int8)

    def place(self, call: Call) -> Tensor | None:
        """Where a kernel may write dq (B or 1, rows, Hq, D) of a call, once, in q's dtype; None where rows of it have
        something already."""
        status = self._status[call.entries, call.rows]
        if (status != UNTOUCHED).any():
            return None
        status[:] = ONCE
        return self._dq[call.entries, call.rows]

    def add(self, call: Call, dq: Tensor) -> None:
        """Adds a call's dq (B or 1, rows, Hq, D)."""
        status = self._status[call.entries, call.rows]
        alike = call.batch != EVERY or bool((status == status[:1]).all())
        for number in range(1 if alike else len(status)):
            entries = call.entries if alike else slice(number, number + 1)
            line = status[number]
            edges = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
            for start, stop in pairwise(edges):
                rows = slice(call.q_start + start, call.q_start + stop)
                part = dq[slice(None) if alike else entries, start:stop]
                self._add((entries, rows), int(line[start]), part)
            after = np.where(line == UNTOUCHED, ONCE, SUMMED)
            status[slice(None) if alike else number] = after

    def _add(self, where: tuple[slice, slice], status: int, dq: Tensor) -> None:
        if status == UNTOUCHED:
            self._dq[where].copy_(dq)
            return
        if self._sum is None:
            self._sum = torch.empty(self._dq.shape, dtype=accumulation_dtype(dq.dtype), device=dq.device)
        if status == ONCE and self._sum is not self._dq:
            self._sum[where].copy_(self._dq[where])
        self._sum[where].add_(dq)

    def finish(self) -> Tensor:
        """dq (B, Sq, Hq, D) in q's dtype; rows that nothing was added to are 0."""
        if (self._status == ONCE).all():  # most calls: nothing left to do
            return self._dq
        for status in (UNTOUCHED, SUMMED):
            here = self._status == status
            if here.all():
                self._close(status, (slice(None), slice(None)))
                continue
            alike = bool((here == here[:1]).all())
            for number in range(1 if alike else len(here)):
                edges = np.flatnonzero(np.diff(here[number].astype(np.int8), prepend=0, append=0)).tolist()
                for start, stop in zip(edges[::2], edges[1::2], strict=True):
                    self._close(status, (slice(None) if alike else slice(number, number + 1), slice(start, stop)))
        return self._dq

    def _close(self, status: int, where: tuple[slice, slice]) -> None:
        if status == UNTOUCHED:
            self._dq[where].zero_()
        elif self._sum is not None and self._sum is not self._dq:
            self._dq[where].copy_(self._sum[where])
