"""The pool and the plugin: that ranks persist, that failures say what happened, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ring_core.testing import RankDied, RankError, RankFailure, RankTimeout, WorkerPool, get_pool, pool, report

SOURCE = Path(pool.__file__).parents[2]


# What ranks run: module-level, as it travels by name.


def rank_and_pid() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def ring_pass(x: torch.Tensor, *, factor: int = 1) -> torch.Tensor:
    """Add the rank, send to the right, return what the left one sent."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine, theirs = x * factor + rank, torch.empty_like(x)
    sending = dist.isend(mine, (rank + 1) % world_size)
    dist.recv(theirs, (rank - 1) % world_size)
    assert sending is not None
    sending.wait()
    return theirs


def sum_of_ranks() -> float:
    x = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(x)
    return x.item()


class StrangeError(Exception):
    def __init__(self, a: int, b: int) -> None:  # cannot be unpickled: the pool must not need that
        super().__init__(f"strange {a} {b}")


def raise_on(rank: int) -> None:
    os.write(2, f"native noise of rank {dist.get_rank()}\n".encode())
    print("printed by Python")
    if dist.get_rank() == rank:
        raise StrangeError(1, 2)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        a_telling_name()


def a_telling_name() -> None:
    time.sleep(600)


def die_on(rank: int, how: str) -> int:
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(7)
        if how == "sys.exit":
            sys.exit(9)
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()


def draw() -> tuple[float, float]:
    return torch.rand(()).item(), random.random()


def variable(name: str) -> str | None:
    return os.environ.get(name)


def slice_of_much() -> tuple[torch.Tensor, torch.Tensor]:
    much = torch.arange(1 << 22, dtype=torch.float32)
    return much[:3], torch.arange(6).reshape(2, 3).t()


def requires_grad(x: torch.Tensor) -> bool:
    return x.requires_grad and x.is_leaf


def unpicklable_result() -> object:
    return lambda: None


def start_a_child() -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def threads() -> int:
    return torch.get_num_threads()


def write_and_return(text: str) -> None:
    print(text)


def report_steps(ending: str) -> str:
    """Everyone reports; then rank 1 reports twice more and ends in the given way."""
    rank = dist.get_rank()
    report((rank, "loading"))
    dist.barrier()
    if rank == 1:
        report(torch.full((2,), 7.0))
        report(f"about to {ending}")
        print(f"rank 1 will {ending}")
        if ending == "raise":
            raise StrangeError(1, 2)
        if ending == "die":
            os._exit(7)
        if ending == "hang":
            time.sleep(600)
    if ending != "return":
        time.sleep(600)
    return "done"


def report_without_end() -> None:
    while True:
        report("still here")


def cuda_ring() -> tuple[int, float, float]:
    rank = dist.get_rank()
    on_cpu, on_gpu = torch.ones(2), torch.ones(2, device="cuda")
    dist.all_reduce(on_cpu)
    dist.all_reduce(on_gpu)
    assert torch.cuda.current_device() == rank
    return rank, on_cpu.sum().item(), on_gpu.sum().item()


def cuda_tensor() -> torch.Tensor:
    return torch.full((2,), float(dist.get_rank()), device="cuda")


# The tests.


