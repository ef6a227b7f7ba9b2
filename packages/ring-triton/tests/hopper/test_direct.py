"""Launching again without Triton: the same parameters, in the layout that the compiled kernel declares."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "direct_checks.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        "layout",
        "pointers",
        "keys",
        "profilers",
        "copies",
        "portable_kernels",
        "core_kernels",
        "hopper_backward",
        "hopper_backward_final",
    ],
)
def test_direct_launch(check: str) -> None:
    """In a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, CHECKS, check]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_alignment() -> None:
    from ring_core.direct import aligned

    assert aligned(16, 32, 0) and not aligned(16, 24)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
