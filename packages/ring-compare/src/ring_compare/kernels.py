"""What a kernel on one GPU is against others of its problem, measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ring_compare.implementations import split_option
from ring_compare.lines import NATIVE, Line

CUDNN = ("native[cudnn]", "sdpa[cudnn]")
FA2 = (NATIVE, "native[flash-attn]", "native[aten]", "sdpa[flash]")
FA3, FA4, FLEX = ("native[fa3]",), ("native[fa4]",), ("flex",)
"""Names of yardsticks in records; where there are several, the best of those measured counts."""


def of_one_gpu(line: Line) -> bool:
    """Whether the backward was timed by itself, as it is of kernels only."""
    return "bwd" in line.pair


def _seeds(line: Line) -> set[int]:
    return {result.seed for result in line.pair.values()}


def _beside(line: Line, lines: Sequence[Line], names: Iterable[str]) -> list[Line]:
    """Those of these names that the same run measured: a run's problem has one seed."""
    wanted = set(names)
    return [other for other in lines if other.implementation in wanted and _seeds(other) == _seeds(line)]


def speed(line: Line, lines: Sequence[Line], names: Iterable[str], phase: str) -> float | None:
    """How many times as fast as the fastest of `names`, None where either was not measured."""
    mine = line.rate(phase)
    theirs = max((other.rate(phase) or 0.0 for other in _beside(line, lines, names)), default=0.0)
    return mine / theirs if mine and theirs else None


def peak_memory(line: Line) -> int | None:
    """Bytes beyond the inputs, the most of all phases."""
    found = [r.peak_memory_bytes for r in line.pair.values() if r.status == "ok" and r.peak_memory_bytes is not None]
    return max(found, default=None)


def memory(line: Line, lines: Sequence[Line], names: Iterable[str] = FA2) -> float | None:
    """Peak memory against the thriftiest of `names`."""
    mine = peak_memory(line)
    theirs = [peak_memory(other) for other in _beside(line, lines, names)]
    least = min((x for x in theirs if x is not None), default=None)
    return mine / least if mine is not None and least else None


def steps_of(implementation: str) -> tuple[int, str] | None:
    """(4, "triton") of "steps-4[triton]", None of anything else."""
    base, option = split_option(implementation)
    kind, _, count = base.partition("-")
    return (int(count), option) if kind == "steps" and count.isdecimal() else None


def steps_overhead(line: Line, lines: Sequence[Line], phase: str) -> float | None:
    """Time of the steps against one call of the same backend, None for lines that are no steps."""
    found = steps_of(line.implementation)
    if found is None:
        return None
    faster = speed(line, lines, (f"steps-1[{found[1]}]",), phase)
    return 1 / faster if faster else None


def host_us(line: Line, phase: str) -> float | None:
    """Microseconds of host time for each call of the backend, median; None unless measured on a GPU."""
    found, result = steps_of(line.implementation), line.pair.get(phase)
    if found is None or result is None or result.status != "ok" or not result.host_ms:
        return None
    return 1e3 * statistics.median(result.host_ms) / found[0]
