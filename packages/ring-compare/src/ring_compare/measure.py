"""Everything one rank does for one problem: load, check, measure memory, time. The result is the same on every rank.

All routes of a problem (layouts and schedules, each implementation) are measured together: they share the expected
values, and their samples are interleaved, so that ratios between them do not depend on clocks or neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ring_compare import implementations
from ring_compare.accuracy import (
    PHASE_TENSORS,
    TENSORS,
    Expectation,
    HeadResults,
    Inputs,
    complaint,
    difference,
    gather_results,
    make_inputs,
)
from ring_compare.implementations import Traits
from ring_compare.memory import Peak, allocated, arena_bytes, peak_memory
from ring_compare.places import Positions, layout_positions
from ring_compare.ranks import Ranks
from ring_compare.records import Result
from ring_compare.suites import Cell, Suite
from ring_compare.timing import sample_interleaved
from ring_core import UnsupportedError


@dataclass(frozen=True)
class Entry:
    """One implementation on one route; the cell's schedule is "own" for an implementation that has its own."""

    name: str
    cell: Cell


@dataclass(frozen=True)
class Task:
    """What ranks are asked to do; travels by pickle. The cells are one problem's."""

    suite: Suite
    cells: tuple[Cell, ...]
    names: tuple[str, ...]
    seed: int
    without: frozenset[Entry] = frozenset()
    """Failed before and left out."""

    @property
    def world_size(self) -> int:
        """Of all cells."""
        return self.cells[0].world_size

    def results(self, implementation: str, cell: Cell, provider: str = "", **fields: Any) -> list[Result]:
        """A result per phase that say the same."""
        same = {"suite": self.suite.name, "cell": cell, "seed": self.seed, **fields}
        phases = self.suite.phases
        return [Result(implementation=implementation, provider=provider, phase=phase, **same) for phase in phases]

    def everywhere(self, implementation: str, **fields: Any) -> list[Result]:
        """The same result of an implementation for every cell."""
        return [row for cell in self.cells for row in self.results(implementation, cell, **fields)]


@dataclass(frozen=True)
class Stage:
    """What a rank is doing now. Numbers grow over a task: on a hang, the lowest stage is where it started."""

    number: int
    name: str  # implementation, "" outside any
    label: str
    provider: str
    step: str
    cell: Cell | None = None  # the route; None while nothing is known but the name


STARTING = Stage(-1, "", "", "", "starting")
Watch = Callable[[Stage], None]


@dataclass
class _Candidate:
    """An implementation and a route on their way through the steps."""

    made: implementations.Implementation
    traits: Traits
    cell: Cell
    label: str
    provider: str
    rows: list[Result] = field(default_factory=list)

    @property
    def positions(self) -> Positions:
        """Which tokens each rank holds."""
        return self.traits.positions or layout_positions


