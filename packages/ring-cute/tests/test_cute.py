"""What can be said of the backend without a GPU and without the DSL."""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

import ring_cute
from ring_core.backend import (
    ENTRY_POINTS,
    Capabilities,
    Dropout,
    Params,
    StagedBackend,
    UnsupportedError,
    check_supported,
    choose_backend,
    on_device,
    register_backend,
)
from ring_core.functions import AttentionFunctions
from ring_core.segment import FIRST, LAST
from ring_core.testing.direct import causal_table
from ring_cute import CuteBackend, backend, library
from ring_cute.compile import backwards, shipped
from ring_cute.hopper import launch
from ring_cute.hopper.backward_settings import BACKWARD, BackwardKind, backward_head_dim, backward_settings_for
from ring_cute.settings import FORWARD, SHARED_BYTES, kind_for, settings_for


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Known by its name, also where nothing is installed, before and after tests that change what it is."""
    register_backend("cute", CuteBackend())
    yield
    register_backend("cute", CuteBackend())


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMPORT_SECONDS = 1.0
"""Of ring_cute alone, where torch and ring_core are there: it takes some hundredths."""


def run(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    everything = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_import_needs_neither_dsl_nor_gpu() -> None:
    """Nor do the modules that launch kernels; and it takes no time to speak of."""
    code = """
import sys, time, torch, ring_core.functions
begin = time.perf_counter()
import ring_cute
print(time.perf_counter() - begin)
import ring_cute.hopper.launch
for name in ("cutlass", "tvm_ffi"):
    assert name not in sys.modules, name
"""
    assert float(run(code)) < IMPORT_SECONDS


def test_import_where_nothing_is_installed() -> None:
    """As on a machine to which pip brought ring-cute without what it depends on: a reason, and how to get it."""
    code = """
