"""A row of a table of targets, and what a figure comes to against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ring_compare.lines import Line


class Found(NamedTuple):
    """A figure and the line that reached it."""

    value: float
    route: str
    complete: bool = True
    """Whether it is about all cells that it should be about."""


Problems = Sequence[Sequence[Line]]
Measure = Callable[[Problems], Found | None]
"""The figure that lines of several problems hold, None if none does."""


@dataclass(frozen=True)
class Target:
    """A row of the table. A figure passes at `must` or better; `must` None: only told, be it as good as `goal`."""

    what: str
    must: float | None
    goal: float | None
    at_least: bool  # else at most
    measure: Measure

    def reaches(self, value: float, bound: float | None) -> bool:
        """Whether a figure is at least as good as the bound."""
        if bound is None:
            return True
        return value >= bound if self.at_least else value <= bound

    def verdict(self, found: Found | None) -> str:
        """One word, or two."""
        if found is None:
            return "not measured"
        if not self.reaches(found.value, self.must):
            return "**miss**"
        if not found.complete:
            return "cells missing"
        if self.must is None:
            return "goal" if self.goal is not None and self.reaches(found.value, self.goal) else "told"
        return "goal" if self.reaches(found.value, self.goal) else "pass"

    def met(self, found: Found | None) -> bool:
        """Whether what must be reached was measured and reached."""
        return self.must is None or self.verdict(found) in ("pass", "goal")


@dataclass(frozen=True)
class Goals:
    """A table of targets."""

    name: str
    title: str
    targets: tuple[Target, ...]

    def figures(self, problems: Problems) -> list[Found | None]:
        """One for each target."""
        return [target.measure(problems) for target in self.targets]

    def render(self, figures: Sequence[Found | None]) -> list[str]:
        """The table as Markdown."""
        lines = [f"| target ({self.title}) | must | goal | measured | verdict |", "|---|---|---|---|---|"]
        for target, found in zip(self.targets, figures, strict=True):
            sign = "≥" if target.at_least else "≤"
            bounds = ["" if bound is None else f"{sign} {bound:g}" for bound in (target.must, target.goal)]
            figure = "" if found is None else f"{found.value:.3f} ({found.route})"
            lines.append(f"| {target.what} | {' | '.join(bounds)} | {figure} | {target.verdict(found)} |")
        return [*lines, ""]
