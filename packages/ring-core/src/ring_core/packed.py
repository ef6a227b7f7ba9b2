"""Packed documents, dealt out over the ranks of a group: planned once, used in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ring_core._torch import constant_in_graphs, lasting
from ring_core.checks import check_window
from ring_core.group import Group
from ring_core.layout import gather_uneven, place_of
from ring_core.plan.dealing import Cells, PackedLayoutName
from ring_core.plan.packed import PackedProblem

CuSeqlens = Sequence[int] | Tensor
"""Where documents begin in their stream, and last its length: [0, ..., tokens]."""


class PackedPlan:
    """Documents packed into one stream, and which of its tokens each rank holds. Made by `plan_packed`; equal and
    hashed by what it says.

    Attributes:
        layout, world_size, rank: as planned.
        local_length, local_length_k: tokens of q, and of k and v, that this rank holds. Ranks differ by one where the
            stream does not divide.
        causal, window_size: of the documents.
        max_seqlen: tokens of the longest document, of q or k.
        code: int64, on the CPU: the whole plan but the rank, which is how compiled graphs get it.
    """

    def __init__(self, problem: PackedProblem, rank: int, group: Group | None) -> None:
        self.problem = problem
        self.rank = rank
        self.group = group
        self.layout = cast(PackedLayoutName, problem.layout)
        self.world_size = problem.world_size
        self.local_length = int(problem.queries.lengths[rank])
        self.local_length_k = problem.key_chunk(rank)
        left, right = problem.documents.left, problem.documents.right
        self.causal = right == 0
        self.window_size = (-1 if left is None else left, -1 if right is None else right)
        self.max_seqlen = int(
            max(np.diff(cu).max(initial=0) for cu in (problem.documents.cu_q, problem.documents.cu_k))
        )
        self._hash = hash((problem, rank))
        with lasting():
            self.code = torch.frombuffer(bytearray(problem.code), dtype=torch.int64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedPlan) and (self.problem, self.rank) == (other.problem, other.rank)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        documents = self.problem.documents
        tokens = f"{documents.q_length} tokens"
        if documents.k_length != documents.q_length:
            tokens = f"{documents.q_length} queries and {documents.k_length} keys"
        mask = "causal" if self.causal else "not causal"
        if self.window_size[0] >= 0 or self.window_size[1] > 0:
            mask += f", window {self.window_size}"
        runs = len(self.problem.queries.runs(self.rank))
        return (
            f"PackedPlan({len(documents.cu_q) - 1} documents, {tokens}, {mask}, {self.layout}; rank {self.rank} of "
            f"{self.world_size}: {self.local_length} tokens in {runs} runs; most work / mean {self.imbalance:.3f})"
        )

    @property
    def imbalance(self) -> float:
        """The most FLOPs of any rank over their mean: 1 is perfect, W is one rank doing all."""
        mean = sum(self.problem.pairs) / self.world_size
        return max(self.problem.pairs) / mean if mean else 1.0

    def shard(self, tensor: Tensor, dim: int = 0, *, keys: bool = False) -> Tensor:
        """This rank's tokens of the whole stream along `dim`. Differentiable; no communication.

        Args:
            keys: whether it is the stream of keys, where that differs.

        Raises:
            ValueError: the tensor has another number of tokens than the stream.
        """
        cells, total = self._stream(keys)
        if tensor.shape[dim] != total:
            raise ValueError(f"the stream has {total} tokens, the tensor {tensor.shape[dim]} along dim {dim}")
        runs = [tensor.narrow(dim, start, stop - start) for start, stop in cells.runs(self.rank)]
        return torch.cat(runs, dim=dim) if runs else tensor.narrow(dim, 0, 0).contiguous()

    def join(self, shards: Sequence[Tensor], dim: int = 0, *, keys: bool = False) -> Tensor:
        """The whole stream from the shards of all ranks, in rank order: the inverse of `shard`. Differentiable.

        Raises:
            ValueError: shards are missing, or have other lengths than planned.
        """
        cells, _ = self._stream(keys)
        lengths = [shard.shape[dim] for shard in shards]
        if lengths != cells.lengths.tolist():
            raise ValueError(f"the shards must have {cells.lengths.tolist()} tokens, by rank, got {lengths}")
        columns = (cells.owner, cells.local, cells.stop - cells.start)
        runs = zip(*(column.tolist() for column in columns), strict=True)
        parts = [shards[owner].narrow(dim, local, length) for owner, local, length in runs]
        return torch.cat(parts, dim=dim) if parts else shards[0]

    def unshard(self, tensor: Tensor, dim: int = 0, *, keys: bool = False) -> Tensor:
        """The whole stream on every rank, from every rank's tokens: an all-gather over the group.

        Differentiable as `ring_core.unshard_sequence` is: gradients of all ranks' uses are summed.
        """
        cells, _ = self._stream(keys)
        if tensor.shape[dim] != cells.lengths[self.rank]:
            raise ValueError(
                f"rank {self.rank} holds {cells.lengths[self.rank]} tokens, the tensor has {tensor.shape[dim]} along "
                f"dim {dim}"
            )
        return self.join(gather_uneven(tensor, cells.lengths.tolist(), dim, self.group), dim, keys=keys)

    def positions(self, device: torch.device | str | None = None, *, keys: bool = False) -> Tensor:
        """int64 (local_length,): the position of each local token in its document, for rotary embeddings. Where a
        document has more keys than queries, its last query sits at its last key."""
        in_queries, in_keys = self._positions
        return torch.from_numpy((in_keys if keys else in_queries).copy()).to(device)

    @cached_property
    def _positions(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
        documents = self.problem.documents
        found = []
        for cells, cu in ((self.problem.queries, documents.cu_q), (self.problem.keys, documents.cu_k)):
            runs = [np.arange(start, stop) for start, stop in cells.runs(self.rank)]
            token = np.concatenate([np.zeros(0, np.int64), *runs])
            document = np.searchsorted(cu, token, side="right") - 1
            last = cu[document + 1] if len(token) else token
            length = documents.cu_k[document + 1] - documents.cu_k[document] if len(token) else token
            found.append(token - last + length)
        return tuple(found)

    def _stream(self, keys: bool) -> tuple[Cells, int]:
        problem = self.problem
        return (problem.keys, problem.k_length) if keys else (problem.queries, problem.q_length)


def plan_packed(
    cu_seqlens: CuSeqlens,
    *,
    cu_seqlens_k: CuSeqlens | None = None,
    layout: PackedLayoutName = "contiguous",
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    group: Group | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> PackedPlan:
    """Plans the attention of packed documents: who holds which tokens of the stream, who sees what.

    Every rank of a group makes it from the same arguments, once a batch, and uses it in every layer. Costs a few
    milliseconds of host time; what was planned before is remembered.

    Args:
        cu_seqlens: [0, ..., T], where each document begins in the *global* stream of all ranks together, and its
            length T. A list, a tuple or a CPU tensor costs no synchronisation; a CUDA tensor costs one (it is copied to
            the host). Documents of any length, none included, crossing ranks anywhere; T need not divide.
        cu_seqlens_k: the same for keys and values where they have a stream of their own: documents are paired by index,
            and the last query of each sits at its last key.
        layout: "contiguous" (rank r holds tokens r T / W and on), "zigzag" (half-chunks r and 2W-1-r: even where one
            causal document fills the stream) or "balanced" (equal tokens and equal work for these documents and this
            mask, in few runs).
        causal, window_size: as in `ring_core.ring_attention`, inside each document.
        group, rank, world_size: whose place; by default this process's in `group` (the default group).

    Returns:
        A hashable plan of this rank, for all layers, which also shards tensors and joins them again.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was given and what is needed.
    """
    where, size = place_of(rank, world_size, group)
    left, right = check_window(window_size, causal)
    ends = _on_host("cu_seqlens", cu_seqlens)
    ends_k = None if cu_seqlens_k is None else _on_host("cu_seqlens_k", cu_seqlens_k)
    bounds = None if left < 0 else left, None if right < 0 else right
    plan: PackedPlan = _plan(ends, ends_k, *bounds, layout, size, where, group)
    return plan


@constant_in_graphs  # of a list
def _plan(
    ends: tuple[int, ...],
    ends_k: tuple[int, ...] | None,
    left: int | None,
    right: int | None,
    layout: str,
    world_size: int,
    rank: int,
    group: Group | None,
) -> PackedPlan:
    return PackedPlan(_problem(ends, ends_k, left, right, layout, world_size), rank, group)


@lru_cache(maxsize=256)
def _problem(
    ends: tuple[int, ...],
    ends_k: tuple[int, ...] | None,
    left: int | None,
    right: int | None,
    layout: str,
    world_size: int,
) -> PackedProblem:
    return PackedProblem.of(ends, ends_k, left, right, layout, world_size)


def _on_host(name: str, cu_seqlens: CuSeqlens) -> tuple[int, ...]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
            raise ValueError(
                f"{name} must be int32 or int64 of one dimension, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        if torch.compiler.is_compiling():
            raise TypeError(f"{name} as a tensor cannot be read in a compiled graph: pass a plan made outside of it")
        return tuple(cu_seqlens.tolist())  # of a CUDA tensor: waits for it
    if not isinstance(cu_seqlens, Sequence) or not all(isinstance(end, (int, np.integer)) for end in cu_seqlens):
        raise TypeError(f"{name} must be a list of ints or a tensor, got {type(cu_seqlens).__name__}")
    return tuple(int(end) for end in cu_seqlens)


def global_cu_seqlens(local_cu_seqlens: CuSeqlens, world_size: int) -> CuSeqlens:
    """From the cu_seqlens of ring-flash-attn's ring and zigzag functions (every document split over all ranks, ends
    counted on one rank) to the global ones that the functions here take.

    The data must be dealt out anew as well: there every rank holds a part of every document, here a stretch of the
    stream (`plan_packed(...).shard`), and documents no longer need padding to a multiple of the world size.
    """
    if isinstance(local_cu_seqlens, Tensor):
        return local_cu_seqlens * world_size
    return [end * world_size for end in local_cu_seqlens]
