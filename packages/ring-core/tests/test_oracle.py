"""The oracle against what others compute, against finite differences, and against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_core.testing import (
    INPUT_KINDS,
    InputKind,
    Tolerance,
    assert_close_to_oracle,
    attention_oracle,
    baseline,
    baseline_errors,
    compare,
    make_inputs,
    oracle,
    philox4x32,
    tolerances,
)
from ring_core.testing.oracle import dropout_kept

INF = math.inf
TINY = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """torch's attention and its gradients: (B, S, H, D) tensors, mask bool or additive (Hq or 1, Sq, Sk)."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def band(q_length: int, k_length: int, left: int, right: int) -> Tensor:
    """Visible pairs, written as loops: nothing in common with the oracle's arithmetic on tensors."""
    rows = []
    for i in range(q_length):
        position = i + k_length - q_length
        rows.append(
            [(left < 0 or j >= position - left) and (right < 0 or j <= position + right) for j in range(k_length)]
        )
    return torch.tensor(rows)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("lengths", "causal", "window"),
    [
        ((7, 7), False, (-1, -1)),
        ((9, 9), True, (-1, -1)),
        ((5, 9), True, (-1, -1)),
        ((8, 8), False, (3, 2)),
        ((6, 11), False, (4, 0)),
        ((6, 11), True, (2, 5)),
        ((4, 9), False, (-1, 1)),
    ],
)
def test_agrees_with_torch(
    heads: tuple[int, int], lengths: tuple[int, int], causal: bool, window: tuple[int, int]
) -> None:
    q, k, v = randn(2, lengths[0], heads[0], 8), randn(2, lengths[1], heads[1], 8), randn(2, lengths[1], heads[1], 8)
    k, v = k * 0.9 + 0.1, v.flip(1)
    dout = randn(*q.shape, seed=1)
    right = 0 if causal else window[1]
    truth = attention_oracle(q, k, v, causal=causal, window_size=window, dout=dout)
    expected = sdpa(q, k, v, band(*lengths, window[0], right), dout)
    for got, want in zip((truth.out, truth.dq, truth.dk, truth.dv), expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=TINY, atol=TINY)


def test_lse_is_the_logarithm_of_the_sum() -> None:
    q, k, v = randn(1, 3, 2, 4), randn(1, 5, 1, 4, seed=1), randn(1, 5, 1, 4, seed=2)
    truth = attention_oracle(q, k, v, scale=0.3)
    scores = torch.stack([0.3 * q[0, :, head] @ k[0, :, 0].T for head in range(2)])
    torch.testing.assert_close(truth.lse[0], scores.exp().sum(-1).log(), rtol=TINY, atol=TINY)


def test_alibi_agrees_with_torch_given_the_bias() -> None:
    q, k, v = randn(1, 4, 2, 8), randn(1, 7, 2, 8, seed=1), randn(1, 7, 2, 8, seed=2)
    slopes = torch.tensor([0.5, 0.125])
    distance = torch.tensor([[abs(i + 3 - j) for j in range(7)] for i in range(4)], dtype=torch.float64)
    bias = -slopes.double()[:, None, None] * distance
    dout = randn(*q.shape, seed=3)
    truth = attention_oracle(q, k, v, alibi_slopes=slopes, dout=dout)
    expected = sdpa(q, k, v, bias, dout)
    for got, want in zip((truth.out, truth.dq, truth.dk, truth.dv), expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=TINY, atol=TINY)
    per_batch = attention_oracle(q.expand(2, -1, -1, -1), *(x.expand(2, -1, -1, -1) for x in (k, v)),
                                 alibi_slopes=torch.stack((slopes, slopes.flip(0))))  # fmt: skip
    torch.testing.assert_close(per_batch.out[0], truth.out[0], rtol=TINY, atol=TINY)
    assert compare(per_batch.out[1], truth.out[0]).relative > 1e-3


