"""Finding backends: by entry points, imported only when used, with errors that name what there is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ring_core import (
    Backend,
    Capabilities,
    UnsupportedError,
    backend,
    backend_names,
    load_backend,
    ring_attention,
    ring_attention_packed,
)
from ring_core.backend import NO_HEAD_DIMS, HeadDims, check_supported, choose_backend, register_backend
from ring_core.reference import ReferenceBackend

CPU = torch.device("cpu")


def forget() -> None:
    backend._registered.cache_clear()
    backend.forget_backends()


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    forget()
    yield
    forget()


class Limited(ReferenceBackend):
    """What the constructor says."""

    def __init__(self, name: str, **limits: Any) -> None:
        self.name = name
        self.limits = limits

    def capabilities(self, device: torch.device) -> Capabilities:
        return replace(super().capabilities(device), **self.limits)


def install(directory: Path, name: str, source: str) -> None:
    """A distribution with one module and one entry point, as pip would leave it in site-packages."""
    (directory / f"{name}_backend.py").write_text(source)
    info = directory / f"{name}_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ring_core.backends]\n{name} = {name}_backend:make\n")


WORKING = """
from ring_core.reference import ReferenceBackend
class Mine(ReferenceBackend):
    name = "mine"
made = []
def make():
    made.append(1)
    return Mine()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install(tmp_path, "mine", WORKING)
    install(tmp_path, "broken", "import a_kernel_library_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    for module in ("mine_backend", "broken_backend"):
        sys.modules.pop(module, None)


def test_discovery_imports_nothing(installed: Path) -> None:
    assert {"mine", "broken", "reference"} <= set(backend_names())
    assert backend_names() == tuple(sorted(backend_names()))
    assert "mine_backend" not in sys.modules and "broken_backend" not in sys.modules


def test_a_backend_is_made_once_when_used(installed: Path) -> None:
    q = torch.randn(1, 4, 1, 8)
    out = ring_attention(q, q, q, backend="mine")
    assert torch.equal(out, ring_attention(q, q, q, backend="reference"))
    ring_attention(q, q, q, backend="mine")
    assert load_backend("mine") is load_backend("mine") and load_backend("mine").name == "mine"
    assert sys.modules["mine_backend"].made == [1]
    assert "broken_backend" not in sys.modules, "only what is used is imported"


def test_a_backend_whose_library_is_missing(installed: Path) -> None:
    """Says so when it is asked for, and stands in nobody's way otherwise."""
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(ImportError, match="a_kernel_library_that_is_missing"):
        ring_attention(q, q, q, backend="broken")
    register_backend("limited", Limited("limited", head_dims=HeadDims(16)))
    with pytest.raises(UnsupportedError, match=r"backends here that can: .*\bmine\b.*\breference\b"):
        ring_attention(q, q, q, backend="limited")


def test_unknown_backend() -> None:
    register_backend("other", ReferenceBackend())
    with pytest.raises(ValueError, match="triton-nightly") as caught:
        load_backend("triton-nightly")
    message = str(caught.value)
    assert "there is no backend 'triton-nightly' here; installed: " in message and "pip install" in message
    assert "other" in message and "reference" in message


def test_reference_is_there_without_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "entry_points", lambda group: [])
    forget()
    assert backend_names() == ("reference",)
    assert isinstance(load_backend("reference"), Backend)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"dtypes": frozenset({torch.bfloat16})}, "q, k, v are torch.float32, it takes torch.bfloat16"),
        ({"head_dims": HeadDims(16, 128, 8)}, r"the head dim is 8, it takes 16-128 \(multiples of 8\)"),
        (
            {"features": frozenset()},
            r"alibi is not among its features \(alibi_slopes was given\); deterministic is not .*; window is not",
        ),
        ({"available": False, "reason": "it needs an H100"}, "cannot do this call: it needs an H100; backends"),
        ({"available": False}, "it does not run on cpu"),
    ],
    ids=["dtype", "head_dim", "features", "reason", "device"],
)
def test_unsupported_names_the_argument_and_the_alternatives(limits: dict[str, Any], problem: str) -> None:
    register_backend("limited", Limited("limited", **limits))
    register_backend("second", ReferenceBackend())
    q, options = torch.randn(1, 4, 2, 8), {"window_size": (1, 1), "alibi_slopes": torch.ones(2), "deterministic": True}
    with pytest.raises(UnsupportedError, match=problem) as caught:
        ring_attention(q, q, q, backend="limited", **options)  # type: ignore[call-overload]
    assert str(caught.value).startswith("backend 'limited' cannot do this call: ")
    able = str(caught.value).partition("; backends here that can: ")[2].split(", ")
    assert {"reference", "second"} <= set(able), able


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"window_size": (2, -1)}, "window"),
        ({"window_size": (-1, 2)}, "window"),
        ({"softcap": 1.0}, "softcap"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"alibi_slopes": torch.ones(2)}, "alibi"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"deterministic": True}, "deterministic"),
    ],
    ids=str,
)
def test_each_feature_is_asked_for(options: dict[str, Any], feature: str) -> None:
    everything = ReferenceBackend().capabilities(CPU).features
    register_backend("lacking", Limited("lacking", features=everything - {feature}))
    register_backend("having", Limited("having", features=frozenset({feature})))
    q = torch.randn(1, 4, 2, 8)
    ring_attention(q, q, q, backend="having", **options)
    with pytest.raises(UnsupportedError, match=f": {feature} is not among its features"):
        ring_attention(q, q, q, backend="lacking", **options)


