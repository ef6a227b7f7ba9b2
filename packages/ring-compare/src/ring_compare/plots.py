"""Charts from records; needs matplotlib, which the extra `plots` brings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ring_compare.lines import Pair, by_cell, summary
from ring_compare.records import Records, Result
from ring_compare.suites import KERNEL_PHASES, Cell

INSTALL = "plots need matplotlib: pip install 'ring-compare[plots]' (or: pip install matplotlib)"


class PlotsUnavailableError(ImportError):
    """matplotlib is not installed; the message says how to get it."""


def _pyplot() -> ModuleType:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise PlotsUnavailableError(INSTALL) from error
    matplotlib.use("Agg")  # no display needed
    return importlib.import_module("matplotlib.pyplot")


def _bars(
    pyplot: ModuleType,
    path: Path,
    cells: Sequence[Cell],
    values: dict[str, list[float]],
    *,
    label: str,
    log: bool = False,
) -> Path:
    """Horizontal grouped bars, one group per cell and one colour per implementation."""
    height = max(2.0, 0.25 * len(cells) * (len(values) + 1) + 1)
    figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
    width = 0.8 / max(1, len(values))
    for index, (name, heights) in enumerate(values.items()):
        axes.barh([row + index * width for row in range(len(cells))], heights, height=width, label=name)
    axes.set_yticks([row + 0.4 - width / 2 for row in range(len(cells))], [cell.title for cell in cells], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
    axes.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _speed(pair: Pair | None, phase: str) -> float:
    found = summary(pair, phase) if pair else None
    return found.tflops_per_gpu if found else 0.0


def _worst_error(pair: Pair | None) -> float:
    results: list[Result] = list(pair.values()) if pair else []
    return max((table["relative"] for result in results for table in result.errors.values()), default=0.0)


def draw(records: Records, folder: Path) -> list[Path]:
    """One SVG of TFLOP/s per phase and one of the worst relative error; returns their paths."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    table = by_cell(records.results)
    names = list(dict.fromkeys(r.implementation for r in records.results if r.status != "skipped"))
    cells = [cell for cell, pairs in table.items() if any(name in pairs for name in names)]
    paths = []
    measured = {result.phase for result in records.results}
    for phase in (phase for phase in KERNEL_PHASES if phase in measured):
        values = {name: [_speed(table[cell].get(name), phase) for cell in cells] for name in names}
        path = folder / f"tflops_{phase.replace('+', '_')}.svg"
        paths.append(_bars(pyplot, path, cells, values, label=f"{phase} TFLOP/s per GPU"))
    errors = {name: [_worst_error(table[cell].get(name)) for cell in cells] for name in names}
    label = "largest relative error against float64"
    paths.append(_bars(pyplot, folder / "errors.svg", cells, errors, label=label, log=True))
    return paths