def test_bottom_right_windows_by_hand() -> None:
    # Two queries at positions 2 and 3 of four equal keys: out is the mean of the visible values, lse log(how many).
    q, k = torch.zeros(1, 2, 1, 1), torch.zeros(1, 4, 1, 1)
    v = torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1, 1)

    def rows(**options: object) -> tuple[list[float], list[float]]:
        truth = attention_oracle(q, k, v, **options)  # type: ignore[arg-type]
        return truth.out.flatten().tolist(), truth.lse.exp().flatten().tolist()

    assert rows(causal=True) == (pytest.approx([37.0, 1111 / 4]), pytest.approx([3, 4]))
    assert rows(window_size=(1, 0)) == (pytest.approx([55.0, 550.0]), pytest.approx([2, 2]))
    assert rows(window_size=(0, 1)) == (pytest.approx([550.0, 1000.0]), pytest.approx([2, 1]))
    assert rows(window_size=(0, 1), causal=True) == (pytest.approx([100.0, 1000.0]), pytest.approx([1, 1]))
    assert rows(window_size=(-1, 0)) == rows(causal=True)
    assert rows(total_length=(1, 3), causal=True) == (pytest.approx([37.0, 0.0]), pytest.approx([3, 0]))


def test_more_queries_than_keys_leaves_empty_rows() -> None:
    # Positions -2, -1, 0, 1 before two keys: causal rows 0 and 1 see nothing.
    q, k, v = randn(1, 4, 1, 4), randn(1, 2, 1, 4, seed=1), randn(1, 2, 1, 4, seed=2)
    dout, dlse = randn(1, 4, 1, 4, seed=3), randn(1, 1, 4, seed=4)
    dout[0, :2], dlse[0, 0, :2] = math.nan, math.nan  # an empty row's upstream gradients must not matter
    truth = attention_oracle(q, k, v, causal=True, dout=dout, dlse=dlse)
    assert truth.lse[0, 0, :2].tolist() == [-INF, -INF]
    assert not truth.out[0, :2].any()
    torch.testing.assert_close(truth.out[0, 2], v[0, 0])
    assert truth.dq is not None
    assert truth.dk is not None
    assert truth.dv is not None
    assert not truth.dq[0, :2].any()
    alone = attention_oracle(q[:, 2:], k, v, causal=True, dout=dout[:, 2:], dlse=dlse[..., 2:])
    assert alone.dk is not None
    assert alone.dv is not None
    torch.testing.assert_close(truth.dk, alone.dk)
    torch.testing.assert_close(truth.dv, alone.dv)


def test_sinks_fill_empty_rows_but_not_padding() -> None:
    q, k, v = randn(1, 5, 2, 4), randn(1, 2, 2, 4, seed=1), randn(1, 2, 2, 4, seed=2)
    sinks = torch.tensor([0.5, -1.0])
    dlse = randn(1, 2, 5, seed=3)
    truth = attention_oracle(q, k, v, causal=True, sinks=sinks, total_length=(4, 2), dlse=dlse)
    assert truth.lse[0, :, :2].tolist() == [[0.5, 0.5], [-1.0, -1.0]]
    assert truth.lse[0, :, 4].tolist() == [-INF, -INF]
    assert not truth.out[0, [0, 1, 4]].any()
    assert truth.dq is not None
    assert truth.dsinks is not None
    assert not truth.dq[0, [0, 1, 4]].any()
    sink_share = torch.exp(sinks.double()[:, None] - truth.lse[0, :, :4])
    torch.testing.assert_close(truth.dsinks, (sink_share * dlse[0, :, :4]).sum(1))