def exists(pid: int) -> bool:
    """Whether the process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerPool]:
    with WorkerPool(3, timeout=30.0) as workers:
        yield workers


def test_results_come_by_rank_from_persistent_processes(shared: WorkerPool) -> None:
    first = shared.run(rank_and_pid)
    assert [rank for rank, _ in first] == [0, 1, 2]
    assert len({pid for _, pid in first} | {os.getpid()}) == 4
    assert shared.run(rank_and_pid) == first
    assert shared.pids == [pid for _, pid in first]


def test_arguments_and_tensors_travel(shared: WorkerPool) -> None:
    results = shared.run(ring_pass, torch.tensor([1.0, 2.0], dtype=torch.float64), factor=10)
    assert [result.tolist() for result in results] == [[12.0, 22.0], [10.0, 20.0], [11.0, 21.0]]
    assert results[0].dtype == torch.float64
    assert shared.run(functools.partial(ring_pass, factor=2), torch.tensor([1]))[1].tolist() == [2]


def test_views_arrive_alone_and_keep_their_strides(shared: WorkerPool) -> None:
    view, transposed = shared.run(slice_of_much)[0]
    assert view.tolist() == [0, 1, 2]
    assert view.untyped_storage().nbytes() == 12
    assert transposed.stride() == (1, 3)
    assert transposed.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_leaves_stay_leaves(shared: WorkerPool) -> None:
    assert shared.run(requires_grad, torch.ones(2, requires_grad=True)) == [True] * 3
    assert shared.run(requires_grad, torch.ones(2)) == [False] * 3
    assert shared.run(requires_grad, torch.ones(2, requires_grad=True) * 2) == [False] * 3


def test_cpu_workers_use_one_thread(shared: WorkerPool) -> None:
    assert shared.run(threads) == [1, 1, 1]


def test_seeds(shared: WorkerPool) -> None:
    fixed = shared.run(draw, seed=5)
    assert fixed[0] == fixed[1] == fixed[2]
    assert shared.run(draw, seed=5) == fixed
    assert shared.run(draw, seed=6)[0] != fixed[0]
    assert shared.run(draw)[0] != shared.run(draw)[0]


def test_environment_of_a_run_and_of_a_pool(shared: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared.run(variable, "RING_CHECK_POOL", env={"RING_CHECK_POOL": "1"}) == ["1"] * 3
    assert shared.run(variable, "RING_CHECK_POOL") == [None] * 3
    monkeypatch.setenv("RING_CHECK_POOL", "now")  # the fork server is older than this
    with WorkerPool(1, environment={"RING_CHECK_OTHER": "2"}) as other:
        assert other.run(variable, "RING_CHECK_POOL") == ["now"]
        assert other.run(variable, "RING_CHECK_OTHER") == ["2"]


def test_an_exception_tells_rank_traceback_stderr_and_seed(shared: WorkerPool) -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        shared.run(raise_on, 1, seed=1234567)
    assert time.monotonic() - started < 10.0  # the others wait in a barrier for the pool's 30 s
    error, text = caught.value, str(caught.value)
    assert (error.rank, error.type_name, error.original_message) == (1, "StrangeError", "strange 1 2")
    assert "rank 1 raised StrangeError: strange 1 2" in text
    assert "in raise_on" in text
    assert "raise StrangeError(1, 2)" in text
    assert "native noise of rank 1" in error.stderr
    assert "native noise of rank 1" in text
    assert "printed by Python" in error.stderr
    assert "[0, 2] were still running" in text
    assert "1234567" in text


def test_after_an_exception_the_ranks_are_new_and_work(shared: WorkerPool) -> None:
    before = shared.run(rank_and_pid)
    with pytest.raises(RankError):
        shared.run(raise_on, 2)
    assert shared.pids == []
    assert not any(exists(pid) for _, pid in before)
    after = shared.run(rank_and_pid)
    assert {pid for _, pid in before}.isdisjoint(pid for _, pid in after)
    assert shared.run(sum_of_ranks) == [3.0] * 3


def test_a_failure_shows_only_its_own_run(shared: WorkerPool) -> None:
    shared.run(write_and_return, "from an earlier run")
    with pytest.raises(RankError) as caught:
        shared.run(raise_on, 0)
    assert "from an earlier run" not in str(caught.value)


def test_a_timeout_names_the_rank_and_shows_where_it_is(shared: WorkerPool) -> None:
    shared.run(rank_and_pid)
    started = time.monotonic()
    with pytest.raises(RankTimeout) as caught:
        shared.run(hang_on, 2, timeout=1.0)
    assert 1.0 <= time.monotonic() - started < 5.0
    assert caught.value.ranks == [2]
    assert "ranks [2] did not answer within 1 s" in str(caught.value)
    assert "a_telling_name" in str(caught.value)
    assert shared.run(sum_of_ranks) == [3.0] * 3


@pytest.mark.parametrize(
    ("how", "code", "shown"),
    [("exit", 7, "exit code 7"), ("sys.exit", 9, "exit code 9"), ("kill", -9, "exit code -9 (SIGKILL)")],
)
def test_a_death_names_the_rank_and_the_exit_code(shared: WorkerPool, how: str, code: int, shown: str) -> None:
    with pytest.raises(RankDied) as caught:
        shared.run(die_on, 1, how)
    assert caught.value.exit_codes == {1: code}
    assert f"rank 1 died: {shown}" in str(caught.value)
    assert shared.run(sum_of_ranks) == [3.0] * 3


def test_an_expected_death_keeps_the_other_results(shared: WorkerPool) -> None:
    before = shared.run(rank_and_pid)
    assert shared.run(die_on, 1, "kill", may_die=(1,)) == [0, None, 2]
    assert shared.run(rank_and_pid) != before
    with pytest.raises(RankDied):
        shared.run(die_on, 2, "kill", may_die=(1,))
    assert shared.run(die_on, -1, "kill", may_die=(0, 1, 2)) == [0, 1, 2]  # it need not die


def test_a_death_between_runs_is_noticed(shared: WorkerPool) -> None:
    shared.run(rank_and_pid)
    victim = shared.pids[1]
    os.kill(victim, signal.SIGKILL)
    # The fork server reaps it and passes its exit code on.
    assert wait_until(lambda: victim not in [child.pid for child in multiprocessing.active_children()])
    with pytest.warns(RuntimeWarning, match=r"rank 1: exit code -9"):
        assert shared.run(sum_of_ranks) == [3.0] * 3


def test_reports_come_while_the_run_is_under_way_in_each_ranks_order(shared: WorkerPool) -> None:
    heard: list[tuple[int, object]] = []
    assert shared.run(report_steps, "return", watch=lambda *pair: heard.append(pair)) == ["done"] * 3
    by_rank = {rank: [value for who, value in heard if who == rank] for rank in range(3)}
    assert by_rank[0] == [(0, "loading")]
    assert by_rank[2] == [(2, "loading")]
    assert by_rank[1][0] == (1, "loading")
    assert isinstance(by_rank[1][1], torch.Tensor)
    assert by_rank[1][1].tolist() == [7.0, 7.0]
    assert by_rank[1][2:] == ["about to return"]
    assert shared.run(report_steps, "return") == ["done"] * 3  # nobody need listen
    report("outside of a worker")  # goes nowhere


@pytest.mark.parametrize(("ending", "kind"), [("raise", RankError), ("die", RankDied), ("hang", RankTimeout)])
def test_a_failure_carries_the_last_report_and_output_of_each_rank(
    shared: WorkerPool, ending: str, kind: type[RankFailure]
) -> None:
    with pytest.raises(kind) as caught:
        shared.run(report_steps, ending, timeout=20.0 if ending != "hang" else 2.0)
    assert caught.value.reports == {0: (0, "loading"), 1: f"about to {ending}", 2: (2, "loading")}
    assert f"rank 1 will {ending}" in caught.value.outputs[1]
    assert f"rank 1 will {ending}" not in caught.value.outputs[0]


def test_reports_of_an_earlier_run_are_forgotten(shared: WorkerPool) -> None:
    shared.run(report_steps, "return")
    with pytest.raises(RankError) as caught:
        shared.run(raise_on, 0)
    assert caught.value.reports == {}


def test_reports_do_not_put_off_a_timeout(shared: WorkerPool) -> None:
    started = time.monotonic()
    with pytest.raises(RankTimeout) as caught:
        shared.run(report_without_end, timeout=1.0)
    assert time.monotonic() - started < 10.0
    assert set(caught.value.reports.values()) == {"still here"}


def test_whoever_watches_may_end_the_run(shared: WorkerPool) -> None:
    def refuse(rank: int, value: object) -> None:
        raise LookupError(f"{rank} {value}")

    with pytest.raises(LookupError, match="loading"):
        shared.run(report_steps, "hang", watch=refuse)
    assert shared.pids == []
    assert shared.run(sum_of_ranks) == [3.0] * 3


def test_what_cannot_travel_is_said(shared: WorkerPool) -> None:
    before = shared.run(rank_and_pid)
    with pytest.raises(TypeError, match="module-level"):
        shared.run(lambda: None)
    assert shared.run(rank_and_pid) == before  # nothing had been sent
    with pytest.raises(RankError, match="rank 0"):
        shared.run(unpicklable_result)


def test_children_of_ranks_die_with_them(shared: WorkerPool) -> None:
    children = shared.run(start_a_child)
    with pytest.raises(RankError):
        shared.run(raise_on, 0)
    assert wait_until(lambda: not any(exists(child) for child in children))


def test_sixteen_ranks(tmp_path: Path) -> None:
    with WorkerPool(16) as many:
        started = time.monotonic()
        assert many.run(sum_of_ranks) == [120.0] * 16
        assert time.monotonic() - started < 30.0  # under 1 s on two idle cores; each importing torch would be 40


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    for fail in (False, True):
        with WorkerPool(2) as workers:
            workers.run(rank_and_pid)
            assert list(tmp_path.glob("ring-core-pool-*")) == []  # while it runs, too: a killed test cleans up nothing
            pids = workers.pids
            if fail:
                with pytest.raises(RankDied):
                    workers.run(die_on, 0, "exit")
        assert not any(exists(pid) for pid in pids)
        with pytest.raises(RuntimeError, match="closed"):
            workers.run(rank_and_pid)
        workers.close()
    del workers
    gc.collect()
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert not any(child.name.startswith("ring-core-rank") and child.pid in pids
                   for child in multiprocessing.active_children())  # fmt: skip


def test_cached_pools_share_a_bound_on_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    pool.close_pools()
    monkeypatch.setattr(pool, "MAX_LIVE_WORKERS", 5)
    one, two, three = get_pool(1), get_pool(2), get_pool(3)
    assert get_pool(2) is two
    two.run(rank_and_pid)
    three.run(rank_and_pid)
    two.run(rank_and_pid)  # now three is the least recently used
    pids = two.pids
    one.run(rank_and_pid)
    assert (len(one.pids), two.pids, three.pids) == (1, pids, [])
    three.run(sum_of_ranks)  # comes back by itself; two is older than one
    assert (len(one.pids), two.pids, len(three.pids)) == (1, [], 3)
    three.close()
    assert get_pool(3) is not three
    pool.close_pools()
    assert one.pids == []


def script(body: str) -> str:
    return textwrap.dedent(body)


def run_python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TMPDIR": str(cwd), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_an_interpreter_exits_with_an_open_pool(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        script("""
        import os, time
        from ring_core.testing import WorkerPool, get_pool
        if __name__ == "__main__":
            print(*get_pool(2).run(os.getpid), *WorkerPool(1).run(os.getpid))
        """)
    )
    done = run_python("main.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3
    assert wait_until(lambda: not any(exists(pid) for pid in pids))
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")}  # torch's own cache
    assert left == {"main.py"}
    assert done.stderr == ""


def test_ranks_do_not_outlive_a_killed_pool(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        script("""
        import os, pathlib, time
        def hang():
            pathlib.Path(f"{os.getpid()}.pid").touch()
            time.sleep(600)
        """)
    )
    (tmp_path / "main.py").write_text(
        script("""
        import os, signal, task, threading, pathlib, time
        from ring_core.testing import WorkerPool
        def kill():
            while len(list(pathlib.Path().glob("*.pid"))) < 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        if __name__ == "__main__":
            threading.Thread(target=kill, daemon=True).start()
            WorkerPool(2).run(task.hang)
        """)
    )
    done = run_python("main.py", cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    assert wait_until(lambda: not any(exists(pid) for pid in pids))


def test_modules_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_same.py").write_text(
            script(f"""
            def where():
                return {folder!r}
            def test_where(ranks):
                assert ranks(2, where) == [{folder!r}] * 2
            """)
        )
    arguments = ["-m", "pytest", "-q", "-p", "ring_core.testing.plugin", "-p", "no:cacheprovider"]
    done = run_python(*arguments, "--import-mode=importlib", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_the_plugin(tmp_path: Path) -> None:
    # As `pytest` runs this workspace: modules with parents that nothing can import, no working directory on the path.
    file = tmp_path / "packages" / "some-package" / "tests" / "test_plugin.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        script("""
        import pytest, torch

        def draw():
            return torch.rand(()).item()
        def skip():
            pytest.skip("not on this machine")
        def fail():
            raise ValueError("from a rank")

        def test_draws_follow_the_seed(ranks, seed):
            torch.manual_seed(seed)
            assert ranks(2, draw) == [torch.rand(()).item()] * 2
        def test_seed(seed):
            assert seed == 42
        def test_a_rank_skips(ranks):
            ranks(1, skip)
        def test_a_rank_fails(ranks):
            ranks(1, fail)
        def test_device(ranks):
            ranks(99, draw, device="cuda")
        @pytest.mark.gpu
        def test_gpu():
            pass
        @pytest.mark.multi_gpu(99)
        def test_multi_gpu():
            raise AssertionError
        @pytest.mark.multi_gpu
        def test_multi_gpu_of_how_many():
            pass
        """)
    )
    arguments = ["-P", "-m", "pytest", "-p", "ring_core.testing.plugin", "-p", "no:cacheprovider"]
    arguments += ["--import-mode=importlib", f"--rootdir={tmp_path}", "--strict-markers", "-rs"]
    variables = {"RING_TEST_SEED": "42", "CUDA_VISIBLE_DEVICES": ""}
    done = run_python(*arguments, str(file), cwd=tmp_path, **variables)
    assert "2 passed" in done.stdout, done.stdout
    assert "1 failed" in done.stdout
    assert "4 skipped" in done.stdout
    assert "1 error" in done.stdout
    assert "rank 0: not on this machine" in done.stdout
    assert "needs 99 CUDA device(s), this machine has 0" in done.stdout
    assert "needs 1 CUDA device(s), this machine has 0" in done.stdout
    assert "RankError: rank 0 raised ValueError: from a rank" in done.stdout
    assert "rerun this test with RING_TEST_SEED=42" in done.stdout
    assert "multi_gpu needs the number of devices" in done.stdout


def test_ranks_may_share_a_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    from ring_core.testing import plugin

    request.applymarker(pytest.mark.multi_gpu(4))
    for present, share, runs in ((4, "", True), (1, "", False), (1, "0", False), (1, "1", True), (0, "1", False)):
        monkeypatch.setattr("torch.cuda.device_count", lambda present=present: present)
        monkeypatch.setenv("RING_TEST_SHARE_GPUS", share)
        with contextlib.nullcontext() if runs else pytest.raises(pytest.skip.Exception, match=f"machine has {present}"):
            plugin.pytest_runtest_setup(request.node)


def test_seeds_are_fresh_without_the_variable(
    seed: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ring_core.testing import plugin

    make = plugin.seed.__wrapped__ if hasattr(plugin.seed, "__wrapped__") else plugin.seed.__pytest_wrapped__.obj
    monkeypatch.delenv("RING_TEST_SEED", raising=False)
    assert len({make(request) for _ in range(3)}) == 3
    monkeypatch.setenv("RING_TEST_SEED", "17")
    assert make(request) == 17


def test_bad_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="world_size"):
        WorkerPool(0)
    with pytest.raises(ValueError, match="device"):
        WorkerPool(1, "tpu")


@pytest.mark.multi_gpu(2)
def test_cuda_ranks_have_both_backends(ranks: Callable[..., list[object]]) -> None:
    assert ranks(2, cuda_ring) == [(0, 4.0, 4.0), (1, 4.0, 4.0)]
    results = ranks(2, cuda_tensor)
    assert [str(x.device) for x in results if isinstance(x, torch.Tensor)] == ["cpu", "cpu"]
