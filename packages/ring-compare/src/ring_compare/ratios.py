"""What one line of a report is against others of the same problem, measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ring_compare.lines import Line
from ring_compare.records import Result
from ring_compare.suites import PHASES, Cell

PEER, PEER_OF_DOCUMENTS = "ring-flash-attn", "ring-flash-attn[llama3]"
_COMPARED = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Ratios:
    """By phase, or None where either side was not measured."""

    speed: dict[str, float | None]
    """Rate against ring-flash-attn's zigzag (or its llama3, of documents that zigzag cannot cut): above 1 is faster."""
    overhead: dict[str, float | None]
    """Time against the same kernels with all keys local: 1 is no overhead."""
    memory: float | None
    """Peak memory beyond inputs and outputs, forward and backward, against ring-flash-attn's."""
    accuracy: float | None
    """The worst of the errors of out, dq, dk, dv against those of one call on the whole sequence."""


def find(lines: Sequence[Line], implementation: str, layout: str) -> Line | None:
    """The line of an implementation with a schedule of its own."""
    chosen = (line for line in lines if line.implementation == implementation and line.cell.layout == layout)
    return next((line for line in chosen if any(line.rate(phase) for phase in PHASES)), None)


def peer(lines: Sequence[Line]) -> Line | None:
    """What the lines of a problem are compared with."""
    return find(lines, PEER, "zigzag") or find(lines, PEER_OF_DOCUMENTS, "contiguous")


def kernels_alone(line: Line, lines: Sequence[Line]) -> Line | None:
    """The yardstick of a line: its provider's kernels with all keys local, on the same layout."""
    if line.cell.documents:
        return find(lines, "local-varlen", line.cell.layout)
    return find(lines, f"local[{line.implementation}]", line.cell.layout)


def ratios(line: Line, lines: Sequence[Line]) -> Ratios:
    """Of a line among those of its problem."""
    other, alone = peer(lines), kernels_alone(line, lines)
    return Ratios(
        speed={phase: _quotient(line.rate(phase), _rate(other, phase)) for phase in PHASES},
        overhead={phase: _quotient(_rate(alone, phase), line.rate(phase)) for phase in PHASES},
        memory=_quotient(
            extra_memory(line.pair.get("fwd+bwd")), None if other is None else extra_memory(other.pair.get("fwd+bwd"))
        ),
        accuracy=accuracy(line),
    )


def _rate(line: Line | None, phase: str) -> float | None:
    return None if line is None else line.rate(phase)


def _quotient(value: float | None, by: float | None) -> float | None:
    return None if value is None or by is None or by <= 0 else value / by


def output_bytes(cell: Cell, phase: str) -> int:
    """Bytes of one rank's out and lse, and of its gradients where the phase makes any."""
    queries, keys = cell.B * cell.Sq // cell.world_size, cell.B * cell.Sk // cell.world_size
    size: int = getattr(torch, cell.dtype).itemsize
    total = queries * cell.Hq * (cell.D * size + 4)
    if phase != "fwd":
        total += (queries * cell.Hq + 2 * keys * cell.Hkv) * cell.D * size
    return total


def extra_memory(result: Result | None) -> float | None:
    """Peak bytes beyond inputs and outputs, None where unknown."""
    if result is None or result.status != "ok" or result.peak_memory_bytes is None:
        return None
    return float(max(0, result.peak_memory_bytes - output_bytes(result.cell, result.phase)))


def accuracy(line: Line) -> float | None:
    """The worst quotient of relative errors; NaN if one is NaN."""
    found = [
        _quotient(result.errors[tensor]["relative"], result.single_errors[tensor]["relative"])
        for result in line.pair.values()
        for tensor in _COMPARED
        if tensor in result.errors and tensor in result.single_errors
    ]
    values = [x for x in found if x is not None]
    return math.nan if any(x != x for x in values) else max(values, default=None)
