import dataclasses
import itertools

import pytest

from ring_compare.flops import forward_flops, phase_flops, summarise, visible_pairs
from ring_compare.suites import Cell


def brute_force(seq_q, seq_k, causal, window_size):
    left, right = window_size
    right = 0 if causal else right
    return sum(
        (left < 0 or j >= i + seq_k - seq_q - left) and (right < 0 or j <= i + seq_k - seq_q + right)
        for i, j in itertools.product(range(seq_q), range(seq_k))
    )


@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (12, 5), (5, 12), (0, 4), (4, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (3, 0), (2, 1), (-1, 2), (4, -1), (100, 100)])
def test_visible_pairs_against_brute_force(lengths, causal, window_size):
    expected = brute_force(*lengths, causal, window_size)
    assert visible_pairs(*lengths, causal=causal, window_size=window_size) == expected


def cell(mask="full", window_size=(-1, -1), world_size=2, seq_k=64):
    return Cell(2, 64, seq_k, 4, 2, 32, "float32", mask, window_size, "zigzag", "ring", world_size)


def test_forward_flops():
    full = 4 * 2 * 4 * 64 * 64 * 32
    assert forward_flops(cell()) == full
    assert forward_flops(cell("causal")) == full / 2  # the convention, not S (S + 1) / 2
    assert forward_flops(cell("window", (7, 0))) == 4 * 2 * 4 * 32 * brute_force(64, 64, False, (7, 0))
    assert forward_flops(cell("causal", seq_k=96)) == 4 * 2 * 4 * 32 * brute_force(64, 96, True, (-1, -1))
    assert phase_flops(cell(), "fwd+bwd") == 3.5 * full


def test_documents_see_only_themselves():
    packed = dataclasses.replace(cell("causal"), B=1, documents="equal4")
    assert forward_flops(packed) == 4 * 4 * 32 * 4 * 16 * 16 / 2
    assert forward_flops(dataclasses.replace(packed, mask="full")) == 4 * 4 * 32 * 4 * 16 * 16


def test_summary():
    found = summarise(cell(), "fwd+bwd", [10.0, 2.0, 2.0, 1.0, 3.0])
    assert found.median_ms == 2.0
    assert found.p20_ms < found.median_ms < found.p80_ms
    assert found.iterations_per_s == 500.0
    assert found.tokens_per_s == 500.0 * 2 * 64
    assert found.tflops_per_gpu == pytest.approx(3.5 * forward_flops(cell()) * 500 / 2 / 1e12)


def test_summary_needs_samples():
    with pytest.raises(ValueError, match="at least one"):
        summarise(cell(), "fwd", [])
