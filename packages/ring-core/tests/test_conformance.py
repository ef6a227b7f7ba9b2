"""The reference backend against the contract, and the suite's own refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ring_core import ring_attention
from ring_core.backend import (
    NO_HEAD_DIMS,
    Capabilities,
    HeadDims,
    UnsupportedError,
    _registered,
    load_backend,
    register_backend,
)
from ring_core.reference import ReferenceBackend
from ring_core.testing.conformance import (
    KernelCase,
    PackedCase,
    RingCase,
    check_kernel_case,
    check_late_piece,
    check_packed_case,
    check_ring_case,
    kernel_cases,
    packed_cases,
    ring_cases,
    run_packed_case,
    run_ring_case,
)

REFERENCE = "reference"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, load_backend(REFERENCE), seed=seed)


def test_a_late_piece_is_not_read() -> None:
    check_late_piece(load_backend(REFERENCE))


@pytest.mark.parametrize("case", ring_cases(through=("collectives", "shared_memory")), ids=str)
def test_ring(case: RingCase, ranks: Any, seed: int) -> None:
    check_ring_case(case, REFERENCE, ranks(case.world_size, run_ring_case, case, REFERENCE, seed), seed)


@pytest.mark.parametrize("case", packed_cases(through=("collectives", "shared_memory")), ids=str)
def test_packed(case: PackedCase, ranks: Any, seed: int) -> None:
    check_packed_case(case, REFERENCE, ranks(case.world_size, run_packed_case, case, REFERENCE, seed), seed)


# --- what the suite does with backends that can less than everything


class Modest(ReferenceBackend):
    """Can nearly nothing, and says so."""

    name = "modest"

    def capabilities(self, device: torch.device) -> Capabilities:
        can = super().capabilities(device)
        return replace(
            can, dtypes=frozenset({torch.float32}), head_dims=HeadDims(32, 64, 32), features=frozenset({"gqa"})
        )


class Boastful(Modest):
    """Can no more, but says it can."""

    name = "boastful"

    def capabilities(self, device: torch.device) -> Capabilities:
        return replace(ReferenceBackend().capabilities(device), dtypes=frozenset({torch.float32}))

    def forward(self, *args: Any, params: Any, **kwargs: Any) -> None:
        super().forward(*args, params=replace(params, softcap=0.0), **kwargs)  # ignored in silence


class Onward(ReferenceBackend):
    """Computes no gradients, and says so."""

    name = "modest"

    def capabilities(self, device: torch.device) -> Capabilities:
        return replace(super().capabilities(device), gradient_head_dims=NO_HEAD_DIMS)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("asked for gradients")


class Careless(Onward):
    """Shifts what it computes."""

    def forward(self, q: Any, k: Any, v: Any, out: Any, *args: Any, **kwargs: Any) -> None:
        super().forward(q, k, v, out, *args, **kwargs)
        out += 0.1


@pytest.fixture
def modest() -> Iterator[Modest]:
    """Known by its name, as `ring_attention` must be the one to refuse; forgotten afterwards."""
    backend = Modest()
    register_backend("modest", backend)
    yield backend
    register_backend("modest", backend)  # whatever the test put there: this empties the caches
    _registered().pop("modest")


@pytest.mark.parametrize("case", [case for case in kernel_cases() if not case.hand_made], ids=str)
def test_what_a_backend_lacks_is_refused(case: KernelCase, modest: Modest, seed: int) -> None:
    check_kernel_case(case, modest, seed=seed)


def test_packed_documents_that_a_backend_lacks_are_refused(modest: Modest, ranks: Any, seed: int) -> None:
    for case in packed_cases([1]):
        assert run_packed_case(case, "modest", seed) is None


def test_a_gradient_of_lse_is_refused(modest: Modest) -> None:
    """Known only in backward, where lse turns out to have been used."""
    q = torch.randn(1, 4, 2, 32, requires_grad=True)
    out, lse = ring_attention(q, q, q, backend="modest", return_lse=True)
    torch.autograd.backward(out.sum(), retain_graph=True)
    with pytest.raises(UnsupportedError, match=r"'modest'.*lse_grad.*reference"):
        torch.autograd.backward(lse.sum())


def test_a_backend_without_gradients_is_compared_forward(modest: Modest, seed: int) -> None:
    """And must refuse by name what needs them, as it does where it is known by its name."""
    some = [case for case in kernel_cases() if str(case) in ("causal-zigzag-gather-4", "packed-causal-sinks")]
    assert len(some) == 2
    for case in some:
        register_backend("modest", ReferenceBackend())
        with pytest.raises(AssertionError, match=r"lacks \['gradients'\] but did not refuse"):
            check_kernel_case(case, Onward(), seed=seed)
        register_backend("modest", Onward())
        check_kernel_case(case, Onward(), seed=seed)
        with pytest.raises(AssertionError, match="out: relative error"):
            check_kernel_case(case, Careless(), seed=seed)
    ring = next(case for case in ring_cases([1]) if case.sinks)
    check_ring_case(ring, "modest", [run_ring_case(ring, "modest", seed)], seed)
    packed = packed_cases([1])[0]
    check_packed_case(packed, "modest", [run_packed_case(packed, "modest", seed)], seed)


def test_a_refusal_must_come(modest: Modest, seed: int) -> None:
    case = next(case for case in kernel_cases() if case.features == {"gqa", "softcap"})
    register_backend("modest", ReferenceBackend())  # by that name ring_attention refuses nothing
    with pytest.raises(AssertionError, match="did not refuse"):
        check_kernel_case(case, modest, seed=seed)


def test_a_feature_that_is_ignored_is_found(seed: int) -> None:
    case = next(case for case in kernel_cases() if case.features == {"gqa", "softcap"})
    with pytest.raises(AssertionError, match="out: relative error"):
        check_kernel_case(case, Boastful(), seed=seed)


def test_scaled_cases_keep_their_shape(seed: int) -> None:
    """A GPU's sizes are the same cases: as many, as named, and one of them run."""
    small, large = kernel_cases(), kernel_cases(scale=3)
    assert [str(case) for case in small] == [str(case) for case in large]
    assert all(b.q_length == 3 * a.q_length for a, b in zip(small, large, strict=True) if not a.reveal)
    for case in large:
        if str(case) in ("packed-window-cuts", "wide-stripe-gather-3", "padding-unequal-stripe-ring-3"):
            check_kernel_case(case, load_backend(REFERENCE), seed=seed)
    assert [str(case) for case in packed_cases()] == [str(case) for case in packed_cases(scale=3)]
    assert [str(case) for case in ring_cases()] == [str(case) for case in ring_cases(scale=3)]
