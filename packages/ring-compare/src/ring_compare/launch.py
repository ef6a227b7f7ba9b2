"""Ranks to run cells on: worker processes of our own, or the ranks that torchrun gave us."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection as mp_connection
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ring_compare.measure import Row, Stage, Task, both_phases
from ring_compare.ranks import Ranks
from ring_compare.worker import (
    STARTING,
    Failure,
    Finished,
    Message,
    Ready,
    Seat,
    choose_device,
    join_group,
    perform,
    worker_main,
)

START_TIMEOUT_S = 180.0  # importing torch on a busy machine, NCCL on a cold one
_GRACE_S = 5.0
_LOG_LINES = 6

Watch = Callable[[Stage], None]


class Launcher(Protocol):
    """Something that runs tasks on ranks."""

    def attempt(self, task: Task, timeout_s: float, watch: Watch) -> Finished | Failure:
        """Run once. After a Failure the next attempt starts on sound ranks, or raises `RanksLostError`."""

    def close(self) -> None:
        """Let the ranks go."""


class RanksLostError(RuntimeError):
    """Ranks that were given to us broke, and we cannot start new ones."""


def run_task(launcher: Launcher, task: Task, timeout_s: float, watch: Watch) -> list[Row]:
    """Rows of every implementation of the task: a failed one is left out and the rest run again."""
    names = task.names
    failed: list[Row] = []
    while names:
        pending = Task(task.cell, names, task.seed, task.timing, task.limits)
        try:
            outcome = launcher.attempt(pending, timeout_s, watch)
        except RanksLostError as lost:
            reason = f"not run: {lost}"
            return failed + [row for name in names for row in both_phases(name, status="skipped", reason=reason)]
        if isinstance(outcome, Finished):
            return outcome.rows + failed
        blamed, stage = outcome.stage.name, outcome.stage
        for name in (blamed,) if blamed else names:
            label, provider = (stage.label, stage.provider) if blamed else (name, "")
            reason = f"{outcome.text} (while {stage.step})"
            failed += both_phases(name, label, provider, status="failed", reason=reason)
        names = tuple(name for name in names if blamed and name != blamed)
    return failed


class _WorkerSet:
    """The worker processes of one world size. Used by one task at a time; not used again after a failure."""

    def __init__(self, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._logs = tempfile.TemporaryDirectory(prefix="ring-compare-")
        timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
        # The launcher holds the store: no worker's death takes it away, and the system picks a free port.
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout
        )
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._processes, self._connections = [], []
        self._stages = [STARTING] * world_size
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            seat = Seat(rank, world_size, device, self._store.port, START_TIMEOUT_S, self._log(rank))
            process = context.Process(target=worker_main, args=(seat, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _log(self, rank: int) -> str:
        return str(Path(self._logs.name) / f"rank{rank}.log")

    def _last_words(self, rank: int) -> str:
        path = Path(self._log(rank))
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return " | ".join(line.strip() for line in lines[-_LOG_LINES:])

    def wait_ready(self) -> Failure | None:
        """None once every rank has joined the group."""
        outcome = self._collect(Ready, START_TIMEOUT_S, lambda stage: None)
        return outcome if isinstance(outcome, Failure) else None

    def run(self, task: Task, timeout_s: float, watch: Watch) -> Finished | Failure:
        """Hand the task to every rank and wait for all of them."""
        self._stages = [STARTING] * self.world_size
        for rank, pipe in enumerate(self._connections):
            try:
                pipe.send(task)
            except BrokenPipeError:
                return self._death(rank)
        outcome = self._collect(Finished, timeout_s, watch)
        assert isinstance(outcome, (Finished, Failure))
        return outcome

    def _collect(self, wanted: type, timeout_s: float, watch: Watch) -> Message:
        """Messages until every rank sent a `wanted` one; returns rank 0's, or a Failure."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Message] = {}
        while len(answers) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._connections) if rank not in answers]
            ready = mp_connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return self._hang(timeout_s)
            for pipe in ready:
                rank = self._connections.index(pipe)  # type: ignore[arg-type]
                try:
                    message: Message = self._connections[rank].recv()
                except (EOFError, ConnectionResetError, pickle.UnpicklingError):
                    return self._death(rank)
                if isinstance(message, Failure):
                    return Failure(message.stage, f"rank {rank}: {message.text}")
                if isinstance(message, Stage):
                    self._stages[rank] = message
                    if rank == 0:
                        watch(message)
                elif isinstance(message, wanted):
                    answers[rank] = message
        return answers[0]

    def _hang(self, timeout_s: float) -> Failure:
        rank = min(range(self.world_size), key=lambda r: self._stages[r].number)
        words = self._last_words(rank)
        text = f"no end after {timeout_s:g} s; rank {rank} was at: {self._stages[rank].step}"
        return Failure(self._stages[rank], f"{text}; its stderr: {words}" if words else text)

    def _death(self, rank: int) -> Failure:
        self._processes[rank].join(_GRACE_S)
        text = f"rank {rank} ended with exit code {self._processes[rank].exitcode}"
        words = self._last_words(rank)
        return Failure(self._stages[rank], f"{text}; its stderr: {words}" if words else text)

    def close(self, *, kill: bool) -> None:
        """End the processes: by closing their pipe, or at once when one of them hangs."""
        for pipe in self._connections:
            pipe.close()
        for process in self._processes:
            if not kill:
                process.join(_GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._logs.cleanup()


class OwnRanks:
    """Starts worker processes; keeps one set as long as tasks ask for its world size and nothing fails."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._workers: _WorkerSet | None = None

    def attempt(self, task: Task, timeout_s: float, watch: Watch) -> Finished | Failure:
        """Run the task on a set of its world size, a fresh one where needed."""
        world_size = task.cell.world_size
        if self._workers is not None and self._workers.world_size != world_size:
            self.close()
        if self._workers is None:
            self._workers = _WorkerSet(world_size, self._device)
            failure = self._workers.wait_ready()
            if failure is not None:
                self._drop()
                return failure
        outcome = self._workers.run(task, timeout_s, watch)
        if isinstance(outcome, Failure):
            self._drop()
        return outcome

    def _drop(self) -> None:
        if self._workers is not None:
            self._workers.close(kill=True)
        self._workers = None

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close(kill=False)
        self._workers = None


def under_torchrun() -> bool:
    """Whether torchrun (or anything that speaks torchelastic) started this process as a rank."""
    return dist.is_torchelastic_launched()


def given_world_size() -> int | None:
    """World size of the ranks that torchrun gave us; None when we start our own."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else None


class GivenRanks:
    """The ranks that torchrun started, this process one of them. Every rank calls `attempt` with the same tasks."""

    def __init__(self, device: str, timeout_s: float) -> None:
        self._store, self.rank, self.world_size = next(iter(rendezvous("env://")))
        local_rank = int(os.environ["LOCAL_RANK"])
        placed = choose_device(device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)))
        group = join_group(self._store, self.rank, self.world_size, placed, datetime.timedelta(seconds=timeout_s))
        self._ranks = Ranks(self.rank, self.world_size, placed, group)
        self._attempts = 0
        self._lost = ""

    def share_seed(self, seed: int) -> int:
        """The first rank's seed, on every rank."""
        if self.rank == 0:
            self._store.set("ring_compare/seed", str(seed))
        return int(self._store.get("ring_compare/seed"))  # waits until it is there

    def attempt(self, task: Task, timeout_s: float, watch: Watch) -> Finished | Failure:
        """Run the task here; then ranks tell each other how it went, through the store: the group may be broken."""
        if self._lost:
            raise RanksLostError(self._lost)
        outcome = perform(task, self._ranks, watch)
        key = f"ring_compare/outcome/{self._attempts}"
        self._attempts += 1
        self._store.set(f"{key}/{self.rank}", pickle.dumps(outcome))
        # A rank that waits for a dead peer finds out when the group's timeout ends, hence twice.
        patience = datetime.timedelta(seconds=2 * timeout_s)
        outcomes: list[Finished | Failure] = []
        for rank in range(self.world_size):
            try:
                self._store.wait([f"{key}/{rank}"], patience)
            except dist.DistStoreError:
                stage = outcome.stage if isinstance(outcome, Failure) else STARTING
                self._lost = f"rank {rank} gave no sign within {2 * timeout_s:g} s, and torchrun owns the ranks"
                return Failure(stage, self._lost)
            outcomes.append(pickle.loads(self._store.get(f"{key}/{rank}")))
        failures = [(rank, o) for rank, o in enumerate(outcomes) if isinstance(o, Failure)]
        if not failures:
            return outcomes[0]
        rank, first = min(failures, key=lambda pair: pair[1].after_s)
        same = len(failures) == self.world_size and len({(f.text, f.stage.number) for _, f in failures}) == 1
        if not same:  # some rank is out of step: whatever comes next on this group would meet its leftovers
            self._lost = f"rank {rank} failed otherwise than the rest ({first.text}), and torchrun owns the ranks"
        return Failure(first.stage, f"rank {rank}: {first.text}")

    def close(self) -> None:
        """Leave the group together; after a loss there is nothing to leave in order."""
        if self.world_size > 1 and not self._lost:
            dist.destroy_process_group()


def visible_ranks(device: str) -> int:
    """World size that 'all' stands for: the visible GPUs, or two processes on a machine without."""
    return torch.cuda.device_count() if device == "cuda" else 2
