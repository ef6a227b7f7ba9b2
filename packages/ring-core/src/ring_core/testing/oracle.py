"""The truth that everything else is tested against: attention by brute force, in float64, on whole sequences.

It shares no code with the library. What it leaves out on purpose: tiling, online softmax, written-out gradients, bands,
layouts. It has positions, a dense boolean mask, one softmax and torch.autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK_BYTES = 1 << 30
BYTES_PER_SCORE = 120  # float64 temporaries of one score that forward and backward hold at once, generously

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class OracleResult:
    """float64: out (B, Sq, Hq, Dv), lse (B, Hq, Sq) natural log; gradients like their inputs, None if not asked for."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dsinks: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """Everything about one attention call but its tensors' values; arguments as in `attention_oracle`."""

    batch: int
    q_length: int
    k_length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    total_length: int | tuple[int, int] | None = None
    cu_seqlens_q: Sequence[int] | None = None
    cu_seqlens_k: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(f"{self.q_heads} query heads are no multiple of {self.kv_heads} key heads")
        if min(self.window_size) < -1:
            raise ValueError(f"a window side is -1 (unbounded) or at least 0, got {self.window_size}")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")
        if self.dropout_p > 0.0 and self.dropout_seed is None:
            raise ValueError("dropout_p > 0 needs a dropout_seed")
        if self.softcap < 0.0:
            raise ValueError(f"softcap must be at least 0, got {self.softcap}")
        if isinstance(self.total_length, int) and self.q_length != self.k_length:
            raise ValueError("total_length must be a pair when q and k have different lengths")
        if self.cu_seqlens_k is not None and self.cu_seqlens_q is None:
            raise ValueError("cu_seqlens_k needs cu_seqlens_q")
        if self.cu_seqlens_q is not None and (self.batch != 1 or self.total_length is not None):
            raise ValueError("cu_seqlens_q needs a batch of 1 and no total_length")
        for q_start, q_end, k_start, k_end in self.documents:
            if not (0 <= q_start <= q_end <= self.q_length and 0 <= k_start <= k_end <= self.k_length):
                raise ValueError(f"document q {q_start}:{q_end}, k {k_start}:{k_end} lies outside the sequences")

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q_heads // self.kv_heads

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def documents(self) -> list[tuple[int, int, int, int]]:
        """(q_start, q_end, k_start, k_end) of every document; one document without cu_seqlens. Padding is in none."""
        if self.cu_seqlens_q is None:
            total = self.total_length
            if total is None:
                total = (self.q_length, self.k_length)
            q_total, k_total = (total, total) if isinstance(total, int) else total
            return [(0, q_total, 0, k_total)]
        cu_q = list(self.cu_seqlens_q)
        cu_k = cu_q if self.cu_seqlens_k is None else list(self.cu_seqlens_k)
        if len(cu_q) != len(cu_k):
            raise ValueError(f"cu_seqlens_q has {len(cu_q)} entries, cu_seqlens_k has {len(cu_k)}")
        return list(zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True))


@dataclass(frozen=True)
class Block:
    """Some query rows of one batch entry, key head and document, against all of the document's keys.

    visible: bool (rows, keys). distance: int64 (rows, keys), |query position - key position|. kept: bool
    (group, rows, keys), the probabilities that dropout keeps, or None.
    """

    batch: int
    kv_head: int
    heads: slice
    rows: slice
    keys: slice
    visible: Tensor
    distance: Tensor
    kept: Tensor | None


