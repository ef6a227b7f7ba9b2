"""What a person at a terminal sees: progress while it runs, tables at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ring_compare.kernel_report import KERNEL_COLUMNS, kernel_row
from ring_compare.kernels import of_one_gpu
from ring_compare.lines import by_problem
from ring_compare.measure import Stage
from ring_compare.records import Result
from ring_compare.report import COLUMNS, main_row
from ring_compare.run import Progress as ProgressCall
from ring_compare.suites import SUITES, Cell
from ring_core import backend as ring_backend

_WIDE = 180  # pipes and logs have no width of their own


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not fold tables when its output goes to a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_WIDE)


@contextlib.contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[ProgressCall]:
    """A bar over the cells with what runs now beside it; silent when standard error is no terminal."""
    console = make_console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def update(index: int, cell: Cell, stage: Stage | None) -> None:
            doing = f" · {stage.label} {stage.step}" if stage is not None else ""
            bar.update(task, completed=index, description=cell.title + doing)

        yield update


def results_table(results: Sequence[Result]) -> Table:
    """Every implementation, layout and schedule that was tried, one line each, in a section per problem; what was only
    skipped is listed with its reasons elsewhere."""
    table = Table("problem", Column(COLUMNS[0], no_wrap=True), *COLUMNS[1:], "status")
    for problem, lines in by_problem(results).items():
        for index, line in enumerate([line for line in lines if line.tried] or lines):
            statuses = dict.fromkeys(result.status for result in line.pair.values())
            # Implementation names hold brackets, which rich would take for markup.
            row = (problem if index == 0 else "", *main_row(line), ", ".join(statuses))
            table.add_row(*(text.replace("[", r"\[") for text in row))
        table.add_section()
    return table


def kernels_table(results: Sequence[Result]) -> Table:
    """Kernels on one GPU, against cuDNN, FA2 and FlexAttention."""
    table = Table("problem", Column(KERNEL_COLUMNS[0], no_wrap=True), *KERNEL_COLUMNS[1:])
    for problem, lines in by_problem(results).items():
        for index, line in enumerate([line for line in lines if line.tried and of_one_gpu(line)]):
            row = (problem if index == 0 else "", *kernel_row(line, lines))
            table.add_row(*(text.replace("[", r"\[") for text in row))
        table.add_section()
    return table


def backends_table(device: torch.device) -> Table:
    """What each installed ring_core backend can do on this device."""
    table = Table(
        "backend", "available", "provider", "dtypes", "head dims", "features", title=f"backends on {device.type}"
    )
    for name in ring_backend.backend_names():
        try:
            found = ring_backend.load_backend(name).capabilities(device)
        except ImportError as error:
            table.add_row(name, f"no: cannot be imported: {error}", "", "", "", "")
            continue
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found.dtypes))
        available = "yes" if found.available else f"no: {found.reason}"
        features = ", ".join(sorted(found.features))
        dims = str(found.head_dims) if found.available else ""
        if found.gradient_head_dims is not None:
            dims += f"; with gradients {found.gradient_head_dims}"
        table.add_row(name, available, found.provider or "own kernels", dtypes, dims, features)
    return table


def suites_table() -> Table:
    """The suites by name."""
    table = Table("suite", "description", title="suites")
    for suite in SUITES.values():
        table.add_row(suite.name, suite.description)
    return table