def test_gqa_is_a_feature() -> None:
    register_backend("plain", Limited("plain", features=frozenset()))
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
    ring_attention(q, q, q, causal=True, backend="plain")
    with pytest.raises(UnsupportedError, match=r"gqa is not among its features \(k and v have fewer heads than q\)"):
        ring_attention(q, k, k, backend="plain")


def test_alibi_on_several_ranks_is_a_feature_of_its_own() -> None:
    register_backend("alone", Limited("alone", features=frozenset({"alibi"})))
    asked = frozenset({"alibi", "ring_alibi"})
    check_supported("alone", CPU, torch.float32, 8, asked - {"ring_alibi"})
    with pytest.raises(UnsupportedError, match=r": ring_alibi is not .*\(alibi_slopes on several ranks: .*reference"):
        check_supported("alone", CPU, torch.float32, 8, asked)


@pytest.mark.parametrize(
    ("taken", "problem"),
    [
        (NO_HEAD_DIMS, "it computes no gradients, and an input requires them; .*reference"),
        (
            HeadDims(16, 32),
            "the head dim is 8 and an input requires gradients, which it computes for 16-32; .*reference",
        ),
    ],
    ids=["none", "others"],
)
def test_gradients_are_refused_before_anything_is_computed(taken: HeadDims, problem: str) -> None:
    register_backend("forward", Limited("forward", gradient_head_dims=taken))
    q = torch.randn(1, 4, 1, 8)
    want = ring_attention(q, q, q, backend="reference")
    assert torch.equal(ring_attention(q, q, q, backend="forward"), want)
    sinks, leaf = torch.zeros(1, requires_grad=True), q.clone().requires_grad_()
    for options in ({"q": leaf}, {"v": leaf}, {"sinks": sinks}):
        call: dict[str, Any] = {"q": q, "k": q, "v": q, "backend": "forward"} | options
        with pytest.raises(UnsupportedError, match=problem):
            ring_attention(**call)
        with torch.no_grad():
            assert torch.isfinite(ring_attention(**call)).all()
    packed = torch.randn(4, 1, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match=problem):
        ring_attention_packed(packed, packed, packed, [0, 1, 4], backend="forward")


def test_gradients_choose_a_backend_that_has_them() -> None:
    cuda = torch.device("cuda")
    register_backend("cute", Limited("cute", gradient_head_dims=HeadDims(64, 128)))
    register_backend("triton", Limited("triton"))
    for head_dim, gradients, expected in ((64, True, "cute"), (256, True, "triton"), (256, False, "cute")):
        assert choose_backend(cuda, torch.bfloat16, head_dim, frozenset(), gradients) == expected


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ring_core.backend")
    q = torch.randn(1, 4, 1, 8)
    for _ in range(3):
        ring_attention(q, q, q)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["backend=None on cpu, torch.float32, head dim 8: reference"]
    ring_attention(q, q, q, backend="reference")
    assert len(caplog.records) == 1, "what was asked for is no choice"


def test_the_fastest_that_can_is_chosen_on_cuda() -> None:
    cuda = torch.device("cuda")  # capabilities are data: no device is needed to ask
    register_backend("triton", Limited("triton", head_dims=HeadDims(16, 128)))
    register_backend("native", Limited("native", head_dims=HeadDims(8, 256)))
    register_backend("cute", Limited("cute", available=False))
    kinds = (torch.bfloat16, 64, "triton"), (torch.bfloat16, 256, "native"), (torch.bfloat16, 512, "reference")
    for dtype, head_dim, expected in kinds:
        assert choose_backend(cuda, dtype, head_dim, frozenset()) == expected
    assert choose_backend(CPU, torch.bfloat16, 64, frozenset()) == "reference"


def test_registering_later_changes_the_choice() -> None:
    cuda = torch.device("cuda")
    assert choose_backend(cuda, torch.bfloat16, 64, frozenset()) == "reference"
    register_backend("triton", Limited("triton"))
    assert choose_backend(cuda, torch.bfloat16, 64, frozenset()) == "triton"