def blocks(problem: Problem, device: torch.device) -> Iterator[Block]:
    """Cut a problem into independent softmaxes that fit into memory."""
    group = problem.group
    left, right = problem.window_size
    if problem.causal:
        right = 0 if right == -1 else min(right, 0)
    for q_start, q_end, k_start, k_end in problem.documents:
        keys = k_end - k_start
        step = max(1, BLOCK_BYTES // (BYTES_PER_SCORE * group * max(1, keys)))
        for start in range(q_start, q_end, step):
            end = min(q_end, start + step)
            # Positions inside the document: the last query stands where the last key stands.
            k_position = torch.arange(keys, device=device)[None, :]
            q_position = torch.arange(start - q_start, end - q_start, device=device)[:, None] + keys - (q_end - q_start)
            offset = k_position - q_position
            visible = torch.ones_like(offset, dtype=torch.bool)
            if left != -1:
                visible &= offset >= -left
            if right != -1:
                visible &= offset <= right
            for batch in range(problem.batch):
                for kv_head in range(problem.kv_heads):
                    heads = slice(kv_head * group, (kv_head + 1) * group)
                    kept = None
                    if problem.dropout_p > 0.0:
                        assert problem.dropout_seed is not None
                        # Positions in the packed stream of keys: a document starts at k_start.
                        positions = (k_start + q_position[:, 0].cpu().numpy(), np.arange(k_start, k_end))
                        mask = dropout_kept(
                            problem.dropout_p,
                            problem.dropout_seed,
                            *positions,
                            np.arange(heads.start, heads.stop),
                            batch,
                        )
                        kept = torch.from_numpy(mask).to(device)
                    yield Block(
                        batch, kv_head, heads, slice(start, end), slice(k_start, k_end), visible, offset.abs(), kept
                    )


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    total_length: int | tuple[int, int] | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
) -> OracleResult:
    """Attention of the whole sequence, computed in float64 on the tensors' device.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), any float dtype; query head h uses key head
    h // (Hq // Hkv). Query i stands at position i + (Sk - Sq), and sees key j iff left <= ... <= right:
    -left <= j - position <= right, where -1 is unbounded and causal means right = 0.

    alibi_slopes (Hq,) or (B, Hq): -slope * |position - j| is added to the scaled, capped scores.
    sinks (Hq,): one more logit in each softmax's denominator; part of lse, not of out.
    dropout_seed: int64 as in the library's contract; lse is that without dropout.
    total_length: true lengths (Tq, Tk), or one int where Sq == Sk. Positions use these; later keys are not seen.
    cu_seqlens_q, cu_seqlens_k (default: the same): documents packed into a batch of 1, each attending to itself.
    dout (B, Sq, Hq, Dv), dlse (B, Hq, Sq): upstream gradients, None = zeros; gradients are computed if either is given.

    A row that sees nothing has out 0 and passes no gradient to q, k and v; its lse is -inf, or the sink (whose gradient
    is then the row's dlse). Padding rows, after the true length or the last document, have lse -inf even with sinks,
    and nothing that they hold matters. Raises ValueError for arguments that contradict each other.
    """
    problem = Problem(
        *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]),
        causal=causal,
        window_size=window_size,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        total_length=total_length,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    with_gradients = dout is not None or dlse is not None
    q, k, v = (tensor.detach().double() for tensor in (q, k, v))
    slopes = None if alibi_slopes is None else alibi_slopes.detach().double().expand(problem.batch, problem.q_heads)
    sinks = None if sinks is None else sinks.detach().double()
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full((problem.batch, problem.q_heads, problem.q_length), -math.inf)
    dout = torch.zeros_like(out) if dout is None else dout.detach().double()
    dlse = torch.zeros_like(lse) if dlse is None else dlse.detach().double()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    for block in blocks(problem, q.device):
        rows, keys, heads = block.rows, block.keys, block.heads
        inputs = [
            q[block.batch, rows, heads].transpose(0, 1),  # (group, rows, D)
            k[block.batch, keys, block.kv_head],  # (keys, D)
            v[block.batch, keys, block.kv_head],  # (keys, Dv)
        ]
        if sinks is not None:
            inputs.append(sinks[heads])  # (group,)
        inputs = [tensor.detach().clone().requires_grad_(with_gradients) for tensor in inputs]
        block_slopes = None if slopes is None else slopes[block.batch, heads]
        with torch.enable_grad():
            block_out, block_lse = _softmax_attention(problem, block, block_slopes, *inputs)
        out[block.batch, rows, heads] = block_out.detach().transpose(0, 1)
        lse[block.batch, heads, rows] = block_lse.detach()
        if not with_gradients:
            continue
        seen = block.visible.any(dim=1)  # (rows,)
        upstream = torch.where(seen[:, None], dout[block.batch, rows, heads].transpose(0, 1), 0.0)
        upstream_lse = torch.where(block_lse == -math.inf, 0.0, dlse[block.batch, heads, rows])
        grads = torch.autograd.grad((block_out, block_lse), inputs, (upstream, upstream_lse))
        dq[block.batch, rows, heads] = grads[0].transpose(0, 1)
        dk[block.batch, keys, block.kv_head] += grads[1]
        dv[block.batch, keys, block.kv_head] += grads[2]
        if dsinks is not None:
            dsinks[heads] += grads[3]
    return OracleResult(out, lse, dq, dk, dv, dsinks) if with_gradients else OracleResult(out, lse)


def _softmax_attention(
    problem: Problem,
    block: Block,
    slopes: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (group, rows, D), k (keys, D), v (keys, Dv) -> out (group, rows, Dv), lse (group, rows), differentiable."""
    scores = torch.einsum("grd,kd->grk", q, k) * problem.softmax_scale
    if problem.softcap > 0.0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * block.distance
    # The maximum only keeps exp() in range; the result does not depend on it, so no gradient need pass through it.
    maximum = (
        scores.new_full(scores.shape[:2], -math.inf) if sinks is None else sinks.detach()[:, None].expand(q.shape[:2])
    )
    if scores.shape[2]:
        maximum = torch.maximum(maximum, scores.detach().masked_fill(~block.visible, -math.inf).amax(dim=2))
    maximum = torch.where(maximum == -math.inf, 0.0, maximum)
    # Hidden scores are replaced before exp(), so that neither their values nor their gradients can be inf or nan.
    weights = torch.exp(torch.where(block.visible, scores - maximum[:, :, None], 0.0))
    weights = torch.where(block.visible, weights, 0.0)
    total = weights.sum(dim=2)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None] - maximum)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, maximum + torch.log(total))
    probabilities = weights / total[:, :, None]
    if block.kept is not None:
        probabilities = torch.where(block.kept, probabilities / (1.0 - problem.dropout_p), 0.0)
    return torch.einsum("grk,kd->grd", probabilities, v), lse


def philox4x32(
    counter: Sequence[npt.ArrayLike], key: tuple[int, int], rounds: int = 10
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32 of Salmon et al. (Random123): four counter words (arrays that broadcast) and two key words.

    Words are uint32 values in uint64 arrays, so that a product of two fits.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(rounds):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_kept(
    dropout_p: float,
    seed: int,
    q_positions: npt.NDArray[np.int64],
    k_positions: npt.NDArray[np.int64],
    heads: npt.NDArray[np.int64],
    batch: int,
) -> npt.NDArray[np.bool_]:
    """Which probabilities dropout keeps: bool (heads, q_positions, k_positions). Positions may be negative."""
    q_words = (q_positions & 0xFFFFFFFF).astype(np.uint64)[None, :, None]
    k_words = (k_positions & 0xFFFFFFFF).astype(np.uint64)[None, None, :]
    head_words = heads.astype(np.uint64)[:, None, None]
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    word, *_ = philox4x32((k_words, q_words, head_words, batch), key)
    kept: npt.NDArray[np.bool_] = word >= np.uint64(math.floor(dropout_p * 2**32))
    return kept
