"""Ranks to run cells on: worker processes of our own, or the ranks that torchrun gave us."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pickle
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ring_compare.measure import STARTING, CellRun, Entry, Stage, Task, Watch
from ring_compare.ranks import Ranks
from ring_compare.records import Result
from ring_core.testing import RankDied, RankError, RankFailure, WorkerPool, report

START_TIMEOUT_S = 180.0  # importing torch on a busy machine, NCCL on a cold one
_CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
_FAILURES = 2
_LOG_LINES = 6
_STACK_LINE = re.compile(r'\s*File "|\s*<no Python frame>|(Current thread|Thread) 0x|Extension modules: |$')


@dataclass(frozen=True)
class Failure:
    """What went wrong on the rank to blame, and the stage it was at."""

    stage: Stage
    text: str
    after_s: float = 0.0  # from the beginning of the task: the earliest of several failures is the cause


class Launcher(Protocol):
    """Something that runs tasks on ranks."""

    def attempt(self, task: Task, watch: Watch) -> list[Result] | Failure:
        """Run once. After a Failure the next attempt starts on sound ranks, or raises `RanksLostError`."""

    def close(self) -> None:
        """Let the ranks go."""


class RanksLostError(RuntimeError):
    """Ranks that were given to us broke, and we cannot start new ones."""


def run_task(launcher: Launcher, task: Task, watch: Watch) -> list[Result]:
    """Results of every implementation of the task: a failed route is left out and the rest run again.

    Each failure costs a whole run, so an implementation is given up when two of its routes have failed."""
    failed: list[Result] = []
    while task.names:
        try:
            outcome = launcher.attempt(task, watch)
        except RanksLostError as lost:
            reason = f"not run: {lost}"
            return failed + [r for name in task.names for r in task.everywhere(name, status="skipped", reason=reason)]
        if not isinstance(outcome, Failure):
            return outcome + failed
        stage = outcome.stage
        said = {"status": "failed", "reason": f"{outcome.text} (while {stage.step})"}
        if not stage.name:
            return failed + [r for name in task.names for r in task.everywhere(name, **said)]
        if stage.cell is None:  # while loading: no route of it can run
            failed += task.everywhere(stage.name, **said)
            task = dataclasses.replace(task, names=tuple(name for name in task.names if name != stage.name))
        else:
            failed += task.results(stage.label, stage.cell, stage.provider, **said)
            task = dataclasses.replace(task, without=task.without | {Entry(stage.name, stage.cell)})
            if sum(entry.name == stage.name for entry in task.without) == _FAILURES:
                reason = f"not run: {_FAILURES} of its routes failed"
                left = [cell for cell in task.cells if Entry(stage.name, cell) not in task.without]
                for cell in left:
                    failed += task.results(stage.label, cell, stage.provider, status="skipped", reason=reason)
                task = dataclasses.replace(task, names=tuple(name for name in task.names if name != stage.name))
    return failed


def take_place(device: str) -> Ranks:
    """This process among the ranks of the default group; on the CPU with its share of the cores, or they would fight.

    On one rank it is a group of one: ring_core sends nothing there, and neither does `Ranks`.
    """
    if device == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        place = torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), place, dist.group.WORLD)


def share_of_cores(cores: Sequence[int], rank: int, world_size: int) -> set[int]:
    """As many neighbouring cores for each rank, or all for everyone where there are not two for each."""
    each = len(cores) // world_size
    return set(cores[rank * each : (rank + 1) * each]) if each >= 2 else set(cores)


def keep_to(cores: set[int]) -> None:
    """Keeps all threads of this process to some cores. A forward pass and the backward after it run in different
    threads; on cores of different sockets each finds the other's data far away, and a call takes the host up to 2.5
    times as long. torchrun's users do the same with --numa-binding or numactl."""
    for thread in Path("/proc/self/task").glob("*"):
        os.sched_setaffinity(int(thread.name), cores)


def run_in_pool(task: Task, device: str) -> list[Result]:
    """What every worker of `OwnRanks` does."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    # As under torchrun: libraries of peers look there.
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    if device == "cuda" and _CORES:
        keep_to(share_of_cores(_CORES, dist.get_rank(), dist.get_world_size()))
    return CellRun(task, take_place(device), report).run()


class OwnRanks:
    """Ranks in a pool of workers, one pool at a time: idle workers of another would hold GPU memory."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pool: WorkerPool | None = None

    def attempt(self, task: Task, watch: Watch) -> list[Result] | Failure:
        """Run the task on a pool of its world size; after a failure the pool starts fresh workers by itself."""
        if self._pool is None or self._pool.world_size != task.world_size:
            self.close()
            self._pool = WorkerPool(task.world_size, self._device, start_timeout=START_TIMEOUT_S)

        def first_rank(rank: int, stage: Stage) -> None:
            if rank == 0:
                watch(stage)

        try:
            results: list[list[Result]] = self._pool.run(
                run_in_pool, task, self._device, timeout=task.suite.timeout_s, watch=first_rank, seed=task.seed
            )
        except RankFailure as failure:
            return _blame(failure, task.suite.timeout_s)
        return results[0]

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None


