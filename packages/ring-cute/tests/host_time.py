"""The host's side of every launch, without a GPU: kernels as they are cached and loaded, on a stand-in for the CUDA
runtime whose functions count their calls and do nothing. Needs the DSL, apache-tvm-ffi and a C compiler.

    python packages/ring-cute/tests/host_time.py

On a GPU's machine (`gpu_probe.py host`) there come the driver's own time for a launch, questions for the current device
and stream, 0.1 to 0.2 µs each, and another allocator.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ring_core.backend import DeviceTable, Params, on_device
from ring_core.plan import Problem, make_plan
from ring_core.segment import COLUMNS, FIRST, LAST, Table
from ring_cute import CuteBackend, library
from ring_cute.hopper import backward_launch, launch

SPECIAL = {
    "cudaLibraryLoadData": "(void **made) { COUNT; *made = made; return 0; }",
    "cudaLibraryGetKernel": "(void **made) { COUNT; *made = made; return 0; }",
    "cudaGetDeviceCount": "(int *devices) { COUNT; *devices = 1; return 0; }",
    "cudaGetDriverEntryPointByVersion": "(char *name, void **found, int version, long flags, int *status) "
    "{ COUNT; *found = nothing; if (status) *status = 0; return 0; }",
}
"""Functions of the runtime that give something back."""
CPU = torch.device("cpu")
TOKENS, HEADS, HEAD_DIM = 64, 2, 64


class Runtime:
    """The stand-in, for libraries that have been made."""

    def __init__(self, folder: Path, libraries: list[Path]) -> None:
        wanted: set[str] = set()
        for path in libraries:
            listed = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True)
            wanted |= {word for word in listed.stdout.split() if word.startswith("cuda")}
        self._names = sorted(wanted)
        source, target = folder / "runtime.c", folder / "libruntime.so"
        lines = [f"static int nothing(void) {{ return 0; }}\nlong counts[{len(self._names)}];"]
        for n, name in enumerate(self._names):
            body = SPECIAL.get(name, "(void) { COUNT; return 0; }").replace("COUNT", f"counts[{n}]++")
            lines.append(f"int {name}{body}")
        source.write_text("\n".join(lines))
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", target, source], check=True)
        self._counts = (ctypes.c_long * len(self._names)).in_dll(ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL), "counts")

    def counted(self, call: Callable[[], object]) -> Counter[str]:
        """How often a call calls each function."""
        before = list(self._counts)
        call()
        found = zip(self._names, self._counts, before, strict=True)
        return Counter({name: count - earlier for name, count, earlier in found if count != earlier})


def copied(table: Table, device: torch.device, flags: int = FIRST | LAST) -> DeviceTable:
    """A table that nothing is remembered with yet."""
    rows = table.rows.copy()
    rows[:, COLUMNS.index("flags")] = flags
    return on_device(Table(rows, table.groups), device)


def calls(device: torch.device = CPU) -> dict[str, Callable[[], object]]:
    """Each kind of launch, as the backend is asked for it."""
    backend, params = CuteBackend(), Params(0.1)
    zeros = partial(torch.zeros, device=device)
    q, out, dout = zeros(3, 1, TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    k, v = zeros(2, 1, 1, TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    lse, total, (dk, dv) = zeros(1, HEADS, TOKENS), zeros(q.shape), zeros(2, *k.shape)
    plan = make_plan(Problem(TOKENS, TOKENS, TOKENS, TOKENS, None, 0, "contiguous", 1), 0, "ring").steps[0]
    whole, between = copied(plan.forward, device), copied(plan.forward, device, 0)
    keys = copied(plan.backward, device)
    state = backend.prepare(q, k.shape[1:], out, dout, lse, None, params=params)
    return {
        "forward": lambda: backend.forward(q, k, v, out, lse, None, whole, params=params),
        "forward, a ring's step": lambda: backend.forward(q, k, v, out, lse, total, between, params=params),
        "prepare": lambda: backend.prepare(q, k.shape[1:], out, dout, lse, None, params=params),
        "backward": lambda: backend.backward(state, q, k, v, dout, dk, dv, keys, params=params),
        "finish": lambda: backend.finish(state, params=params),
    }


@contextmanager
def prepared() -> Iterator[tuple[dict[str, Callable[[], object]], Runtime]]:
    """All calls, made once, and what they call. Compiles what is not in the cache."""
    kinds: dict[Any, None] = {}

    def noted(kind: Any) -> Callable[..., None]:
        kinds[kind] = None
        return lambda *numbers: None

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for module in (launch, backward_launch):
            patches.enter_context(patch.object(module, "current_stream", lambda device: 0))
            patches.enter_context(patch.object(module, "_processors", lambda device: 132))
        patches.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        zero = torch.zeros(1, dtype=torch.int32)
        patches.enter_context(patch.dict(launch._counters, {(-1, 0): (zero.data_ptr(), zero)}))
        for known in (backward_launch._prepared, backward_launch._finished):
            patches.enter_context(patch.dict(known, clear=True))
        with patch.object(library, "load", noted):
            for call in calls().values():
                call()
        backward_launch._prepared.clear()
        backward_launch._finished.clear()
        paths = [library.find(kind) or library.build(kind).path for kind in kinds]
        runtime = Runtime(Path(folder), [path for path in paths if path is not None])
        made = calls()
        for call in made.values():
            call()
        yield made, runtime


def microseconds(call: Callable[[], object]) -> float:
    """The fastest of many short runs: what else the machine does takes turns with it."""
    return min(timeit.repeat(call, number=100, repeat=300)) * 1e4


def main() -> int:
    with prepared() as (made, _):
        for name, call in made.items():
            print(f"{name:24s}{microseconds(call):6.2f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
