"""Running state for backends that cannot keep one: each segment is computed by itself and merged."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ring_core.backend import Backend, Capabilities, DeviceTable, Flags, Params, on_device, takes_flags
from ring_core.merge import merge_
from ring_core.segment import COLUMNS, FIRST, LAST, Segment, Table


class Accumulating:
    """A backend whose `forward` takes only segments that are FIRST and LAST, made to fulfil the whole contract."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.prepare, self.backward, self.finish = inner.prepare, inner.backward, inner.finish

    def capabilities(self, device: torch.device) -> Capabilities:
        return replace(self.inner.capabilities(device), accumulate=True)

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
        return takes_flags(self.inner, q, dout, params)

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
        if all(segment.flags & FIRST and segment.flags & LAST for segment in table.host.segments):
            return self.inner.forward(q, k, v, out, lse, None, table, params=params, flags=flags)
        running = torch.empty(q.shape, dtype=lse.dtype, device=q.device) if state is None else state
        block_out, block_lse = torch.empty_like(q), torch.empty_like(lse)
        for alone, originals, first in _rounds(table):
            # A sink is one more logit of the whole row: only the segment that begins it may count it.
            begun = params if first or params.sinks is None else replace(params, sinks=None)
            self.inner.forward(
                q, k, v, block_out, block_lse, None, on_device(alone, q.device), params=begun, flags=flags
            )
            for segment in originals:
                rows = slice(segment.q_start, segment.q_start + segment.q_len)
                batch = slice(None) if segment.batch < 0 else slice(segment.batch, segment.batch + 1)
                if segment.flags & FIRST:
                    lse[batch, :, rows] = -torch.inf
                result = out[batch, rows] if segment.flags & LAST else None
                block = block_out[batch, rows], block_lse[batch, :, rows]
                merge_(running[batch, rows], lse[batch, :, rows], *block, result)


def _rounds(table: DeviceTable) -> list[tuple[Table, list[Segment], bool]]:
    """Tables whose strips have one segment each: the n-th segments of all strips, those that begin a row apart from the
    others; with the segments as the planner flagged them, and whether they begin rows.

    Kept with the table: every layer of a model walks the same.
    """
    rounds: list[tuple[Table, list[Segment], bool]] | None = table.host.cache.get("rounds")
    if rounds is None:
        rounds = []
        for column in zip_longest(*table.host.grouped):
            for first in (True, False):
                originals = [segment for segment in column if segment and bool(segment.flags & FIRST) == first]
                rounds.append((_alone(originals), originals, first))
        table.host.cache["rounds"] = rounds
    return rounds


def _alone(segments: list[Segment]) -> Table:
    rows = [segment._replace(flags=FIRST | LAST) for segment in segments]
    return Table(np.array(rows, np.int32).reshape(-1, len(COLUMNS)), np.arange(len(rows) + 1, dtype=np.int32))


def accumulating(backend: Backend, device: torch.device) -> Any:
    """The backend itself where it keeps a running state, else wrapped."""
    return backend if backend.capabilities(device).accumulate else Accumulating(backend)
