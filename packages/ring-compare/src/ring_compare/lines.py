"""The lines of a report: results by problem, implementation and route, and their statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ring_compare.flops import Summary, summarise
from ring_compare.records import Result
from ring_compare.suites import Cell

NATIVE = "native"  # the one name that flash-attn alone may bear

Pair = dict[str, Result]  # by phase


@dataclass(frozen=True)
class Line:
    """One implementation on one cell, and what flash-attn did on the same cell."""

    implementation: str
    cell: Cell
    pair: Pair
    native: Pair | None

    @property
    def name(self) -> str:
        """What tells it from the other lines of a table."""
        return f"{self.implementation} · {self.cell.route}"

    @property
    def tried(self) -> bool:
        """Whether it was not merely skipped."""
        return any(result.status != "skipped" for result in self.pair.values())

    def rate(self, phase: str) -> float | None:
        """Iterations per second, None unless measured."""
        found = summary(self.pair, phase)
        return found.iterations_per_s if found else None


def by_cell(results: Iterable[Result]) -> dict[Cell, dict[str, Pair]]:
    """Results by cell, implementation and phase, in the order they were measured."""
    cells: dict[Cell, dict[str, Pair]] = {}
    for result in results:
        cells.setdefault(result.cell, {}).setdefault(result.implementation, {})[result.phase] = result
    return cells


def by_problem(results: Iterable[Result]) -> dict[str, list[Line]]:
    """The lines of each table: those of one shape, mask and world size, the fastest (forward and backward, else
    the backward alone) first."""
    problems: dict[str, list[Line]] = {}
    for cell, pairs in by_cell(results).items():
        lines = problems.setdefault(cell.problem, [])
        lines += [Line(name, cell, pair, pairs.get(NATIVE)) for name, pair in pairs.items()]
    for lines in problems.values():
        lines.sort(key=_speed, reverse=True)
    return problems


def measured_together(results: Iterable[Result]) -> list[list[Line]]:
    """The lines of each problem and run, so that no ratio is formed between runs: all that a run measures of a problem
    has one seed, drawn afresh for the next run."""
    by_seed: dict[int, list[Result]] = {}
    for result in results:
        by_seed.setdefault(result.seed, []).append(result)
    return [lines for some in by_seed.values() for lines in by_problem(some).values()]


def _speed(line: Line) -> tuple[float, ...]:
    return tuple(line.rate(phase) or 0.0 for phase in ("fwd+bwd", "bwd", "fwd"))


def summary(pair: Pair, phase: str) -> Summary | None:
    """Statistics of a phase, None unless it was measured."""
    result = pair.get(phase)
    if result is None or result.status != "ok":
        return None
    return summarise(result.cell, phase, result.samples_ms)
