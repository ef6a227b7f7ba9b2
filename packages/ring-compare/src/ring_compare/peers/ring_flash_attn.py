"""ring-flash-attn 0.1.8 (zhuzilin): ring, zigzag and stripe rings around flash-attn, and varlen rings.

Its `adapters` module patches transformers and cannot be imported beside current releases; nothing here needs it, so an
empty module takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ring_compare.documents import boundaries, document_lengths
from ring_compare.implementations import Traits
from ring_compare.places import layout_positions
from ring_compare.suites import Cell

PACKAGE = "ring_flash_attn"
_FUNCTIONS = {
    "contiguous": "ring_flash_attn_func",
    "zigzag": "zigzag_ring_flash_attn_func",
    "stripe": "stripe_flash_attn_func",
}
_LLAMA3_HEADS = 4
"""heads_k_stride of its own benchmark."""


def load_library() -> ModuleType:
    """The package without its adapters. Raises ImportError where it, or flash-attn, is not installed."""
    if PACKAGE not in sys.modules:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ImportError("ring-flash-attn is not installed: pip install 'ring-compare[peers]'")
        adapters = ModuleType(f"{PACKAGE}.adapters")
        # What the package's __init__ takes from there.
        for name in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
            setattr(adapters, name, None)
        sys.modules[adapters.__name__] = adapters
    return importlib.import_module(PACKAGE)


def zigzag_document_positions(cell: Cell, rank: int, length: int) -> torch.Tensor:
    """Its varlen zigzag deals out every document by itself: pieces r and 2W - 1 - r of each one's 2W."""
    pieces = 2 * cell.world_size
    parts, start = [], 0
    for document in document_lengths(cell.documents, length):
        share = document // pieces
        parts += [start + piece * share + torch.arange(share) for piece in (rank, pieces - 1 - rank)]
        start += document
    return torch.cat(parts)


class RingFlashAttn:
    """The function of the layout; of packed documents the varlen zigzag, or with the option "llama3" its gather."""

    def __init__(self, option: str = "") -> None:
        if option not in ("", "llama3"):
            raise ValueError(f"ring-flash-attn has no option {option!r}; there is llama3")
        self.name = f"ring-flash-attn[{option}]" if option else "ring-flash-attn"
        self._llama3 = bool(option)
        self.traits = Traits(
            own_schedule=True, label=self.name, positions=None if option else _positions, omits=frozenset(("lse",))
        )
        self._library = load_library()
        self._documents: dict[tuple[Cell, int], dict[str, Any]] = {}

    def provider(self, device: torch.device) -> str:
        """Always the FA2 of flash-attn."""
        return "flash-attn"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """Only what it computes right: its windows are relative to each block, its stripes and zigzags causal."""
        if device.type != "cuda":
            return "flash-attn runs on CUDA devices only"
        if cell.dtype not in ("bfloat16", "float16"):
            return f"flash-attn takes no {cell.dtype}"
        if cell.mask == "window":
            return "it applies windows to each block by itself"
        if cell.world_size == 1:
            return "one rank is no ring: its backward would send to itself, which torch refuses"
        if cell.Sq != cell.Sk:
            return "its rings need as many keys as queries"
        if cell.documents:
            return self._supports_documents(cell)
        if self._llama3:
            return "llama3 is a function for packed documents"
        if cell.layout != "contiguous" and not cell.causal:
            return f"its {cell.layout} ring is causal only"
        return None

    def _supports_documents(self, cell: Cell) -> str | None:
        if not cell.causal:
            return "compared on causal documents only"
        if self._llama3:
            return None if cell.layout == "contiguous" else "its llama3 function takes contiguous chunks"
        if cell.layout != "zigzag":
            return "of its varlen rings only zigzag is compared"
        pieces = 2 * cell.world_size
        uneven = [length for length in document_lengths(cell.documents, cell.Sq) if length % pieces]
        return f"every document must divide by {pieces}; {len(uneven)} do not" if uneven else None

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Its own function; lse is left out of documents, where its shape depends on the release of flash-attn."""
        if cell.documents:
            return self._packed(q, k, v, cell, group), None
        function = getattr(self._library, _FUNCTIONS[cell.layout])
        out, lse, _ = function(q, k, v, causal=cell.causal, return_attn_probs=True, group=group)
        return out, lse

    def _packed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        rank = dist.get_rank(group) if cell.world_size > 1 else 0
        if (cell, rank) not in self._documents:  # it synchronises: once, as a training step would before its layers
            self._documents[cell, rank] = self._prepare(cell, rank, q.device)
        arguments = self._documents[cell, rank]
        name = "llama3_flash_attn_varlen_func" if self._llama3 else "zigzag_ring_flash_attn_varlen_func"
        function = getattr(self._library, name)
        out: torch.Tensor = function(q[0], k[0], v[0], causal=True, group=group, **arguments)
        return out[None]

    def _prepare(self, cell: Cell, rank: int, device: torch.device) -> dict[str, Any]:
        lengths = document_lengths(cell.documents, cell.Sq)
        if not self._llama3:
            local = [length // cell.world_size for length in lengths]
            cu_seqlens = torch.tensor(boundaries(local), dtype=torch.int32, device=device)
            return {"cu_seqlens": cu_seqlens, "max_seqlen": max(local)}
        cu_seqlens = torch.tensor(boundaries(lengths), dtype=torch.int32, device=device)
        prepare = self._library.llama3_flash_attn_prepare_cu_seqlens
        cu_q, cu_k, max_q, max_k, local_k = prepare(cu_seqlens, True, rank, cell.world_size)
        return {
            "cu_seqlens_q": cu_q,
            "cu_seqlens_k": cu_k,
            "max_seqlen_q": max_q,
            "max_seqlen_k": max_k,
            "heads_k_stride": min(_LLAMA3_HEADS, cell.Hkv),
            "local_k_slice": local_k,
        }


def _positions(cell: Cell, rank: int, length: int) -> torch.Tensor:
    if cell.documents:
        return zigzag_document_positions(cell, rank, length)
    return layout_positions(cell, rank, length)