def _blame(failure: RankFailure, timeout_s: float) -> Failure:
    """The rank that raised or died first; of ranks that hang the one that got least far."""

    def stage_of(rank: int) -> Stage:
        stage: Stage = failure.reports.get(rank, STARTING)
        return stage

    if isinstance(failure, RankError):
        text = f"rank {failure.rank}: {_in_words(failure.type_name, failure.original_message)}"
        return Failure(stage_of(failure.rank), text)
    if isinstance(failure, RankDied):
        rank, code = next(iter(failure.exit_codes.items()))
        text = f"rank {rank} ended with exit code {code}"
    else:
        rank = min(failure.ranks, key=lambda rank: stage_of(rank).number)
        seconds = timeout_s if failure.reports else START_TIMEOUT_S
        text = f"no end after {seconds:g} s; rank {rank} was at: {stage_of(rank).step}"
    lines = [line.strip() for line in failure.outputs[rank].splitlines() if not _STACK_LINE.match(line)]
    words = " | ".join(lines[-_LOG_LINES:])
    return Failure(stage_of(rank), f"{text}; its stderr: {words}" if words else text)


def _in_words(type_name: str, message: str) -> str:
    return f"{type_name}: {' '.join(message.split()) or 'no message'}"


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
        on_gpu = device == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("ring_compare/group", self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
        )
        self._ranks = take_place(device)
        self._attempts = 0
        self._lost = ""

    def share(self, name: str, value: int) -> int:
        """The first rank's value, on every rank; each name once."""
        if self.rank == 0:
            self._store.set(f"ring_compare/{name}", str(value))
        return int(self._store.get(f"ring_compare/{name}"))  # waits until it is there

    def attempt(self, task: Task, watch: Watch) -> list[Result] | Failure:
        """Run the task here; then ranks tell each other how it went, through the store: the group may be broken."""
        if self._lost:
            raise RanksLostError(self._lost)
        results, mine = self._perform(task, watch)
        key = f"ring_compare/failure/{self._attempts}"
        self._attempts += 1
        self._store.set(f"{key}/{self.rank}", pickle.dumps(mine))
        # A rank that waits for a dead peer finds out when the group's timeout ends, hence twice.
        seconds = 2 * task.suite.timeout_s
        failures: dict[int, Failure] = {}
        for rank in range(self.world_size):
            try:
                self._store.wait([f"{key}/{rank}"], datetime.timedelta(seconds=seconds))
            except dist.DistStoreError:
                self._lost = f"rank {rank} gave no sign within {seconds:g} s, and torchrun owns the ranks"
                return Failure(mine.stage if mine else STARTING, self._lost)
            theirs: Failure | None = pickle.loads(self._store.get(f"{key}/{rank}"))
            if theirs is not None:
                failures[rank] = theirs
        if not failures:
            return results
        if len(failures) == self.world_size and len({(f.text, f.stage.number) for f in failures.values()}) == 1:
            rank = 0  # all refused alike and are still in step
        else:  # whatever comes next on this group would meet the leftovers of ranks that are out of step
            rank = min(failures, key=lambda rank: failures[rank].after_s)
            why = f"rank {rank} failed otherwise than the rest ({failures[rank].text})"
            self._lost = f"{why}, and torchrun owns the ranks"
        return Failure(failures[rank].stage, f"rank {rank}: {failures[rank].text}")

    def _perform(self, task: Task, watch: Watch) -> tuple[list[Result], Failure | None]:
        last, start = STARTING, time.monotonic()

        def note(stage: Stage) -> None:
            nonlocal last
            last = stage
            watch(stage)

        try:
            return CellRun(task, self._ranks, note).run(), None
        except Exception as error:  # the boundary: code under comparison may raise anything, and the run must go on
            traceback.print_exc()
            return [], Failure(last, _in_words(type(error).__name__, str(error)), time.monotonic() - start)

    def close(self) -> None:
        """Leave the group together; after a loss there is nothing to leave in order."""
        if not self._lost:
            dist.destroy_process_group()


def visible_ranks(device: str) -> int:
    """World size that 'all' stands for: the visible GPUs, or two processes on a machine without."""
    return torch.cuda.device_count() if device == "cuda" else 2