def test_sink_is_a_key_with_value_zero() -> None:
    q, k, v = randn(1, 3, 1, 4), randn(1, 5, 1, 4, seed=1), randn(1, 5, 1, 4, seed=2)
    scores = torch.cat((q[0, :, 0] @ k[0, :, 0].T / 2, torch.full((3, 1), 0.7, dtype=torch.float64)), dim=1)
    expected = torch.softmax(scores, dim=1)[:, :5] @ v[0, :, 0]
    truth = attention_oracle(q, k, v, sinks=torch.tensor([0.7], dtype=torch.float64))
    torch.testing.assert_close(truth.out[0, :, 0], expected, rtol=TINY, atol=TINY)
    torch.testing.assert_close(truth.lse[0, 0], torch.logsumexp(scores, dim=1), rtol=TINY, atol=TINY)


@pytest.mark.parametrize("feature", ["plain", "softcap", "alibi", "sinks", "dropout", "all"])
def test_gradients_are_finite_differences(feature: str) -> None:
    tensors = {"q": randn(1, 4, 2, 3), "k": randn(1, 5, 1, 3, seed=1), "v": randn(1, 5, 1, 3, seed=2)}
    options: dict[str, object] = {"causal": True}
    if feature in ("softcap", "all"):
        options["softcap"] = 0.8
    if feature in ("alibi", "all"):
        options["alibi_slopes"] = torch.tensor([0.5, 0.25])
    if feature in ("dropout", "all"):
        options |= {"dropout_p": 0.4, "dropout_seed": 7}
    if feature in ("sinks", "all"):
        tensors["sinks"] = randn(2, seed=3)
    dout, dlse = randn(1, 4, 2, 3, seed=4), randn(1, 2, 4, seed=5)

    def objective() -> float:
        truth = attention_oracle(**tensors, **options)  # type: ignore[arg-type]
        return float((truth.out * dout).sum() + (truth.lse * dlse).sum())

    truth = attention_oracle(**tensors, **options, dout=dout, dlse=dlse)  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        gradient = getattr(truth, f"d{name}")
        flat, step = tensor.view(-1), 1e-5
        for index in range(flat.numel()):
            value = flat[index].item()
            flat[index] = value + step
            above = objective()
            flat[index] = value - step
            below = objective()
            flat[index] = value
            assert gradient.reshape(-1)[index].item() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-8)


def test_only_one_upstream_gradient_is_enough() -> None:
    q, k, v = randn(1, 3, 1, 4), randn(1, 3, 1, 4, seed=1), randn(1, 3, 1, 4, seed=2)
    assert attention_oracle(q, k, v).dq is None
    truth = attention_oracle(q, k, v, dlse=torch.ones(1, 1, 3))
    assert truth.dq is not None
    assert truth.dq.any()
    assert truth.dv is not None
    assert not truth.dv.any()


def test_padding_is_neither_read_nor_written() -> None:
    q, k, v = randn(2, 6, 2, 4), randn(2, 6, 1, 4, seed=1), randn(2, 6, 1, 4, seed=2)
    dout = randn(2, 6, 2, 4, seed=3)
    short = attention_oracle(q[:, :4], k[:, :4], v[:, :4], causal=True, dout=dout[:, :4])
    for x in (q, k, v, dout):
        x[:, 4:] = math.nan
    long = attention_oracle(q, k, v, causal=True, total_length=4, dout=dout)
    for name in ("out", "dq", "dk", "dv"):
        padded, exact = getattr(long, name), getattr(short, name)
        torch.testing.assert_close(padded[:, :4], exact, rtol=0, atol=0)
        assert not padded[:, 4:].any()
    assert torch.equal(long.lse[..., 4:], torch.full((2, 2, 2), -INF, dtype=torch.float64))


