"""What can be said of the backend without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ring_core.backend import StagedBackend, UnsupportedError
from ring_core.segment import FIRST, LAST
from ring_cute import CuteBackend, library
from ring_cute.compile import shipped
from ring_cute.settings import FORWARD, SHARED_BYTES, settings_for


def test_import_needs_neither_dsl_nor_gpu() -> None:
    code = "import sys, ring_cute, ring_cute.hopper.launch; assert not {'cutlass', 'tvm_ffi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_capabilities_name_another_backend_where_it_cannot() -> None:
    can = CuteBackend().capabilities(torch.device("cpu"))
    assert not can.available
    assert "triton" in can.reason


def test_contract() -> None:
    backend = CuteBackend()
    assert isinstance(backend, StagedBackend)
    with pytest.raises(UnsupportedError, match="triton"):
        backend.finish(None, params=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", FORWARD)
def test_settings_fit(head_dim: int) -> None:
    s = settings_for(head_dim)
    assert s.stages & (s.stages - 1) == 0
    assert s.consumer_registers % 8 == 0 and s.producer_registers % 8 == 0
    assert 128 * (s.consumers * s.consumer_registers + s.producer_registers) <= 65536
    assert all(kind.shared_bytes <= SHARED_BYTES for kind in shipped((head_dim,)))


def test_kinds_have_files_of_their_own() -> None:
    names = [library.words(kind) for kind in shipped()]
    assert len(set(names)) == len(names)


def test_record_columns_are_those_of_tiles() -> None:
    """The kernel reads `items` and `walk` by number."""
    from ring_core.tiles import ITEM, WALK

    assert (ITEM + WALK[:8]) == (
        "walk_start", "walk_stop", "q_row", "rows", "batch", "flags", "blocks", "unused",
        "k_row", "k_len", "j_lo", "blocks", "right", "edges", "lower", "upper",
    )  # fmt: skip
    assert (WALK[8], FIRST, LAST) == ("piece", 1, 2)
