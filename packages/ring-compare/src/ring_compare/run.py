"""A run: every cell of a suite on its ranks, each row written as soon as it is there."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ring_compare import records
from ring_compare.environment import gpus
from ring_compare.launch import GivenRanks, Launcher, OwnRanks, run_task, visible_ranks
from ring_compare.measure import Stage, Task
from ring_compare.records import Records, Result
from ring_compare.report import render
from ring_compare.suites import Cell, Suite, by_problem, check_cell

Progress = Callable[[int, Cell, Stage | None], None]


@dataclass(frozen=True)
class Plan:
    """What a run does, settled before any rank starts."""

    suite: Suite
    cells: Sequence[Cell]
    names: tuple[str, ...]
    device: str
    seed: int | None = None
    max_seconds: float | None = None
    """After so long nothing new is begun; what is left is recorded as skipped."""


@dataclass
class Outcome:
    """What a run left: nothing but `results` on ranks other than the first."""

    results: list[Result] = field(default_factory=list)
    record_file: Path | None = None
    report_file: Path | None = None

    @property
    def exit_code(self) -> int:
        """1 when something failed or nothing was measured, else 0."""
        statuses = {result.status for result in self.results}
        return 1 if "failed" in statuses or "ok" not in statuses else 0


def _reason_to_skip(cell: Cell, device: str, given: GivenRanks | None) -> str | None:
    if given is None and device == "cuda" and cell.world_size > visible_ranks(device):
        return f"{cell.world_size} ranks, but {visible_ranks(device)} visible GPUs"
    return check_cell(cell)


def execute(
    plan: Plan, environment: dict[str, Any], out: Path, progress: Progress, *, given: GivenRanks | None
) -> Outcome:
    """Run the plan on our own ranks, or on `given` ones. Only the first rank writes files."""
    seed = secrets.randbelow(2**31) if plan.seed is None else plan.seed
    if given is not None:
        seed = given.share("seed", seed)
    launcher: Launcher = OwnRanks(plan.device) if given is None else given
    outcome = Outcome()
    if given is not None and given.rank > 0:
        outcome.results = list(_measure(launcher, plan, seed, progress, given))
        launcher.close()
        return outcome
    largest = max(cell.world_size for cell in plan.cells)
    outcome.record_file = records.record_path(out, plan.suite.name, environment, largest)
    outcome.report_file = outcome.record_file.with_suffix(".md")
    outcome.record_file.parent.mkdir(parents=True, exist_ok=True)
    with outcome.record_file.open("w", encoding="utf-8") as file:
        records.write_row(file, records.environment_row({**environment, "seed": seed}))
        try:
            for result in _measure(launcher, plan, seed, progress, given):
                outcome.results.append(result)
                records.write_row(file, result.to_dict())
        finally:
            # Also after Ctrl-C: what was measured until then is worth a report.
            after = gpus() if plan.device == "cuda" else []
            launcher.close()
            if after:
                environment = {**environment, "nvidia_smi_after": after}
                records.write_row(file, records.closing_row(after))
            outcome.report_file.write_text(render(Records(environment, outcome.results)), encoding="utf-8")
    return outcome


def _measure(
    launcher: Launcher, plan: Plan, seed: int, progress: Progress, given: GivenRanks | None
) -> Iterator[Result]:
    start, done = time.monotonic(), 0
    for index, problem in enumerate(by_problem(plan.cells)):
        progress(done, problem[0], None)
        reasons = {cell: _reason_to_skip(cell, plan.device, given) for cell in problem}
        late = plan.max_seconds is not None and time.monotonic() - start > plan.max_seconds
        if given is not None and plan.max_seconds is not None:  # ranks' clocks differ, the first one's counts
            late = bool(given.share(f"late/{index}", late))
        if late:
            reasons = dict.fromkeys(problem, f"not begun after {plan.max_seconds:g} s (--max-seconds)")
        # Recorded: `--seed` gives the whole run again.
        able = tuple(cell for cell in problem if reasons[cell] is None)
        task = Task(plan.suite, able, plan.names, seed + index)
        for cell, reason in reasons.items():
            if reason is not None:
                for name in plan.names:
                    yield from task.results(name, cell, status="skipped", reason=reason)
        if able:
            yield from run_task(launcher, task, functools.partial(progress, done, problem[0]))
        done += len(problem)
