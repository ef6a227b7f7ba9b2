"""compute-sanitizer on a backend's kernels, where it is installed and takes the device.

    @pytest.mark.gpu
    @pytest.mark.parametrize("check", ["memcheck", "synccheck"])
    def test_nothing_to_report(check):
        check_sanitizer(check, "triton[hopper]")

memcheck: reads and writes outside of allocations. synccheck: barriers that not all of their threads reach. racecheck:
shared memory that is written and read without a barrier between; it knows no mbarrier and none of the copies of TMA.

What runs under it is this file as a program, `sanitizer.py BACKEND`: kernel cases small enough for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ring_core.backend import load_backend
from ring_core.testing.conformance import check_kernel_case, kernel_cases

TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
REFUSED = "Device not supported"
NAMES = (
    "causal-contiguous-ring-3",  # several calls that accumulate
    "wide-stripe-gather-3",  # two-sided windows, segments of several pieces
    "packed-causal-sinks",
    "cuts-four-calls",
    "entries-everything",
    "heads-6-2-contiguous-ring-2",
    "deterministic-contiguous-gather-2",
)
HEAD_DIMS = (64, 128)
DONE = "all cases ran"
SCALE = 9
"""Lengths of some 500 tokens, multiples of nothing: several tiles, the last of which is cut."""


def check_sanitizer(check: str, backend: str, *, timeout: float = 600) -> None:
    """Raises AssertionError if the tool `check` has anything to report of the backend's kernels; skips, with the
    reason, where the tool or the backend is not available."""
    if not Path(TOOL).exists():
        pytest.skip("compute-sanitizer is not installed")
    can = load_backend(backend).capabilities(torch.device("cuda"))
    if not can.available:
        pytest.skip(can.reason)
    command = [TOOL, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, backend]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or what lies beside a tensor is allocated too
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
    if REFUSED in done.stdout:
        pytest.skip(f"compute-sanitizer: {REFUSED}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert DONE in done.stdout, done.stdout[-2000:]


def main(name: str) -> None:
    cases = {case.name: case for case in kernel_cases(scale=SCALE)}
    backend = load_backend(name)
    for case in NAMES:
        for head_dim in HEAD_DIMS:
            check_kernel_case(replace(cases[case], head_dim=head_dim, dtype=torch.bfloat16), backend, "cuda", seed=7)
            print(f"ran {case}, head dim {head_dim}", flush=True)
    print(DONE, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
