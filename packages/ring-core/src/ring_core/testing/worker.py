"""One rank's process: what a worker of `ring_core.testing.pool` runs.

A module of its own because the fork server preloads it: torch is imported once and every rank is forked from that.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import io
import os
import pickle
import random
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection as mp_connection
from multiprocessing import parent_process
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

STORE_HOST = "127.0.0.1"


@dataclass(frozen=True)
class WorkerSpec:
    """What one worker is: its rank, its device, and where it meets the others."""

    rank: int
    world_size: int
    device: str
    store_port: int
    start_timeout: float
    environment: dict[str, str]
    log_path: str


@dataclass(frozen=True)
class Request:
    """One call. `call` is a pickled `(function, args, kwargs)`, opened only once `module` is importable."""

    call: bytes
    module: str
    file: str | None
    sys_path: list[str]
    environment: dict[str, str]
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a rank sends back: a pickled result, or an exception as text (exceptions themselves may not pickle)."""

    result: bytes | None = None
    type_name: str = ""
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Report:
    """What a rank says before its answer: a pickled value."""

    value: bytes


class _TensorPickler(pickle.Pickler):
    """Plain pickling, with tensors as CPU bytes: no shared-memory descriptors, no CUDA handles.

    A view is copied first: pickled as it is it would drag its whole storage along.
    """

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) not in (torch.Tensor, torch.nn.Parameter) or obj.layout != torch.strided:
            return NotImplemented
        plain = obj.detach().cpu()
        if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        if obj.requires_grad and obj.is_leaf:
            plain.requires_grad_()
        return plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dump(value: Any) -> bytes:
    """Pickle `value`; every tensor in it arrives as a CPU tensor (a leaf keeps `requires_grad`)."""
    buffer = io.BytesIO()
    _TensorPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


_to_pool: mp_connection.Connection | None = None  # in a worker


def report(value: Any) -> None:
    """Tell the pool how far this rank is, from the thread of a function that the pool runs; elsewhere nothing happens.

    `WorkerPool.run(..., watch=callback)` hears every report, and a failure carries the last one of each rank.
    """
    if _to_pool is not None:
        _to_pool.send_bytes(pickle.dumps(Report(dump(value))))


def main(spec: WorkerSpec, connection: mp_connection.Connection) -> None:
    """Join the process group, say so, then answer requests until the pool closes the pipe or says stop."""
    global _to_pool
    _to_pool = connection
    os.setsid()  # own process group: the pool can kill a rank with all its children, and Ctrl-C reaches only the pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _capture_output(spec.log_path)
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()
    os.environ.clear()  # a fork server keeps the environment of its own start
    os.environ.update(spec.environment)
    try:
        store = _join(spec)
        connection.send_bytes(pickle.dumps(Answer(result=b"")))
    except Exception as error:  # whatever kept this rank from starting has to reach the pool
        connection.send_bytes(pickle.dumps(_failure(error)))
        return
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            break
        if not message:
            break
        try:
            answer = Answer(result=_run(pickle.loads(message), spec.device))
        except SystemExit:
            raise
        except BaseException as error:  # pytest's skip and fail derive from it: ship whatever a test case raises
            answer = _failure(error)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            connection.send_bytes(pickle.dumps(answer))
        except BrokenPipeError:
            break
        del answer
    dist.destroy_process_group()
    del store


def _failure(error: BaseException) -> Answer:
    text = "".join(traceback.format_exception(error))
    return Answer(type_name=type(error).__name__, message=str(error), traceback=text)


def _capture_output(path: str) -> None:
    """Send descriptors 1 and 2 to `path`, so that what C++ prints is kept as well."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True, errors="backslashreplace")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True, errors="backslashreplace")


def _exit_with_parent() -> None:
    """End this process when the pool's process is gone, even in the middle of a collective."""
    parent = parent_process()
    if parent is not None:
        mp_connection.wait([parent.sentinel])
        os._exit(1)


def _of_shared_gpus(rank: int) -> dict[str, str]:
    """Variables under which ranks of one GPU work together. NCCL refuses two ranks of one host and GPU: each is said to
    have a host of its own, and sockets lie between them. Multicast needs GPUs of their own."""
    return {
        "NCCL_HOSTID": f"ring-core-rank{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }


def _join(spec: WorkerSpec) -> Any:
    """Enter the process group and connect; returns the store, which must outlive it."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are here, and a host name may not resolve
    if spec.device == "cuda":
        count = torch.cuda.device_count()
        if spec.world_size > count > 0:
            os.environ.update(_of_shared_gpus(spec.rank))
        torch.cuda.set_device(spec.rank % max(1, count))
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(1)
        backend = "gloo"
    timeout = timedelta(seconds=spec.start_timeout)
    store = dist.TCPStore(STORE_HOST, spec.store_port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=spec.rank, world_size=spec.world_size)
    dist.all_reduce(torch.zeros(1))  # connect now, on the start's time, rather than in the first case
    if spec.device == "cuda":
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    return store


def _run(request: Request, device: str) -> bytes:
    sys.path[:] = request.sys_path
    _import_as(request.module, request.file)
    function: Callable[..., Any]
    function, args, kwargs = pickle.loads(request.call)
    random.seed(request.seed)
    torch.manual_seed(request.seed)
    with _environment(request.environment):
        result = function(*args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()  # a kernel's error belongs to the case that launched it
    return dump(result)


def _import_as(name: str, file: str | None) -> None:
    """Make `name` mean the module in `file`, as in the pool's process.

    Test modules of two packages may share a name, and pytest's importlib mode gives names that no import finds.
    """
    if name == "__main__":  # multiprocessing has prepared it
        return
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        if file is None:
            raise
    else:
        found = getattr(module, "__file__", None)
        if file is None or (found is not None and os.path.realpath(found) == file):
            return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load module {name} from {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    for dot in (at for at, letter in enumerate(name) if letter == "."):  # unpickling looks for the parents too
        sys.modules.setdefault(name[:dot], ModuleType(name[:dot]))
    spec.loader.exec_module(module)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
