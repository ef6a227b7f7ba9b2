"""Persistent ranks for tests: one process per rank, one process group, one call at a time.

    with WorkerPool(4) as pool:
        results = pool.run(module_level_function, argument)  # results[rank]

While a run is under way its ranks may say how far they are: `worker.report`, heard by `run(..., watch=...)`.
Starting ranks is what makes distributed tests slow, so a pool keeps its workers between runs, and `get_pool` keeps the
pools. A failure of any kind throws the workers away: the next run starts with fresh ones.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection as mp_connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

from ring_core.testing import worker

FAILURE_GRACE = 0.5  # seconds that the other ranks get, after one has failed, to say what they saw
STACK_GRACE = 1.0  # seconds that a hung rank gets to write its stacks
STOP_GRACE = 5.0  # seconds that healthy workers get to leave their group
TAIL_LINES = 60
MAX_LIVE_WORKERS = 24


Watch = Callable[[int, Any], object]


class RankFailure(Exception):
    """A run failed. `ranks` failed in this way, `rank` is the first of them, `stderr` the end of its output.

    For every rank, whether it failed or not: `outputs`, the end of what it wrote; `reports`, its last report if any.
    """

    def __init__(self, message: str, ranks: Iterable[int], outputs: list[str], reports: dict[int, Any]) -> None:
        super().__init__(message)
        self.ranks = sorted(ranks)
        self.rank = self.ranks[0]
        self.outputs = outputs
        self.reports = reports

    @property
    def stderr(self) -> str:
        return self.outputs[self.rank]


class RankError(RankFailure):
    """A rank raised. `type_name`, `original_message` and `traceback_text` describe its exception."""

    def __init__(
        self, message: str, rank: int, answer: worker.Answer, outputs: list[str], reports: dict[int, Any]
    ) -> None:
        super().__init__(message, (rank,), outputs, reports)
        self.type_name = answer.type_name
        self.original_message = answer.message
        self.traceback_text = answer.traceback


class RankTimeout(RankFailure):
    """Ranks did not answer in time; the message has their Python stacks."""


class RankDied(RankFailure):
    """A rank's process ended. `exit_codes` by rank: negative is a signal's number, None unknown."""

    def __init__(
        self, message: str, exit_codes: dict[int, int | None], outputs: list[str], reports: dict[int, Any]
    ) -> None:
        super().__init__(message, exit_codes, outputs, reports)
        self.exit_codes = exit_codes


@dataclass
class _Outcome:
    """What the ranks did: each is in exactly one of `answers`, `dead` and `silent`. `failed` is in order of arrival."""

    answers: dict[int, worker.Answer] = field(default_factory=dict)
    dead: dict[int, int | None] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)
    reports: dict[int, Any] = field(default_factory=dict)  # the last of each rank that made one


@dataclass
class _Workers:
    """The live half of a pool. `logs` are unlinked files, so that nothing is left behind whatever happens."""

    store: Any  # the TCPStore that the workers meet at: only kept alive
    processes: list[BaseProcess]
    connections: list[mp_connection.Connection]
    logs: list[int]

    def collect(self, deadline: float, may_die: Collection[int] = (), watch: Watch | None = None) -> _Outcome:
        """Wait for every rank's answer, until `deadline` or shortly after the first failure; `watch` hears reports."""
        outcome = _Outcome(silent=set(range(len(self.processes))))
        while outcome.silent:
            handles: dict[Any, int] = {}
            for rank in outcome.silent:
                handles[self.connections[rank]] = rank
                handles[self.processes[rank].sentinel] = rank
            ready = mp_connection.wait(list(handles), max(0.0, deadline - time.monotonic()))
            late = time.monotonic() >= deadline  # then an answer still counts, a report no longer keeps us here
            if not ready:
                break
            for rank in sorted({handles[handle] for handle in ready}):
                answer = self._receive(rank)
                if isinstance(answer, worker.Report):
                    outcome.reports[rank] = value = pickle.loads(answer.value)
                    if watch is not None:
                        watch(rank, value)
                    continue
                late = False
                outcome.silent.discard(rank)
                if answer is None:
                    self.processes[rank].join(STOP_GRACE)
                    outcome.dead[rank] = self.processes[rank].exitcode
                else:
                    outcome.answers[rank] = answer
                failed = rank not in may_die if answer is None else answer.result is None
                if failed:
                    outcome.failed.append(rank)
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
            if late:
                break
        return outcome

    def _receive(self, rank: int) -> worker.Answer | worker.Report | None:
        """The rank's next message, or None if it died before answering."""
        try:
            if not self.connections[rank].poll():
                return None  # only its sentinel was ready
            message = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            return None
        assert isinstance(message, (worker.Answer, worker.Report))
        return message

    def ask_for_stacks(self, ranks: Collection[int]) -> None:
        """Make the ranks dump their Python stacks into their logs, and wait until they have."""
        before = {rank: os.fstat(self.logs[rank]).st_size for rank in ranks}
        for rank in ranks:
            self._signal(rank, signal.SIGUSR1)
        deadline = time.monotonic() + STACK_GRACE
        while time.monotonic() < deadline and any(os.fstat(self.logs[r]).st_size == before[r] for r in ranks):
            time.sleep(0.02)
        time.sleep(0.05)  # a dump is several writes

    def tails(self) -> list[str]:
        """The last lines of what each rank wrote to stdout and stderr in this run."""
        tails = []
        for log in self.logs:
            size = os.fstat(log).st_size
            start = max(0, size - 16384)
            lines = os.pread(log, size - start, start).decode(errors="replace").splitlines()
            tails.append("\n".join(lines[-TAIL_LINES:]))
        return tails

    def forget_output(self) -> None:
        for log in self.logs:
            os.ftruncate(log, 0)

    def stop(self, *, gently: bool) -> None:
        """End every worker, its children too. Healthy ones may leave their group first (`gently`)."""
        if gently:
            deadline = time.monotonic() + STOP_GRACE
            for connection in self.connections:
                with contextlib.suppress(OSError):  # already gone
                    connection.send_bytes(b"")
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
        for rank, process in enumerate(self.processes):
            if process.is_alive():
                self._signal(rank, signal.SIGKILL)
        for process in self.processes:
            process.join(STOP_GRACE)
        for process in self.processes:
            if process.exitcode is not None:  # else in uninterruptible sleep, in a driver: closing would raise
                process.close()
        for connection in self.connections:
            connection.close()
        for log in self.logs:
            os.close(log)

    def _signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        try:
            if number == signal.SIGKILL:
                try:
                    os.killpg(pid, number)
                    return
                except ProcessLookupError:
                    pass  # not yet the leader of its own group
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # gone meanwhile


