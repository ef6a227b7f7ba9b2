"""The host's side of launches, without a GPU: every case that the GPU tests run, with kernels that do nothing, asks for
kernels that there can be; and what a launch does that has been made before is counted."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from host_time import prepared
from torch.utils._python_dispatch import TorchDispatchMode

from ring_cute import library
from ring_cute.compile import shipped
from ring_cute.settings import SHARED_BYTES

FOLDER = str(Path(__file__).with_name("gpu"))


@pytest.mark.slow
def test_kernels_that_gpu_tests_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [FOLDER, *sys.path])
    import needed

    kinds = needed.needed()
    assert set(shipped(dtypes=("bfloat16",))) <= set(kinds)
    assert {type(kind).__name__ for kind in kinds} == {"ForwardKind", "BackwardKind", "EndsKind"}
    for kind in kinds:
        assert getattr(kind, "shared_bytes", 0) <= SHARED_BYTES, kind
    assert len({library.words(kind) for kind in kinds}) == len(kinds)


class Operators(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls_of(call: Any) -> tuple[int, Counter[str]]:
    """How many functions in Python a call takes, and how often each in C."""
    python, other = 0, Counter[str]()

    def note(frame: FrameType, event: str, what: Any) -> None:
        nonlocal python
        python += event == "call"
        if event == "c_call":
            other[what.__name__] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    del other["setprofile"]
    return python, other


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.skipif(shutil.which("cc") is None, reason="the stand-in for the CUDA runtime is compiled by cc")
def test_what_a_launch_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One call of the runtime; nothing is allocated but what is returned; nothing is asked of tensors but addresses.

    10 µs of the host's time are what a launch may take, most of which are the driver's: a call in Python takes 0.05 to
    0.15, a tensor's strides or shape 0.15, an operator 1 and more.
    """
    monkeypatch.setenv("RING_CUTE_CACHE", str(tmp_path))
    with prepared() as (made, runtime):
        for name, call in made.items():
            assert runtime.counted(call) == {"cudaLaunchKernelExC": 1}, name
            with Operators() as operators:
                call()
            assert operators.count == ({"new_empty.default": 1} if name in ("prepare", "finish") else {}), name
            python, other = calls_of(call)
            assert python <= 14 and other.total() <= 6 and not other["stride"], (name, python, other)
