"""dq over the calls of a backward pass: in q's dtype while a row has had one call, in fp32 from the second on."""

from __future__ import annotations

import torch
from torch import Tensor

from ring_core.backend import accumulation_dtype
from ring_native.calls import EVERY, Call
from ring_native.spans import ONCE, UNTOUCHED, Spans


class QueryGradient:
    """Sums exactly: a row's first contribution is kept as the kernel rounded it, and widened when a second arrives."""

    def __init__(self, q: Tensor) -> None:
        self._dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, Sq, Hq, D)
        self._wide = q.dtype == accumulation_dtype(q.dtype)
        # By the stream that adds: calls about different rows may run side by side.
        self._sums: dict[int, Tensor] = {}
        self._summed: set[tuple[int, int, int, int]] = set()  # entry, start, stop of rows, stream
        # Of all batch entries together until a call is about one of them.
        self._spans = {EVERY: Spans(q.shape[1])}

    def place(self, call: Call) -> Tensor | None:
        """Where a kernel may write dq of a call, as `Call.of_rows` has it, once, in q's dtype; None where rows of it
        have something already."""
        concerned = self._of(call)
        for _, spans in concerned:
            if not spans.untouched(call.q_start, call.q_stop):
                return None
        for _, spans in concerned:
            spans.touch(call.q_start, call.q_stop)
        return call.of_rows(self._dq)[0]

    def add(self, call: Call, dq: Tensor) -> None:
        """Adds a call's dq (B or 1, rows, Hq, D)."""
        for entry, spans in self._of(call):
            part = dq if entry == EVERY or call.batch != EVERY else dq[_entries(entry)]
            for rows, status in spans.touch(call.q_start, call.q_stop):
                inside = slice(rows.start - call.q_start, rows.stop - call.q_start)
                self._add(entry, rows, status, part[:, inside])

    def finish(self) -> Tensor:
        """dq (B, Sq, Hq, D) in q's dtype; rows that nothing was added to are 0."""
        for entry, spans in self._spans.items():
            for rows, status in spans.all():
                where = _entries(entry), rows
                if status == UNTOUCHED:
                    self._dq[where].zero_()
        for entry, start, stop, stream in self._summed:
            summed = _entries(entry), slice(start, stop)
            self._dq[summed].copy_(self._sums[stream][summed])
        return self._dq

    def _of(self, call: Call) -> list[tuple[int, Spans]]:
        """The batch entries, or EVERY, that a call concerns, and what has happened to them."""
        if EVERY in self._spans:
            if call.batch == EVERY or self._dq.shape[0] == 1:
                return [(EVERY, self._spans[EVERY])]
            together = self._spans.pop(EVERY)
            for entry in range(self._dq.shape[0]):
                spans = self._spans[entry] = Spans(self._dq.shape[1])
                for rows, status in together.all():
                    for _ in range(status):
                        spans.touch(rows.start, rows.stop)
        return list(self._spans.items()) if call.batch == EVERY else [(call.batch, self._spans[call.batch])]

    def _add(self, entry: int, rows: slice, status: int, dq: Tensor) -> None:
        where = _entries(entry), rows
        if status == UNTOUCHED:
            self._dq[where].copy_(dq)
            return
        if self._wide:
            self._dq[where].add_(dq)
            return
        stream = torch.cuda.current_stream(dq.device).cuda_stream if dq.is_cuda else 0
        if stream not in self._sums:
            self._sums[stream] = torch.empty(self._dq.shape, dtype=accumulation_dtype(dq.dtype), device=dq.device)
        if status == ONCE:
            self._sums[stream][where].copy_(self._dq[where])
        self._sums[stream][where].add_(dq)
        self._summed.add((entry, rows.start, rows.stop, stream))


def _entries(entry: int) -> slice:
    return slice(None) if entry == EVERY else slice(entry, entry + 1)
