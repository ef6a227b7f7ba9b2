"""compute-sanitizer finds nothing in the kernels, where it is installed and takes the device.

memcheck: reads and writes outside of allocations. synccheck: barriers that not all of their threads reach. racecheck:
shared memory that is written and read without a barrier between. racecheck knows no mbarrier and none of the copies of
TMA, which are what the Hopper kernels synchronise by: there it reports the word that the producer leaves for the
consumers (128 threads store the same number, an mbarrier follows), and Triton's own hand-over to the partitions of
`warp_specialize`. Their order is what `tests/hopper/test_hopper_simulated.py` tests instead. So racecheck is for the
portable path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ring_core.backend import load_backend

TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
REFUSED = "Device not supported"
RUNS = [
    ("memcheck", "hopper"),
    ("synccheck", "hopper"),
    ("memcheck", "portable"),
    ("synccheck", "portable"),
    ("racecheck", "portable"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("check", "path"), RUNS)
def test_nothing_to_report(check: str, path: str) -> None:
    if not Path(TOOL).exists():
        pytest.skip("compute-sanitizer is not installed")
    can = load_backend(f"triton[{path}]").capabilities(torch.device("cuda"))
    if not can.available:
        pytest.skip(can.reason)
    script = Path(__file__).with_name("sanitized.py")
    command = [TOOL, "--tool", check, "--error-exitcode", "9", sys.executable, str(script), path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or what lies beside a tensor is allocated too
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if REFUSED in done.stdout:
        pytest.skip(f"compute-sanitizer: {REFUSED}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "all cases ran" in done.stdout, done.stdout[-2000:]
