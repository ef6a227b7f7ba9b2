"""Which kernels the GPU tests take, found without a GPU; compiles them into the cache, which is then carried to one.

    RING_CUTE_CACHE=kernels python packages/ring-cute/tests/gpu/needed.py [--list] [--jobs N]

Every case is prepared and launched as on a GPU, by the same host code, with kernels that do nothing in the place of the
compiled ones: what they would have been is noted. Then what tests ask for that need several processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cute_gpu_cases as cases

from ring_core.backend import register_backend
from ring_core.testing.conformance import KernelCase, check_kernel_case, kernel, kernel_cases
from ring_core.testing.sanitizer import HEAD_DIMS, NAMES
from ring_core.testing.sanitizer import SCALE as SANITIZED
from ring_cute import CuteBackend, backend, library
from ring_cute.compile import fill, shipped
from ring_cute.hopper import backward_launch, launch

PROCESSORS = 132


@contextmanager
def noted() -> Iterator[dict[Any, None]]:
    """The kinds that calls on CPU tensors ask for, in order."""
    kinds: dict[Any, None] = {}

    def load(kind: Any) -> Any:
        kinds[kind] = None
        return lambda *numbers: None

    with (
        patch.object(library, "load", load),
        patch.object(backend, "_missing", lambda device: ""),
        patch.object(launch, "current_stream", lambda device: 0),
        patch.object(backward_launch, "current_stream", lambda device: 0),
        patch.object(kernel, "check_results", lambda *given, **more: SimpleNamespace(out=None)),
        patch.object(kernel._Run, "_untouched", lambda *given: None),
        patch.object(torch, "equal", lambda *given: True),
        patch.object(kernel, "departures_of", lambda table, pieces, batch, heads: (0,) * pieces),
        patch.object(launch, "_counter", lambda device, stream: 0),
        patch.object(launch, "_processors", lambda device: PROCESSORS),
        patch.object(backward_launch, "_counter", lambda device, stream: 0),
        patch.object(backward_launch, "_processors", lambda device: PROCESSORS),
    ):
        register_backend("cute", CuteBackend())
        yield kinds
    register_backend("cute", CuteBackend())


def launched() -> Iterator[KernelCase]:
    """Cases of one process, and of several as simulated ranks of both schedules, with flags where pieces come late."""
    yield from (replace(case, dtype=case.dtype or cases.DTYPES[0]) for case in kernel_cases())
    yield from cases.kernels()
    yield from cases.head_dims()
    yield from cases.shaped()
    yield from cases.wide()
    small = {case.name: case for case in kernel_cases(scale=SANITIZED)}
    yield from (replace(small[name], head_dim=dim, dtype=torch.bfloat16) for name in NAMES for dim in HEAD_DIMS)
    alike: dict[Any, None] = {}
    for case in (*cases.rings(), *cases.packed()):
        dtype = case.dtype or torch.bfloat16
        alike[case.head_dim, dtype, case.sinks, case.dlse, case.deterministic, case.softcap, case.alibi] = None
    for dim in cases.PROPERTY_HEAD_DIMS:
        for dtype in cases.DTYPES:
            for sinks in (False, True):
                alike[dim, dtype, sinks, True, False, 0.0, ""] = None
                for softcap, alibi in product((0.0, 1.0), ("", "head")):
                    alike[dim, dtype, sinks, False, False, softcap, alibi] = None
    for staged in (*cases.STAGED, cases.LONG_STAGED):
        alike[staged.head_dim, staged.dtype, False, False, False, 0.0, ""] = None
    simulated = {case.name: case for case in kernel_cases(scale=cases.SCALE)}
    for dim, dtype, sinks, dlse, deterministic, softcap, alibi in alike:
        for name in ("causal-contiguous-ring-3", "causal-contiguous-gather-3"):
            for flags in (False, True):
                case = replace(simulated[name], head_dim=dim, dtype=dtype, sinks=sinks, dlse=dlse, flags=flags)
                case = replace(case, deterministic=deterministic, softcap=softcap, alibi=alibi)
                yield case
                if dim in cases.PROPERTY_HEAD_DIMS:  # drawn with key heads of their own too
                    yield replace(case, kv_heads=case.q_heads)


def needed() -> list[Any]:
    """All kinds, in the order in which tests ask for them, those of `ring_compare`'s suites first."""
    with noted() as kinds:
        kinds |= dict.fromkeys(shipped(dtypes=("bfloat16",)))
        for case in launched():
            if case.dtype in cases.DTYPES and not case.features & backend.LACKS and not case.reveal:
                check_kernel_case(case, CuteBackend(), "cpu", seed=0)
        return list(kinds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="only say which")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    kinds = needed()
    if options.list:
        print("\n".join(library.words(kind) for kind in kinds))
        return 0
    return fill(kinds, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
