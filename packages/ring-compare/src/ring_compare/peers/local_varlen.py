"""Packed documents on one rank with all keys local: one varlen call over its tokens.

Every run of consecutive local tokens inside one document is a sequence of the call; its keys are the document up to the
run's end (aligned bottom-right, hence causal), gathered before the clock starts. Where a rank holds two runs of one
document, the shared keys are there twice, which costs memory only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ring_compare.documents import boundaries, document_lengths, pieces
from ring_compare.implementations import Traits
from ring_compare.places import layout_positions, put_together
from ring_compare.single import flash_attn_here
from ring_compare.suites import Cell


@dataclass(frozen=True, eq=False)
class _Share:
    """A rank's keys (T, Hkv, D) and the boundaries of its sequences."""

    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


Varlen = Callable[[Tensor, Tensor, Tensor, _Share, bool], Tensor]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, share: _Share, causal: bool) -> Tensor:
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    out: Tensor = function(q, k, v, share.cu_q, share.cu_k, share.max_q, share.max_k, causal=causal)
    return out


def _plain(q: Tensor, k: Tensor, v: Tensor, share: _Share, causal: bool) -> Tensor:
    """The same on a CPU, for tests."""
    group, parts = q.shape[1] // k.shape[1], []
    for index in range(len(share.cu_q) - 1):
        rows = slice(int(share.cu_q[index]), int(share.cu_q[index + 1]))
        keys = slice(int(share.cu_k[index]), int(share.cu_k[index + 1]))
        key, value = (x[keys].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows] * q.shape[2] ** -0.5, key)
        if causal:
            shift = scores.shape[2] - scores.shape[1]
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(shift + 1), float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), value))
    return torch.cat(parts)


class LocalVarlen:
    """flash-attn's varlen function on a rank's share."""

    name = "local-varlen"
    traits = Traits(own_schedule=True, label=name, omits=frozenset(("lse", "dk", "dv")))

    def __init__(self) -> None:
        self._shares: dict[tuple[Cell, int, int], _Share] = {}

    def provider(self, device: torch.device) -> str:
        """flash-attn; plain torch on a CPU."""
        return "flash-attn" if device.type == "cuda" else "torch"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """Packed documents, causal or full, where flash-attn is installed."""
        if not cell.documents:
            return "it is a yardstick for packed documents"
        if cell.mask == "window":
            return "causal and full masks only"
        if device.type == "cuda" and not flash_attn_here(device):
            return "flash-attn is not installed"
        if device.type == "cuda" and cell.dtype not in ("bfloat16", "float16"):
            return f"flash-attn takes no {cell.dtype}"
        return None

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """out; the first call with these keys fetches everybody's, untimed."""
        key = cell, k.data_ptr(), v.data_ptr()
        if key not in self._shares:
            self._shares[key] = _fill(k.detach(), v.detach(), cell, group)
        share = self._shares[key]
        # The keys take part in the backward, as in training; their gradients stay with the share.
        keys, values = (x.detach().requires_grad_(q.requires_grad) for x in (share.k, share.v))
        attend: Varlen = _flash_attn if q.device.type == "cuda" else _plain
        return attend(q[0], keys, values, share, cell.causal)[None], None


def _fill(k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None) -> _Share:
    rank = dist.get_rank(group) if cell.world_size > 1 else 0
    places = [layout_positions(cell, other, cell.Sk) for other in range(cell.world_size)]
    ends = boundaries(document_lengths(cell.documents, cell.Sk))
    runs = pieces(places[rank].tolist(), ends)
    sees = [(start, last if cell.causal else min(end for end in ends if end > start)) for start, _, last in runs]
    chosen = torch.cat([torch.arange(low, high) for low, high in sees]).to(k.device)
    keys, values = (_whole(x, places, cell, group)[0, chosen] for x in (k, v))  # (T, Hkv, D)
    q_lengths, k_lengths = [last - first for _, first, last in runs], [high - low for low, high in sees]
    cu_q, cu_k = (torch.tensor(boundaries(x), dtype=torch.int32, device=k.device) for x in (q_lengths, k_lengths))
    return _Share(keys, values, cu_q, cu_k, max(q_lengths), max(k_lengths))


def _whole(x: Tensor, places: list[Tensor], cell: Cell, group: dist.ProcessGroup | None) -> Tensor:
    shards = [x]
    if cell.world_size > 1:
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(cell.world_size)]
        dist.all_gather(shards, x.contiguous(), group=group)
    return put_together(shards, places, 1)
