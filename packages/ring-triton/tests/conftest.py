"""Kernels run in Triton's interpreter where TRITON_INTERPRET=1 (`nox -s tests` sets it): torch imports triton, so that
nothing here could set it in time. Tests that compile start a process of their own without it. On a GPU kernels run
compiled: tests/gpu, by scripts/gpu_tests.sh."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)

# Spawned workers get the parent's environment and sys.path, and import the helpers by name.
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