def test_documents_attend_to_themselves() -> None:
    cu_q, cu_k = [0, 3, 3, 7], [0, 4, 6, 9]  # the second has no queries; a row and a key of padding at the ends
    q, k, v = randn(1, 8, 2, 4), randn(1, 10, 1, 4, seed=1), randn(1, 10, 1, 4, seed=2)
    dout, dlse = randn(1, 8, 2, 4, seed=3), randn(1, 2, 8, seed=4)
    sinks, slopes = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.25])
    common = {"causal": True, "window_size": (2, -1), "sinks": sinks, "alibi_slopes": slopes}
    packed = attention_oracle(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dout=dout, dlse=dlse, **common  # type: ignore[arg-type]
    )  # fmt: skip
    assert packed.dsinks is not None
    assert packed.dq is not None
    assert packed.dk is not None
    dsinks = torch.zeros(2, dtype=torch.float64)
    for q0, q1, k0, k1 in ((0, 3, 0, 4), (3, 7, 6, 9)):
        rows, keys = slice(q0, q1), slice(k0, k1)
        one = attention_oracle(
            q[:, rows], k[:, keys], v[:, keys], dout=dout[:, rows], dlse=dlse[..., rows], **common  # type: ignore[arg-type]
        )  # fmt: skip
        torch.testing.assert_close(packed.out[:, rows], one.out)
        torch.testing.assert_close(packed.lse[..., rows], one.lse)
        torch.testing.assert_close(packed.dq[:, rows], one.dq)
        torch.testing.assert_close(packed.dk[:, keys], one.dk)
        assert one.dsinks is not None
        dsinks += one.dsinks
    torch.testing.assert_close(packed.dsinks, dsinks)
    assert not packed.dk[:, 4:6].any()
    assert not packed.dk[:, 9:].any()
    assert packed.lse[0, :, 7].tolist() == [-INF, -INF]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(
        "randn", generator=generator(), batch=2, q_length=23, k_length=31, q_heads=4, kv_heads=2, head_dim=8
    )
    options = {"causal": True, "dropout_p": 0.3, "dropout_seed": 5, "dout": inputs.dout, "dlse": inputs.dlse}
    whole = attention_oracle(inputs.q, inputs.k, inputs.v, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(oracle, "BLOCK_BYTES", oracle.BYTES_PER_SCORE * 2 * 31 * 5)  # five rows at a time
    cut = attention_oracle(inputs.q, inputs.k, inputs.v, **options)  # type: ignore[arg-type]
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=TINY, atol=TINY)


def test_extreme_scores_stay_finite() -> None:
    q, k, v = 1e3 * randn(1, 6, 1, 8), 1e3 * randn(1, 6, 1, 8, seed=1), randn(1, 6, 1, 8, seed=2)
    truth = attention_oracle(q, k, v, causal=True, sinks=torch.tensor([1e5]), dout=v)
    for x in vars(truth).values():
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_dropout_uses_each_part_of_its_counter() -> None:
    q_positions, k_positions, heads = np.array([-1, 4]), np.array([0, 9]), np.array([1, 3])
    seed = -2
    kept = dropout_kept(0.5, seed, q_positions, k_positions, heads, 6)
    for h, head in enumerate(heads):
        for i, position in enumerate(q_positions):
            for j, key_position in enumerate(k_positions):
                counter = (int(key_position), int(position) % 2**32, int(head), 6)
                word = int(philox4x32(counter, (0xFFFFFFFE, 0xFFFFFFFF))[0])
                assert kept[h, i, j] == (word >= 2**31)


def test_dropout_scales_what_it_keeps_and_leaves_lse_alone() -> None:
    q, k, v = torch.zeros(1, 64, 1, 1), torch.zeros(1, 64, 1, 1), torch.eye(64)[None, :, None]
    truth = attention_oracle(q, k, v, dropout_p=0.25, dropout_seed=3)
    probabilities = truth.out[0, :, 0]  # (64, 64), as v is the identity
    assert set(probabilities.unique().tolist()) == {0.0, 1 / 64 / 0.75}
    assert 0.20 < float((probabilities == 0).double().mean()) < 0.30
    torch.testing.assert_close(truth.lse, torch.full_like(truth.lse, math.log(64)))