class CellRun:
    """One task on one rank."""

    def __init__(self, task: Task, ranks: Ranks, watch: Watch) -> None:
        self.task, self.ranks, self._watch = task, ranks, watch
        self._stages = 0
        self._candidates: dict[Entry, _Candidate] = {}
        self._shards: dict[tuple[str, object], Inputs] = {}
        self._native: list[HeadResults] | None = None

    def run(self) -> list[Result]:
        """Results of every named implementation on every route, all phases."""
        rows = [row for name in self.task.names for row in self._load(name)]
        if not self._candidates:
            return rows
        self._announce(None, "expected values")
        problem, limit = self.task.cells[0], self.task.suite.checked_heads
        inputs = make_inputs(problem, self.task.seed, self.ranks.device)
        expected = Expectation(problem, inputs, self.ranks, limit=limit)
        for candidate in self._candidates.values():
            key = candidate.cell.layout, candidate.traits.positions
            if key not in self._shards:
                self._shards[key] = inputs.shard(candidate.cell, self.ranks, candidate.positions)
        del inputs
        for entry, candidate in self._candidates.items():
            candidate.rows = self._check(entry, expected)
        for index, phase in enumerate(self.task.suite.phases):
            # A wrong result has no speed.
            sound = {entry: x for entry, x in self._candidates.items() if x.rows[index].status == "ok"}
            calls = {entry: self._prepared(candidate, phase) for entry, candidate in sound.items()}
            samples = sample_interleaved(calls, self.task.suite.timing, self.ranks, self._announcer(phase))
            for entry, candidate in sound.items():
                row = candidate.rows[index]
                row.samples_ms = [sample.ms for sample in samples[entry]]
                if self.ranks.device.type == "cuda":
                    row.latency_ms = [sample.latency_ms for sample in samples[entry]]
                    row.host_ms = [sample.host_ms for sample in samples[entry]]
        return rows + [row for candidate in self._candidates.values() for row in candidate.rows]

    def _announcer(self, phase: str) -> Callable[[Entry, str], None]:
        return lambda entry, step: self._announce(entry, f"{phase} {step}")

    def _announce(self, entry: Entry | None, step: str, *, name: str = "") -> None:
        candidate = self._candidates.get(entry) if entry is not None else None
        if entry is None or candidate is None:
            stage = Stage(self._stages, name, name, "", step)
        else:
            stage = Stage(self._stages, entry.name, candidate.label, candidate.provider, step, entry.cell)
        self._watch(stage)
        self._stages += 1

    def _load(self, name: str) -> list[Result]:
        """Take the implementation's routes in, or say in rows why not."""
        self._announce(None, "loading", name=name)
        device = self.ranks.device
        try:
            made = implementations.load(name)
        except ImportError as error:  # installed, but something that it needs is not: nothing of ours failed
            return self.task.everywhere(name, status="skipped", reason=f"cannot be imported: {error}")
        except implementations.NotInstalledError as error:
            return self.task.everywhere(name, status="skipped", reason=str(error))
        traits, provider = implementations.traits(made), made.provider(device)
        label = traits.label or implementations.display_name(made.name, provider)
        limit = self.task.suite.limits.get(made.name)
        rows: list[Result] = []
        for cell in traits.routes(self.task.cells):
            if Entry(name, cell) in self.task.without:
                continue
            reason = made.supports(cell, device)
            if reason is None and limit is not None and max(cell.Sq, cell.Sk) > limit.tokens:
                reason = f"limited to {limit.tokens} tokens in this suite: {limit.reason}"
            if reason is not None:
                rows += self.task.results(label, cell, provider, status="skipped", reason=reason)
            else:
                self._candidates[Entry(name, cell)] = _Candidate(made, traits, cell, label, provider)
        return rows

    def _inputs(self, candidate: _Candidate) -> Inputs:
        return self._shards[candidate.cell.layout, candidate.traits.positions]

    def _forward(self, candidate: _Candidate) -> object:
        shards = self._inputs(candidate)
        with torch.no_grad():
            return candidate.made.call(shards.q, shards.k, shards.v, candidate.cell, self.ranks.group)

    def _graph(self, candidate: _Candidate) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor | None]:
        """(q, k, v) that want gradients, out, lse."""
        shards = self._inputs(candidate)
        q, k, v = (x.detach().requires_grad_() for x in (shards.q, shards.k, shards.v))
        return (q, k, v), *candidate.made.call(q, k, v, candidate.cell, self.ranks.group)

    def _both(self, candidate: _Candidate) -> dict[str, torch.Tensor | None]:
        leaves, out, lse = self._graph(candidate)
        dq, dk, dv = torch.autograd.grad(out, leaves, self._inputs(candidate).dout, allow_unused=True)
        return {"out": out.detach(), "lse": lse if lse is None else lse.detach(), "dq": dq, "dk": dk, "dv": dv}

    def _outputs(self, candidate: _Candidate) -> dict[str, torch.Tensor | None]:
        shards = self._inputs(candidate)
        with torch.no_grad():
            out, lse = candidate.made.call(shards.q, shards.k, shards.v, candidate.cell, self.ranks.group)
        return {"out": out, "lse": lse}

    def _prepared(self, candidate: _Candidate, phase: str) -> Callable[[], object]:
        """The call of a phase. Of the backward alone: its forward runs now, and what it saved lives with the call."""
        if phase == "fwd":
            return lambda: self._forward(candidate)
        if phase == "fwd+bwd":
            return lambda: self._both(candidate)
        leaves, out, _ = self._graph(candidate)
        dout = self._inputs(candidate).dout
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True, allow_unused=True)

    def _check(self, entry: Entry, expected: Expectation) -> list[Result]:
        """Memory and accuracy; the results compared are a second call's, which reuses whatever the first kept. Of what
        has a forward only, that is measured, if the suite asks for it."""
        candidate, ranks = self._candidates[entry], self.ranks
        cell, label, provider = candidate.cell, candidate.label, candidate.provider
        rows = self.task.results(label, cell, provider)
        baseline = allocated(ranks.device)
        self._announce(entry, "first call")
        measured, compute = rows, self._both
        try:
            self._both(candidate)
        except UnsupportedError as error:  # refused on the host, by all ranks alike, before anything was sent
            rows = self.task.results(label, cell, provider, status="skipped", reason=str(error))
            measured, compute = [row for row in rows if row.phase == "fwd"], self._outputs
            try:
                self._forward(candidate)
            except UnsupportedError:
                return rows
        self._announce(entry, "memory and accuracy")
        peaks = [self._peak(candidate, row.phase, baseline) for row in measured]
        results = compute(candidate)
        arena = arena_bytes(ranks.device) if candidate.traits.uses_arena(cell) else 0
        for row, peak in zip(measured, peaks, strict=True):
            known = -1 if peak.bytes is None else peak.bytes + arena
            worst = int(ranks.maximum([known])[0])
            row.peak_memory_bytes, row.memory_method = (None if worst < 0 else worst), peak.method
            row.arena_bytes = int(ranks.maximum([arena])[0])
        if measured:
            self._judge(candidate, measured, results, expected)
        return rows

    def _peak(self, candidate: _Candidate, phase: str, baseline: int) -> Peak:
        """Of one call; on GPUs beyond the baseline, so that a backward's includes what its forward saved."""
        call = self._prepared(candidate, phase)
        with peak_memory(self.ranks.device, baseline) as peak:
            kept = call()
        del kept
        return peak

    def _judge(
        self,
        candidate: _Candidate,
        rows: Sequence[Result],
        results: Mapping[str, torch.Tensor | None],
        expected: Expectation,
    ) -> None:
        """Errors against float64 and against flash-attn's results; status and reason of each phase's row."""
        is_first_native = candidate.made.name == "native" and self._native is None
        limit = self.task.suite.checked_heads
        heads = gather_results(
            results, candidate.cell, self.ranks, candidate.positions, limit=limit, keep=is_first_native
        )
        errors = expected.errors(heads)
        apart = difference(heads, self._native, self.ranks) if self._native is not None else {}
        self._native = heads if is_first_native else self._native
        missing = [x for x in TENSORS if x not in errors and x not in candidate.traits.omits]
        for row in rows:
            tensors = PHASE_TENSORS[row.phase]
            row.errors = {tensor: errors[tensor] for tensor in tensors if tensor in errors}
            row.native_errors = {tensor: apart[tensor] for tensor in tensors if tensor in apart}
            row.single_errors = {tensor: expected.single[tensor] for tensor in tensors if tensor in expected.single}
            row.single_provider = expected.single_provider
            absent = [f"it gives no {tensor}" for tensor in tensors if tensor in missing]
            row.reason = "; ".join([*absent, *filter(None, [complaint(row.errors)])])
            row.status = "failed" if row.reason else "ok"
        if any(row.phase == "fwd" and row.status == "failed" for row in rows):
            for row in rows:
                if row.status == "ok":
                    row.status, row.reason = "failed", "its forward is beyond tolerance"
