"""One rank: joins its group, then does tasks one after another and reports stages, rows or what went wrong."""

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ring_compare.measure import CellRun, Row, Stage, Task
from ring_compare.ranks import Ranks


@dataclass(frozen=True)
class Failure:
    """An exception of this rank, in words, and the stage it happened in."""

    stage: Stage
    text: str
    after_s: float = 0.0  # from the beginning of the task: the earliest of several failures is the cause


@dataclass(frozen=True)
class Ready:
    """The rank has joined its group."""


@dataclass(frozen=True)
class Finished:
    """The rows of a task."""

    rows: list[Row]


Message = Ready | Stage | Finished | Failure
STARTING = Stage(-1, "", "", "", "starting")


@dataclass(frozen=True)
class Seat:
    """Where a spawned worker sits; travels by pickle."""

    rank: int
    world_size: int
    device: str
    port: int
    timeout_s: float
    log: str


def perform(task: Task, ranks: Ranks, send: Callable[[Stage], None]) -> Finished | Failure:
    """Do a task; whatever goes wrong comes back as a `Failure`."""
    last, start = STARTING, time.monotonic()

    def report(stage: Stage) -> None:
        nonlocal last
        last = stage
        send(stage)

    try:
        return Finished(CellRun(task, ranks, report).run())
    except Exception as error:  # the boundary: code under comparison may raise anything, and the run must go on
        traceback.print_exc()
        words = " ".join(str(error).split()) or "no message"
        return Failure(last, f"{type(error).__name__}: {words}", time.monotonic() - start)


def choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    """This rank's device; on the CPU its share of the cores instead, so that ranks do not fight over them."""
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    return torch.device("cpu")


def join_group(
    store: Store, rank: int, world_size: int, device: torch.device, timeout: datetime.timedelta
) -> dist.ProcessGroup | None:
    """The default process group: NCCL on GPUs, gloo on CPUs; one rank needs none."""
    if world_size == 1:
        return None
    store = PrefixStore("ring_compare/group", store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    return dist.group.WORLD


def worker_main(seat: Seat, connection: Connection) -> None:
    """Life of a spawned worker: ends when the launcher closes its side."""
    with open(seat.log, "w") as log:
        # Native code writes to the descriptors, hence not just sys.stderr: the launcher quotes the end of this file.
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(RANK=str(seat.rank), LOCAL_RANK=str(seat.rank), WORLD_SIZE=str(seat.world_size))
    device = choose_device(seat.device, seat.rank, seat.world_size)
    timeout = datetime.timedelta(seconds=seat.timeout_s)
    group = None
    if seat.world_size > 1:
        store = dist.TCPStore("127.0.0.1", seat.port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        group = join_group(store, seat.rank, seat.world_size, device, timeout)
    ranks = Ranks(seat.rank, seat.world_size, device, group)
    connection.send(Ready())
    while True:
        try:
            task = connection.recv()
        except EOFError:
            break
        connection.send(perform(task, ranks, connection.send))
    if group is not None:
        dist.destroy_process_group()
