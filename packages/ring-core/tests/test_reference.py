"""Facts of the specification itself: derivatives by finite differences, Philox by its authors' vectors, blocks of
rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_core import reference, ring_attention
from ring_core.philox import keep_mask, philox
from ring_core.testing import philox4x32
from ring_core.testing.conformance import KernelCase, check_kernel_case, kernel_cases
from ring_core.testing.oracle import dropout_kept

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal-window": {"causal": True, "window_size": (3, -1)},
    "softcap": {"softcap": 0.8, "softmax_scale": 0.9},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 1 << 40},
    "padding": {"total_length": None},  # one less than the lengths
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_inputs(seed: int, q_length: int, k_length: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """[q, k, v] leaves of GQA 4/2, sinks, slopes by batch entry."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = [randn(2, q_length, 4, 3), randn(2, k_length, 2, 3), randn(2, k_length, 2, 3)]
    return tensors, randn(4), torch.rand(2, 4, generator=generator)


@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4)], ids=["square", "longer-k", "unseen-rows"])
@pytest.mark.parametrize("extra", ["plain", "sinks", "alibi", "sinks-alibi"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_by_finite_differences(
    options: dict[str, Any], extra: str, lengths: tuple[int, int], seed: int
) -> None:
    """Of out and of lse together, with respect to q, k, v and the sinks."""
    options = {**options, "alibi_slopes": None}
    if "total_length" in options:
        options["total_length"] = (lengths[0] - 1, lengths[1] - 1)
    leaves, sinks, slopes = random_inputs(seed, *lengths)
    if "sinks" in extra:
        leaves.append(sinks)
    if "alibi" in extra:
        options["alibi_slopes"] = slopes

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = ring_attention(q, k, v, sinks=sinks, backend="reference", return_lse=True, **options)
        return out, torch.where(lse.isfinite(), lse, 0.0)  # -inf has no finite difference

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-7)


KNOWN_ANSWERS = [  # kat_vectors of Random123: philox4x32, 10 rounds; counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor(c) for c in counter), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(word) for word in words) == expected
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


@settings(max_examples=40, deadline=None)
@given(
    probability=st.floats(0.0, 1.0, exclude_max=True),
    seed=st.integers(-(2**63), 2**63 - 1),
    q_start=st.integers(-(2**20), 2**31 - 64),
    k_start=st.integers(-(2**20), 2**31 - 64),
    batch=st.integers(0, 2**31 - 1),
)
def test_keep_mask_is_the_oracles(probability: float, seed: int, q_start: int, k_start: int, batch: int) -> None:
    """Two implementations that share nothing, bit for bit, over the whole range of seeds and positions."""
    heads, rows, columns = np.arange(3), np.arange(q_start, q_start + 9), np.arange(k_start, k_start + 11)
    kept = keep_mask(
        probability,
        torch.tensor([seed]),
        heads=torch.from_numpy(heads)[:, None, None],
        batch=torch.tensor(batch),
        q_positions=torch.from_numpy(rows)[:, None],
        k_positions=torch.from_numpy(columns),
    )
    assert np.array_equal(kept.numpy(), dropout_kept(probability, seed, rows, columns, heads, batch))


def test_dropout_drops_its_share() -> None:
    kept = keep_mask(
        0.3,
        torch.tensor([77]),
        heads=torch.zeros(1, dtype=torch.int64),
        batch=torch.zeros(1, dtype=torch.int64),
        q_positions=torch.arange(1000)[:, None],
        k_positions=torch.arange(1000),
    )
    assert abs(float(kept.double().mean()) - 0.7) < 5 * (0.3 * 0.7 / 1e6) ** 0.5
    assert keep_mask(0.0, torch.tensor([77]), *(torch.arange(9),) * 4).all()


FULL_OF_FEATURES = (
    "everything-zigzag-ring-3",
    "everything-stripe-gather-3",
    "packed-alibi-dropout",
    "entries-everything",
)
BLOCKED = [case for case in kernel_cases() if str(case) in FULL_OF_FEATURES]


@pytest.mark.parametrize("scores", [1, 300], ids=["row-by-row", "few-rows"])
@pytest.mark.parametrize("case", BLOCKED, ids=str)
def test_blocks_of_rows_change_nothing(
    case: KernelCase, scores: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long strips are computed in blocks of rows: bands, positions and dropout must go on counting from the strip's
    first row."""
    blocks: list[int] = []
    plain = reference._blocks
    monkeypatch.setattr(reference, "_blocks", lambda strip, q: _counted(blocks, plain(strip, q)))
    monkeypatch.setattr(reference, "SCORES", scores)
    check_kernel_case(case, reference.ReferenceBackend(), seed=seed)
    assert max(blocks) > 1  # or nothing was tested


def _counted(counts: list[int], blocks: Iterator[tuple[slice, slice]]) -> Iterator[tuple[slice, slice]]:
    found = list(blocks)
    counts.append(len(found))
    yield from found


def test_nothing_to_compute() -> None:
    """No queries, no keys, no batch: shapes all the same, and gradients of zero."""
    for batch, q_length, k_length in ((2, 0, 5), (2, 5, 0), (0, 5, 5)):
        q = torch.randn(batch, q_length, 4, 8, requires_grad=True)
        k, v = (torch.randn(batch, k_length, 2, 8, requires_grad=True) for _ in range(2))
        out, lse = ring_attention(q, k, v, causal=True, backend="reference", return_lse=True)
        torch.autograd.backward(out.sum())
        assert out.shape == q.shape
        assert lse.shape == (batch, 4, q_length)
        assert (lse == -torch.inf).all()
        for x in (out, q.grad, k.grad, v.grad):
            assert x is not None
            assert (x == 0).all()
