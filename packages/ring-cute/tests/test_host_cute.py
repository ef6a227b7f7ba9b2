"""The host's side of every case that the GPU tests run, with kernels that do nothing: it prepares, launches,
finishes, and asks for kernels that there can be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