import importlib.abc, importlib.metadata, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cutlass", "tvm_ffi"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
version = importlib.metadata.version
def hidden(name):
    if name.startswith("nvidia-cutlass-dsl"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
import torch, ring_cute
from ring_cute import library
assert not library.dsl_version()
print(ring_cute.CuteBackend().capabilities(torch.device("cpu")).reason)
library._tvm_ffi = lambda: True
print(library.missing())
library._tvm_ffi = lambda: False
print(library.missing())
"""
    no_gpu, no_dsl, no_ffi = run(code, RING_CUTE_CACHE="/nonexistent").splitlines()
    assert "compute capability 9.0" in no_gpu and "'triton' (pip install ring-triton)" in no_gpu
    assert "pip install 'nvidia-cutlass-dsl[cu13]>=4.7,<4.9'" in no_dsl and "/nonexistent" in no_dsl
    assert "pip install 'apache-tvm-ffi>=0.1.11,<0.2'" in no_ffi


def test_the_family_is_whole() -> None:
    """Every function that ring_core makes, under its name with the prefix, and no other."""
    names = {f"cute_{name}" for name in AttentionFunctions._fields}
    assert names == set(ring_cute.__all__) - {"CuteBackend"}
    for name in names:
        function: Any = getattr(ring_cute, name)
        assert (function.__name__, function.__module__) == (name, "ring_cute")
        assert inspect.signature(function).parameters["group"].default is None


def test_it_is_found_by_its_entry_point() -> None:
    found = [point for point in entry_points(group=ENTRY_POINTS) if point.name == "cute"]
    if not found:
        pytest.skip("ring-cute is not installed: its sources are read from a folder")
    assert found[0].load() is CuteBackend


def test_a_call_on_a_cpu_says_who_can() -> None:
    q = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(
        UnsupportedError, match=r"backend 'cute' cannot do this call: .*9\.0.*not on cpu.*: .*reference"
    ):
        ring_cute.cute_ring_flash_attn_func(q, q, q)
    with pytest.raises(UnsupportedError, match=r"backend 'cute' cannot"):
        ring_cute.cute_ring_flash_attn_varlen_func(q[0], q[0], q[0], torch.tensor([0, 4]), 4)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> CuteBackend:
    """Its capabilities as they are on a machine that has all it needs, beside a backend that can do everything."""
    monkeypatch.setattr(backend, "_missing", lambda device: "")
    made = CuteBackend()
    register_backend("cute", made)
    return made


def refusal(head_dim: int, features: frozenset[str] = frozenset(), *, gradients: bool = False) -> str:
    with pytest.raises(UnsupportedError) as caught:
        check_supported("cute", CUDA, torch.bfloat16, head_dim, features, gradients)
    return str(caught.value)


def test_capabilities(on_hopper: CuteBackend) -> None:
    can = on_hopper.capabilities(CUDA)
    assert can.available and can.flags and can.accumulate
    assert can.dtypes == {torch.bfloat16, torch.float16}
    for head_dim in (8, 40, max(FORWARD)):
        features = frozenset({"alibi", "gqa", "packed", "ring_alibi", "sinks", "softcap", "window"})
        check_supported("cute", CUDA, torch.bfloat16, head_dim, features)
    assert f"the head dim is {max(FORWARD) + 8}" in refusal(max(FORWARD) + 8)
    assert "the head dim is 60" in refusal(60)
    said = refusal(64, frozenset({"dropout"}))
    assert "dropout is not among its features" in said and said.endswith("reference")


def test_gradients_are_of_the_same_head_dims(on_hopper: CuteBackend) -> None:
    """There is a backward for every forward, and what has neither is refused by both, in one call as in the table."""
    register_backend("cute", on_hopper)
    assert {backward_head_dim(n) for n in FORWARD} == set(FORWARD) == set(BACKWARD)
    check_supported("cute", CUDA, torch.bfloat16, 40, frozenset({"deterministic", "lse_grad"}), True)
    assert refusal(60, gradients=True) == refusal(60)
    assert choose_backend(CUDA, torch.bfloat16, 60, frozenset(), True) != "cute"
    for head_dim, params, why in (
        (60, Params(1.0), "the head dim is 60, it takes 8-256 .multiples of 8."),
        (264, Params(1.0), "the head dim is 264"),
        (64, Params(1.0, dropout=Dropout(0.1, torch.zeros(1, dtype=torch.int64))), "it knows no dropout"),
    ):
        q = torch.empty(1, 1, 1, head_dim)
        with pytest.raises(UnsupportedError, match=f"{why}.*backend 'triton' can"):
            on_hopper.prepare(q, q.shape, q, q, q, None, params=params)
        with pytest.raises(UnsupportedError, match=f"{why}.*backend 'triton' can"):
            on_hopper.forward(q, q[None], q[None], q, q, None, None, params=params)


def test_contract() -> None:
    assert isinstance(CuteBackend(), StagedBackend)
    assert isinstance(CuteBackend().capabilities(CPU), Capabilities)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_scores_of_any_scale(scale: float) -> None:
    """Kernels need a positive one; the product of what they are given is the same."""
    q = torch.randn(2, 3, dtype=torch.float64)
    changed, positive = backend._positive(q, scale)
    assert positive > 0
    torch.testing.assert_close(changed * positive, q * scale)
    assert backend._positive(None, scale) == (None, positive)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("head_dim", FORWARD)
def test_settings_fit(head_dim: int, softcap: bool, alibi: bool) -> None:
    s = settings_for(head_dim, softcap=softcap, alibi=alibi)
    assert kind_for("bfloat16", head_dim, s, state=True).shared_bytes <= SHARED_BYTES
    assert s.stages & (s.stages - 1) == 0
    assert s.consumer_registers % 8 == 0 and s.producer_registers % 8 == 0
    assert 128 * (s.consumers * s.consumer_registers + s.producer_registers) <= 65536
    assert all(kind.shared_bytes <= SHARED_BYTES for kind in shipped((head_dim,), directions=("forward",)))


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("head_dim", BACKWARD)
def test_backward_settings_fit(head_dim: int, softcap: bool, alibi: bool) -> None:
    s = backward_settings_for(head_dim, softcap=softcap, alibi=alibi)
    assert BackwardKind("bfloat16", head_dim, "added", True, True, s).shared_bytes <= SHARED_BYTES
    assert s.block % 16 == 0 and s.consumer_registers % 8 == 0 and s.producer_registers % 8 == 0
    assert 128 * (2 * s.consumer_registers + s.producer_registers) <= 65536
    kinds = [kind for kind in backwards(head_dim, "bfloat16") if isinstance(kind, BackwardKind)]
    assert {kind.gradients for kind in kinds} == {"final", "added", "shared"}
    assert all(kind.shared_bytes <= SHARED_BYTES for kind in kinds)


@pytest.mark.parametrize(
    "rows, keys, causal, heads, pairs",
    [
        (16384, 16384, True, 16, True),
        (8192, 8192, False, 16, True),
        (4096, 4096, False, 32, True),
        (2048, 2048, False, 64, False),
        (8192, 8192, True, 16, False),  # the longer halves of pairs come to 1.5 % more
        (512, 32768, False, 16, False),  # not enough tiles for all processors
        (128, 32768, False, 512, False),  # half of a pair would have nothing to do
    ],
)
def test_long_sequences_take_pairs_of_ctas(
    rows: int, keys: int, causal: bool, heads: int, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    table = on_device(causal_table(rows, keys, causal=causal), CPU)
    q, alone = torch.empty(1, rows, heads, 128, device="meta"), settings_for(128)
    assert launch._in_pairs(alone, q, table, keys) == (replace(alone, cluster=2) if pairs else alone)


def test_kinds_have_files_of_their_own() -> None:
    names = [library.words(kind) for kind in shipped()]
    assert len(set(names)) == len(names)


def test_record_columns_are_those_of_tiles() -> None:
    """The kernel reads `items` and `walk` by number."""
    from ring_core.key_tiles import WALK as KEY_WALK
    from ring_core.tiles import ITEM, WALK

    assert (ITEM + WALK[:8]) == (
        "walk_start", "walk_stop", "q_row", "rows", "batch", "flags", "blocks", "unused",
        "k_row", "k_len", "j_lo", "blocks", "right", "edges", "lower", "upper",
    )  # fmt: skip
    assert (WALK[8], FIRST, LAST) == ("piece", 1, 2)
    assert WALK[10:] == KEY_WALK[10:] == ("distance", "stride")


def test_rows_that_are_not_aligned_go_by_way_of_ones_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels store 16 bytes of a row at a time. What they do not write stays, in the caller's tensor too."""

    def load(kind: object) -> Callable[..., None]:
        def kernel(*numbers: Any) -> None:
            address, strides = numbers[3], numbers[24:27]
            assert address % 16 == 0 and strides == (2 * 100 * 64, 2 * 64, 64)
            first_row = (ctypes.c_uint16 * 64).from_address(address)
            first_row[:] = [0x3F80] * 64  # ones

        return kernel

    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    monkeypatch.setattr(launch, "_counter", lambda device, stream: 0)
    monkeypatch.setattr(library, "load", load)
    q, wide = torch.randn(1, 100, 2, 64).bfloat16(), torch.full((1, 100, 2, 67), 2.0).bfloat16()
    out = wide[..., 1:65]
    assert not launch.takes_tma(out)
    table = on_device(causal_table(100, 100, causal=True), CPU)
    launch.forward(q, q[None], q[None], out, torch.empty(1, 2, 100), None, table, scale=1.0)
    assert (out[0, 0, 0] == 1).all() and (out[0, 0, 1] == 2).all() and (wide[..., 0] == 2).all()
