"""Everything one rank does for one cell: load, check, measure memory, time. The result is the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ring_compare import implementations
from ring_compare.accuracy import (
    PHASE_TENSORS,
    Expectation,
    HeadResults,
    Inputs,
    complaint,
    difference,
    gather_results,
    make_inputs,
)
from ring_compare.memory import allocated, peak_memory
from ring_compare.ranks import Ranks
from ring_compare.records import Result
from ring_compare.suites import PHASES, Cell, Suite
from ring_compare.timing import sample_interleaved
from ring_core import UnsupportedError


@dataclass(frozen=True)
class Task:
    """What ranks are asked to do; travels by pickle."""

    suite: Suite
    cell: Cell
    names: tuple[str, ...]
    seed: int

    def results(self, implementation: str, provider: str = "", **fields: Any) -> list[Result]:
        """A result per phase that say the same."""
        same = {"suite": self.suite.name, "cell": self.cell, "seed": self.seed, **fields}
        return [Result(implementation=implementation, provider=provider, phase=phase, **same) for phase in PHASES]


@dataclass(frozen=True)
class Stage:
    """What a rank is doing now. Numbers grow over a task: on a hang, the lowest stage is where it started."""

    number: int
    name: str  # implementation, "" outside any
    label: str
    provider: str
    step: str


STARTING = Stage(-1, "", "", "", "starting")
Watch = Callable[[Stage], None]


@dataclass
class _Candidate:
    """An implementation on its way through the steps."""

    made: implementations.Implementation
    label: str
    provider: str


class CellRun:
    """One task on one rank."""

    def __init__(self, task: Task, ranks: Ranks, watch: Watch) -> None:
        self.task, self.ranks, self._watch = task, ranks, watch
        self._stages = 0
        self._candidates: dict[str, _Candidate] = {}
        self._native: list[HeadResults] | None = None

    def run(self) -> list[Result]:
        """Results of every named implementation, both phases."""
        cell = self.task.cell
        rows = []
        for name in self.task.names:
            rows += self._load(name)
        if not self._candidates:
            return rows
        self._announce("", "expected values")
        inputs = make_inputs(cell, self.task.seed, self.ranks.device)
        expected = Expectation(cell, inputs, self.ranks)
        shards = inputs.shard(cell, self.ranks)
        del inputs
        checked = {name: self._check(name, shards, expected) for name in self._candidates}
        for index, phase in enumerate(PHASES):
            # A wrong result has no speed.
            sound = [name for name, pair in checked.items() if pair[index].status == "ok"]
            calls = {name: self._timed_call(name, phase, shards) for name in sound}
            samples = sample_interleaved(calls, self.task.suite.timing, self.ranks, self._announcer(phase))
            for name in sound:
                row = checked[name][index]
                row.samples_ms = [sample.ms for sample in samples[name]]
                if self.ranks.device.type == "cuda":
                    row.host_ms = [sample.host_ms for sample in samples[name]]
        return rows + [row for pair in checked.values() for row in pair]

    def _announcer(self, phase: str) -> Callable[[str, str], None]:
        return lambda name, step: self._announce(name, f"{phase} {step}")

    def _announce(self, name: str, step: str) -> None:
        candidate = self._candidates.get(name)
        label, provider = (candidate.label, candidate.provider) if candidate else (name, "")
        self._watch(Stage(self._stages, name, label, provider, step))
        self._stages += 1

    def _load(self, name: str) -> list[Result]:
        """Take the implementation in, or say in rows why not."""
        self._announce(name, "loading")
        cell, device = self.task.cell, self.ranks.device
        try:
            made = implementations.load(name)
        except ImportError as error:  # installed, but something that it needs is not: nothing of ours failed
            return self.task.results(name, status="skipped", reason=f"cannot be imported: {error}")
        provider = made.provider(device)
        candidate = _Candidate(made, implementations.display_name(made.name, provider), provider)
        limit = self.task.suite.limits.get(made.name)
        reason = made.supports(cell, device)
        if reason is None and limit is not None and max(cell.Sq, cell.Sk) > limit.tokens:
            reason = f"limited to {limit.tokens} tokens in this suite: {limit.reason}"
        if reason is not None:
            return self.task.results(candidate.label, provider, status="skipped", reason=reason)
        self._candidates[name] = candidate
        return []

    def _forward(self, name: str, shards: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        made = self._candidates[name].made
        with torch.no_grad():
            return made.call(shards.q, shards.k, shards.v, self.task.cell, self.ranks.group)

    def _both(self, name: str, shards: Inputs) -> dict[str, torch.Tensor]:
        made = self._candidates[name].made
        q, k, v = (x.detach().requires_grad_() for x in (shards.q, shards.k, shards.v))
        out, lse = made.call(q, k, v, self.task.cell, self.ranks.group)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), shards.dout)
        return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}

    def _timed_call(self, name: str, phase: str, shards: Inputs) -> Callable[[], object]:
        return (lambda: self._forward(name, shards)) if phase == "fwd" else (lambda: self._both(name, shards))

    def _check(self, name: str, shards: Inputs, expected: Expectation) -> list[Result]:
        """Memory and accuracy; the results compared are a second call's, which reuses whatever the first kept."""
        cell, ranks = self.task.cell, self.ranks
        label, provider = self._candidates[name].label, self._candidates[name].provider
        forward, both = self.task.results(label, provider)
        baseline = allocated(ranks.device)
        self._announce(name, "first call")
        try:
            self._both(name, shards)
        except UnsupportedError as error:  # refused on the host, by all ranks alike, before anything was sent
            return self.task.results(label, provider, status="skipped", reason=str(error))
        self._announce(name, "memory and accuracy")
        with peak_memory(ranks.device, baseline) as forward_peak:
            kept: object = self._forward(name, shards)
        del kept
        with peak_memory(ranks.device, baseline) as both_peak:
            results = self._both(name, shards)
        for row, peak in ((forward, forward_peak), (both, both_peak)):
            known = -1 if peak.bytes is None else peak.bytes
            worst = int(ranks.maximum([known])[0])
            row.peak_memory_bytes, row.memory_method = (None if worst < 0 else worst), peak.method
        is_native = self._candidates[name].made.name == "native"
        heads = gather_results(results, cell, ranks, keep=is_native)
        errors = expected.errors(heads)
        apart = difference(heads, self._native, ranks) if self._native is not None else {}
        self._native = heads if is_native else self._native
        for row in (forward, both):
            tensors = PHASE_TENSORS[row.phase]
            row.errors = {tensor: errors[tensor] for tensor in tensors}
            row.native_errors = {tensor: apart[tensor] for tensor in tensors if tensor in apart}
            row.reason = complaint(row.errors)
            row.status = "failed" if row.reason else "ok"
        if forward.status == "failed" and both.status == "ok":
            both.status, both.reason = "failed", "its forward is beyond tolerance"
        return [forward, both]