class WorkerPool:
    """`world_size` persistent workers in one process group.

    device: "cpu" (gloo) or "cuda" (rank = CUDA device, where there are fewer they are shared in turn; the default group
        is "cpu:gloo,cuda:nccl").
    timeout: seconds a run may take unless it says otherwise. start_timeout: the same for starting the workers, which
        happens at the first run, and at the first after a failure.
    environment: variables that the workers start with, over the caller's own (CUDA and NCCL read theirs only then).
    Not for use from several threads at once.
    """

    def __init__(
        self,
        world_size: int,
        device: str = "cpu",
        timeout: float = 60.0,
        *,
        start_timeout: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
        self.world_size = world_size
        self.device = device
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.environment = dict(environment or {})
        self.closed = False
        self._workers: _Workers | None = None
        self._owner = os.getpid()
        _all_pools.add(self)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids by rank; empty while none are running."""
        return [process.pid or 0 for process in self._workers.processes] if self._workers else []

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        may_die: Collection[int] = (),
        seed: int | None = None,
        env: Mapping[str, str] | None = None,
        watch: Watch | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank; return the results by rank.

        function: module-level; it, the arguments and the results travel pickled, tensors as CPU copies.
        timeout: seconds, instead of the pool's. may_die: ranks whose death is no failure; their result is None.
        seed: seeds `random` and `torch`, the same on every rank; fresh per run if None. A failure's
            message names it. env: variables set for the duration of this run.
        watch: called here with (rank, value) for each `report(value)` of a rank, a rank's own in order; what it raises
            ends the run.

        Raises RankError, RankTimeout or RankDied; TypeError for what cannot be pickled.
        """
        if self.closed:
            raise RuntimeError("this pool is closed")
        seed = secrets.randbits(31) if seed is None else seed
        request = _request(function, args, kwargs, seed, env or {})
        label = f"{_name(function)} on {self.world_size} {self.device} rank(s), seed {seed}"
        workers = self._live_workers()
        seconds = self.timeout if timeout is None else timeout
        try:
            workers.forget_output()
            deadline = time.monotonic() + seconds
            for connection in workers.connections:
                with contextlib.suppress(OSError):  # it died just now: collect() will see
                    connection.send_bytes(request)
            outcome = workers.collect(deadline, may_die, watch)
            self._raise_failure(workers, outcome, label, seconds)
        except BaseException:  # also KeyboardInterrupt: ranks in an unknown state must not see another case
            self._drop(gently=False)
            raise
        if outcome.dead:
            self._drop(gently=False)
        results = {rank: pickle.loads(answer.result or b"") for rank, answer in outcome.answers.items()}
        return [results.get(rank) for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the workers but keep the pool usable: the next run starts new ones."""
        self._drop(gently=True)

    def close(self) -> None:
        """End the workers for good. Harmless when repeated."""
        self.closed = True
        self._drop(gently=True)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop(self, *, gently: bool) -> None:
        workers, self._workers = self._workers, None
        if workers is not None and os.getpid() == self._owner:  # a forked copy does not own them
            workers.stop(gently=gently)

    def _live_workers(self) -> _Workers:
        """The running workers; new ones if there are none or if one died since the last run."""
        if self._workers is not None:
            dead = [rank for rank, process in enumerate(self._workers.processes) if not process.is_alive()]
            if not dead:
                _note_use(self)
                return self._workers
            codes = [f"rank {rank}: {_exit(self._workers.processes[rank].exitcode)}" for rank in dead]
            section = _section(self._workers.tails(), dead[:1])
            text = f"workers died after their last run ({', '.join(codes)})\n{section}"
            self._drop(gently=False)
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        _note_use(self)
        workers = self._workers = self._start()
        return workers

    def _start(self) -> _Workers:
        context = multiprocessing.get_context("forkserver")
        # A first custom op imports torch._dynamo: seconds in every rank, unless it is forked with it.
        # Ignored if a fork server is already running; then each worker imports torch for itself.
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", worker.__name__])
        folder = tempfile.mkdtemp(prefix="ring-core-pool-")
        # The store lives here rather than in rank 0, and picks its own port: no clash, and it outlives any rank.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            worker.STORE_HOST, 0, is_master=True, wait_for_workers=False
        )
        workers = _Workers(store, [], [], [])
        deadline = time.monotonic() + self.start_timeout
        try:
            for rank in range(self.world_size):
                path = os.path.join(folder, f"rank{rank}.log")
                workers.logs.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                spec = worker.WorkerSpec(
                    rank=rank,
                    world_size=self.world_size,
                    device=self.device,
                    store_port=store.port,
                    start_timeout=self.start_timeout,
                    environment={**os.environ, **self.environment},
                    log_path=path,
                )
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=worker.main, args=(spec, theirs), name=f"ring-core-rank{rank}", daemon=True
                )
                process.start()
                theirs.close()  # or its end would never be seen here
                workers.processes.append(process)
                workers.connections.append(ours)
            outcome = workers.collect(deadline)
            label = f"starting {self.world_size} {self.device} rank(s)"
            self._raise_failure(workers, outcome, label, self.start_timeout)
        except BaseException:  # whatever it was, no half-started worker may stay
            workers.stop(gently=False)
            raise
        finally:
            shutil.rmtree(folder)
        return workers

    def _raise_failure(self, workers: _Workers, outcome: _Outcome, label: str, seconds: float) -> None:
        """Raise what went wrong, if anything: a death, else an exception, else a silence: each may cause the next."""
        if not outcome.failed and not outcome.silent:
            return
        workers.ask_for_stacks(outcome.silent)
        outputs = workers.tails()
        died = {rank: outcome.dead[rank] for rank in outcome.failed if rank in outcome.dead}
        raised = [rank for rank in outcome.failed if rank in outcome.answers]
        lines = [f"rank {rank} died: {_exit(code)}" for rank, code in died.items()]
        lines += [f"rank {rank} raised {_summary(outcome.answers[rank])}" for rank in raised]
        if died:
            text = "\n".join([*lines, f"in {label}", _section(outputs, [*died, *raised])])
            raise RankDied(text, died, outputs, outcome.reports)
        if raised:
            if outcome.silent:
                lines.append(f"ranks {sorted(outcome.silent)} were still running")
            first = outcome.answers[raised[0]]
            traceback_text = f"--- traceback of rank {raised[0]} ---\n{first.traceback.rstrip()}"
            text = "\n".join([*lines, f"in {label}", traceback_text, _section(outputs, [*raised, *outcome.silent])])
            raise RankError(text, raised[0], first, outputs, outcome.reports)
        silent = sorted(outcome.silent)
        text = f"ranks {silent} did not answer within {seconds:g} s in {label}\n{_section(outputs, silent)}"
        raise RankTimeout(text, silent, outputs, outcome.reports)


def get_pool(world_size: int, device: str = "cpu") -> WorkerPool:
    """This process's pool of that kind, kept for the process's lifetime.

    At most MAX_LIVE_WORKERS workers of such pools live at once: one about to run stops the least recently used others.
    """
    pool = _cached.get((world_size, device))
    if pool is None or pool.closed or pool._owner != os.getpid():
        pool = _cached[(world_size, device)] = WorkerPool(world_size, device)
    return pool


def close_pools() -> None:
    """Close every pool of this process; runs at interpreter exit too."""
    _cached.clear()
    for pool in list(_all_pools):
        pool.close()


_cached: OrderedDict[tuple[int, str], WorkerPool] = OrderedDict()
_all_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
atexit.register(close_pools)


def _note_use(pool: WorkerPool) -> None:
    """Make a cached pool the most recently used, and make room for its workers."""
    key = (pool.world_size, pool.device)
    if _cached.get(key) is not pool:
        return
    _cached.move_to_end(key)
    others = [other for other in _cached.values() if other is not pool and other.pids]
    while others and pool.world_size + sum(len(other.pids) for other in others) > MAX_LIVE_WORKERS:
        others.pop(0).stop()


def _request(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, env: Mapping[str, str]
) -> bytes:
    home = _home(function)
    file = getattr(sys.modules.get(home), "__file__", None)
    try:
        call = worker.dump((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        text = f"{_name(function)} and its arguments must be picklable, the function module-level: {error}"
        raise TypeError(text) from error
    request = worker.Request(
        call=call,
        module=home,
        file=os.path.realpath(file) if file else None,
        sys_path=list(sys.path),
        environment=dict(env),
        seed=seed,
    )
    return pickle.dumps(request)


def _unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _home(function: Callable[..., Any]) -> str:
    return getattr(_unwrap(function), "__module__", None) or type(function).__module__


def _name(function: Callable[..., Any]) -> str:
    plain = _unwrap(function)
    return f"{_home(function)}.{getattr(plain, '__qualname__', type(plain).__qualname__)}"


def _summary(answer: worker.Answer) -> str:
    return f"{answer.type_name}: {answer.message}"


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"exit code {code} ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal has no name
        return f"exit code {code}"


def _section(outputs: list[str], ranks: Iterable[int]) -> str:
    """The ends of the ranks' logs, at most three of them."""
    chosen = list(ranks)[:3]
    return "\n".join(f"--- stderr of rank {rank} ---\n{outputs[rank] or '(empty)'}" for rank in chosen)
