"""Counts and rates: visible pairs, FLOPs, throughput, sample statistics. Pure Python and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ring_compare.documents import document_lengths
from ring_compare.suites import Cell

BACKWARD_FACTOR = 2.5  # five matrix products against two, the convention of the field
_PER_FORWARD = {"fwd": 1.0, "bwd": BACKWARD_FACTOR, "fwd+bwd": 1 + BACKWARD_FACTOR}


def visible_pairs(seq_q: int, seq_k: int, *, causal: bool, window_size: tuple[int, int]) -> int:
    """Exact number of (query, key) pairs that see each other; query i stands at position i + (Sk - Sq)."""
    left, right = window_size
    position = np.arange(seq_q, dtype=np.int64) + (seq_k - seq_q)
    right = 0 if causal and right < 0 else min(right, 0) if causal else right
    low = np.zeros_like(position) if left < 0 else position - left
    high = np.full_like(position, seq_k - 1) if right < 0 else position + right
    count = np.minimum(high, seq_k - 1) - np.maximum(low, 0) + 1
    return int(np.maximum(count, 0).sum())


def forward_flops(cell: Cell) -> float:
    """4·B·H·S²·D, half of it when causal (the convention of published figures); exact pairs for everything else."""
    per_pair = 4.0 * cell.B * cell.Hq * cell.D
    if cell.documents:
        return per_pair * sum(_document_pairs(cell, length) for length in document_lengths(cell.documents, cell.Sq))
    if cell.mask == "full":
        return per_pair * cell.Sq * cell.Sk
    if cell.mask == "causal" and cell.Sq == cell.Sk:
        return per_pair * cell.Sq * cell.Sk / 2
    return per_pair * visible_pairs(cell.Sq, cell.Sk, causal=cell.causal, window_size=cell.window_size)


def _document_pairs(cell: Cell, length: int) -> float:
    if cell.mask == "window":
        return visible_pairs(length, length, causal=False, window_size=cell.window_size)
    return length * length / (2 if cell.causal else 1)


def phase_flops(cell: Cell, phase: str) -> float:
    """FLOPs of one call of a phase, `fwd`, `bwd` or `fwd+bwd`, over all ranks."""
    return forward_flops(cell) * _PER_FORWARD[phase]


@dataclass(frozen=True)
class Summary:
    """What the samples of one row say."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    iterations_per_s: float
    tokens_per_s: float
    tflops_per_gpu: float


def summarise(cell: Cell, phase: str, samples_ms: Sequence[float]) -> Summary:
    """Median, spread and rates of raw samples (milliseconds per call, already the slowest rank's)."""
    if not samples_ms:
        raise ValueError("summarise needs at least one sample")
    median, p20, p80 = (float(x) for x in np.percentile(np.asarray(samples_ms, dtype=np.float64), (50, 20, 80)))
    per_second = 1e3 / median
    return Summary(
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        iterations_per_s=per_second,
        tokens_per_s=per_second * cell.B * cell.Sq,
        tflops_per_gpu=phase_flops(cell, phase) * per_second / cell.world_size / 1e12,
    )