def test_dropout_positions_of_documents() -> None:
    # The positions of a document are its keys' places in the stream, its queries end with its keys.
    cu_q, cu_k = [0, 2, 5], [0, 4, 6]
    q, k, v = torch.zeros(1, 5, 1, 1), torch.zeros(1, 6, 1, 1), torch.eye(6)[None, :, None]
    truth = attention_oracle(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dropout_p=0.5, dropout_seed=11)
    got = truth.out[0, :, 0] != 0
    first = dropout_kept(0.5, 11, np.arange(2, 4), np.arange(0, 4), np.array([0]), 0)[0]
    second = dropout_kept(0.5, 11, np.arange(3, 6), np.arange(4, 6), np.array([0]), 0)[0]
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[:2, :4] = torch.from_numpy(first)
    expected[2:, 4:] = torch.from_numpy(second)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": (-2, 0)}, "window"),
        ({"dropout_p": 1.0, "dropout_seed": 0}, "dropout_p"),
        ({"dropout_p": 0.5}, "dropout_seed"),
        ({"total_length": 2}, "pair"),
        ({"total_length": (2, 9)}, "outside"),
        ({"cu_seqlens_q": [0, 2], "cu_seqlens_k": [0, 2, 3]}, "entries"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_contradictions_are_errors(options: dict[str, object], message: str) -> None:
    q, k = torch.zeros(1, 3, 2, 4), torch.zeros(1, 4, 1, 4)
    with pytest.raises(ValueError, match=message):
        attention_oracle(q, k, k, **options)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    q_length=st.integers(0, 9),
    k_length=st.integers(0, 9),
    group=st.integers(1, 3),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
    softcap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
    with_slopes=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_baseline_in_float64_is_the_oracle(
    q_length: int,
    k_length: int,
    group: int,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    with_sinks: bool,
    with_slopes: bool,
    dropout_p: float,
    seed: int,
) -> None:
    heads = 2 * group
    inputs = make_inputs(
        "randn", generator=generator(seed), batch=2, q_length=q_length, k_length=k_length, q_heads=heads, kv_heads=2,
        head_dim=4, dtype=torch.float64,
    )  # fmt: skip
    options = {
        "causal": causal,
        "window_size": window,
        "softcap": softcap,
        "sinks": torch.linspace(-1, 1, heads) if with_sinks else None,
        "alibi_slopes": torch.linspace(0.25, 1, heads) if with_slopes else None,
        "dropout_p": dropout_p,
        "dropout_seed": seed,
        "dout": inputs.dout,
        "dlse": inputs.dlse,
    }
    truth = attention_oracle(inputs.q, inputs.k, inputs.v, **options)  # type: ignore[arg-type]
    plain = baseline(inputs.q, inputs.k, inputs.v, **options)  # type: ignore[arg-type]
    for name, reference in vars(truth).items():
        if reference is not None:
            # The baseline's ALiBi biases are float32.
            torch.testing.assert_close(getattr(plain, name).double(), reference, rtol=1e-6, atol=1e-6)


def test_compare() -> None:
    reference = torch.tensor([3.0, 4.0])
    errors = compare(torch.tensor([3.0, 4.5]), reference)
    assert (errors.max_abs, errors.relative, errors.rmse) == pytest.approx((0.5, 0.1, 0.5 / math.sqrt(2)))
    assert compare(torch.tensor([math.nan, 4.0]), reference).relative == INF
    assert compare(torch.tensor([-INF, 4.0]), reference).relative == INF
    assert compare(reference, torch.tensor([-INF, 4.0])).rmse == INF
    assert compare(torch.tensor([INF, 4.0]), torch.tensor([-INF, 4.0])).max_abs == INF
    assert compare(torch.tensor([-INF, 4.0]), torch.tensor([-INF, 4.0])).max_abs == 0.0
    assert compare(torch.zeros(0), torch.zeros(0)).relative == 0.0
    assert compare(torch.zeros(2), torch.zeros(2)).relative == 0.0
    assert compare(torch.ones(2), torch.zeros(2)).relative == INF
    with pytest.raises(ValueError, match="shapes"):
        compare(torch.zeros(2), torch.zeros(1, 2))


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tolerances_admit_the_baseline_and_little_else(kind: InputKind, dtype: torch.dtype) -> None:
    inputs = make_inputs(kind, generator=generator(1), q_length=96, q_heads=2, kv_heads=1, head_dim=32, dtype=dtype)
    options = {"causal": True, "dout": inputs.dout, "dlse": inputs.dlse}
    tensors = (inputs.q, inputs.k, inputs.v)
    truth = attention_oracle(*tensors, **options)  # type: ignore[arg-type]
    allowed = tolerances(*tensors, reference=truth, **options)
    errors = baseline_errors(*tensors, reference=truth, **options)
    plain = baseline(*tensors, **options)  # type: ignore[arg-type]
    assert set(allowed) == {"out", "lse", "dq", "dk", "dv"} == set(errors)
    for name, tolerance in allowed.items():
        reference = getattr(truth, name)
        assert_close_to_oracle(name, getattr(plain, name), reference, tolerance)
        # Scores of large inputs lose so much in bfloat16 that a nearly one-hot softmax picks other keys.
        coarse = dtype == torch.bfloat16 and kind in ("large", "outlier")
        assert tolerance.relative < (1e-4 if dtype == torch.float32 else 0.6 if coarse else 0.1)
        with pytest.raises(AssertionError, match=name):
            assert_close_to_oracle(name, (2.0 if coarse else 1.25) * getattr(plain, name), reference, tolerance)


def test_tolerances_where_the_truth_is_zero() -> None:
    # With one visible key the softmax is constant: dq and dk are rounding errors of the oracle itself.
    inputs = make_inputs("randn", generator=generator(), q_length=1, k_length=1, head_dim=16)
    tensors = (inputs.q, inputs.k, inputs.v)
    truth = attention_oracle(*tensors, dout=inputs.dout)
    allowed = tolerances(*tensors, reference=truth, dout=inputs.dout)
    noise = torch.full((1, 1, 1, 16), 1e-8)
    assert_close_to_oracle("dq", noise, truth.dq, allowed["dq"])  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        assert_close_to_oracle("dq", 1e4 * noise, truth.dq, allowed["dq"])  # type: ignore[arg-type]


def test_a_failing_comparison_says_where() -> None:
    x = torch.zeros(2, 3)
    x[1, 2] = 7.0
    with pytest.raises(AssertionError, match=r"(?s)dk: relative error.*at \(1, 2\): 7, should be 0"):
        assert_close_to_oracle("dk", x, torch.zeros(2, 3), Tolerance(0.1))
    with pytest.raises(AssertionError, match="1 nan"):
        assert_close_to_oracle("out", torch.tensor([math.nan, 1.0]), torch.ones(2), 1.0)


def test_inputs_follow_their_generator() -> None:
    sizes = {"q_length": 40, "k_length": 24, "q_heads": 4, "kv_heads": 2, "head_dim": 8}
    for kind in INPUT_KINDS:
        first = make_inputs(kind, generator=generator(3), dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]
        again = make_inputs(kind, generator=generator(3), dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
        assert first.q.shape == first.dout.shape == (1, 40, 4, 8)
        assert first.k.shape == first.v.shape == (1, 24, 2, 8)
        assert first.dlse.shape == (1, 4, 40)
        assert first.dlse.dtype == torch.float32
    runs = make_inputs("constant", generator=generator(), q_length=40, head_dim=4).k[0, :, 0]
    assert len(runs.unique(dim=0)) == 4
    outlier = make_inputs("outlier", generator=generator(), q_length=40, head_dim=64).k[0, :, 0].norm(dim=1)
    assert (outlier > 16 * outlier.median()).sum() == 1
    large = make_inputs("large", generator=generator(), q_length=400, head_dim=64)
    assert 7.5 < large.q.std() < 8.5
    assert 0.9 < large.dout.std() < 1.1
