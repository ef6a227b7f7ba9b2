"""ALiBi on flash-attn's kernels: what they count as a distance is one, for every table that one rank's plans make."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_fakes import FlashAttentionOnFake, FlashAttnKernel
from torch import Tensor

from ring_core import UnsupportedError, load_backend, ring_attention, ring_attention_packed
from ring_core.backend import Params, on_device
from ring_core.packed import plan_packed
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.plan.schedule import Step
from ring_core.segment import Segment, Table
from ring_core.testing.conformance import KernelCase, RingCase
from ring_core.testing.conformance.case import check_refused
from ring_core.testing.oracle import attention_oracle
from ring_native import NativeBackend
from ring_native.blocks import UNBOUNDED, Block, coalesced, trimmed
from ring_native.calls import Call, backward_calls, forward_calls
from ring_native.masks import Style, in_place

BACKEND = "native[fake-flash-attn]"
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (5, -1)},
    "behind": {"window_size": (5, 0)},
    "ahead": {"window_size": (-1, 4)},
    "window": {"window_size": (6, 3)},
}


def distances_wanted(table: Table, rows: int, keys: int) -> np.ndarray[Any, Any]:
    """(rows, keys): of every pair that the table shows, how far the query lies behind the key; NaN elsewhere."""
    found = np.full((rows, keys), np.nan)
    for s in table.segments:
        i, j = np.indices((s.q_len, s.k_len))
        shown = (s.lower <= j - i) & (j - i <= s.upper)
        part = found[s.q_start : s.q_start + s.q_len, s.k_start : s.k_start + s.k_len]
        part[shown] = (s.q_position + s.stride * i - s.k_position - s.stride * j)[shown]
    return found


def distances_read(calls: list[Call], rows: int, keys: int) -> np.ndarray[Any, Any]:
    """The same, as flash-attn reads the calls."""
    found = np.full((rows, keys), np.nan)
    for call in calls:
        q_edges, k_edges = (0, call.q_stop - call.q_start), (0, call.k_stop - call.k_start)
        if call.sequences is not None:
            q_edges, k_edges = call.sequences.q_edges, call.sequences.k_edges
        longest = max(np.diff(k_edges))
        left, right = (UNBOUNDED if bound < 0 or bound >= longest else bound for bound in call.mask)
        if left != UNBOUNDED and right == UNBOUNDED:
            right = longest
        for q0, q1, k0, k1 in zip(q_edges, q_edges[1:], k_edges, k_edges[1:], strict=False):
            i, j = np.indices((q1 - q0, k1 - k0))
            distance = i + (k1 - k0) - (q1 - q0) - j
            shown = (-left <= -distance) & (-distance <= right)
            part = found[call.q_start + q0 : call.q_start + q1, call.k_start + k0 : call.k_start + k1]
            assert np.isnan(part[shown]).all(), "every pair in one call"
            part[shown] = distance[shown]
    return found


def check_step(step: Step, rows: int, keys: int) -> None:
    forward = [call for call, _ in forward_calls(step.forward, keys, 1, Style.BOTTOM_RIGHT, True, True).calls]
    backward = list(backward_calls(step.backward, keys, 1, Style.BOTTOM_RIGHT, True, True))
    for table, calls in ((step.forward, forward), (step.backward, backward)):
        np.testing.assert_array_equal(distances_read(calls, rows, keys), distances_wanted(table, rows, keys))


lengths = st.one_of(st.integers(1, 14), st.integers(1, 14), st.integers(120, 300))
bounds = st.one_of(st.none(), st.just(0), st.integers(0, 14), st.integers(100, 200))


def read_as_none(right: int | None, documents: list[tuple[int, int]]) -> bool:
    """Whether a bound on the right cuts, though it is no smaller than the number of keys."""
    return right is not None and any(1 < k <= right < q - 1 for q, k in documents)


def refused(left: int | None, right: int | None, documents: list[tuple[int, int]]) -> str:
    """What the refusal says, "" where there is none."""
    if read_as_none(right, documents):
        return "for no bound"
    longest = max(k for _, k in documents)
    cuts = any(left is not None and left < k - 1 and q > longest + 1 for q, k in documents)
    return "see beyond" if cuts and (right is None or all(right >= q - 1 for q, _ in documents)) else ""


@settings(max_examples=300, deadline=None)
@given(lengths, lengths, bounds, bounds, st.data())
def test_one_sequence_keeps_its_distances(
    q_length: int, k_length: int, left: int | None, right: int | None, data: st.DataObject
) -> None:
    q_total, k_total = (data.draw(st.one_of(st.just(n), st.integers(0, n))) for n in (q_length, k_length))
    problem = Problem(q_length, k_length, q_total, k_total, left, right, "contiguous", 1)
    (step,) = make_plan(problem, 0, "ring").steps
    if reason := refused(left, right, [(q_total, k_total)]):
        with pytest.raises(UnsupportedError, match=reason):
            check_step(step, q_length, k_length)
        return
    check_step(step, q_length, k_length)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6), bounds, bounds, st.booleans()
)
def test_documents_keep_their_distances(
    documents: list[tuple[int, int]], left: int | None, right: int | None, alike: bool
) -> None:
    documents = [(q, q if alike else k) for q, k in documents]
    cu_q, cu_k = (list(accumulate((document[side] for document in documents), initial=0)) for side in (0, 1))
    window = (-1 if left is None else left, -1 if right is None else right)
    plan = plan_packed(cu_q, cu_seqlens_k=cu_k, window_size=window, layout="contiguous", rank=0, world_size=1)
    assert isinstance(plan.problem, PackedProblem)
    (step,) = make_plan(plan.problem, 0, "ring").steps
    said = ""
    try:
        check_step(step, cu_q[-1], cu_k[-1])
    except UnsupportedError as error:  # which documents share a call decides
        said = str(error)
    if "see beyond" in said:
        assert left is not None and any(left < k - 1 for _, k in documents) and any(q > k + 1 for q, k in documents)
    else:
        assert ("for no bound" in said) == bool(said) == read_as_none(right, documents)


def test_a_window_that_would_be_read_as_none_is_refused() -> None:
    q, k = torch.randn(1, 30, 2, 16), torch.randn(1, 8, 2, 16)
    slopes = torch.tensor([0.1, 0.2])
    with pytest.raises(UnsupportedError, match=r"window_size=\(..., 10\) for no bound where there are 8 keys"):
        ring_attention(q, k, k, window_size=(-1, 10), alibi_slopes=slopes, backend=BACKEND)
    ring_attention(q, k, k, window_size=(-1, 10), backend=BACKEND)


def test_a_block_of_another_rank_is_refused() -> None:
    block = trimmed(Block(-1, 0, 4, 0, 4, -UNBOUNDED, UNBOUNDED, 4))
    assert block is not None
    with pytest.raises(UnsupportedError, match="lie 4 positions apart"):
        in_place(block)
    assert in_place(block._replace(offset=0)) == block._replace(offset=0)


def test_the_tokens_of_a_stripe_are_refused() -> None:
    segment = Segment(0, 4, 0, 0, 4, -4, 4, 0, 0, 2, -1, 0)
    with pytest.raises(UnsupportedError, match="2 positions apart"):
        coalesced([segment], 4, distances=True)
    assert len(coalesced([segment], 4)) == 1


def test_blocks_of_other_distances_stay_apart() -> None:
    """Two rectangles that lie side by side, of which the second begins at another position."""
    segments = [Segment(0, 4, 0, n, 2, -4, 4, 0, position, 1, -1, 0) for n, position in ((0, 0), (2, 7))]
    assert len(coalesced(segments, 4)) == 1
    assert [block.offset for block in coalesced(segments, 4, distances=True)] == [0, -5]


def inputs(seed: int, q_length: int, k_length: int, batch: int) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v with 4 heads on 2, and dout."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, q_length, 4, 16), *[(batch, k_length, 2, 16)] * 2, (batch, q_length, 4, 16)]
    *leaves, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in leaves], dout


def slopes_of(seed: int, shape: tuple[int, ...]) -> Tensor:
    return 0.05 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("q_length,k_length", [(19, 19), (12, 30), (30, 12), (1, 9), (9, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_dense(mask: str, q_length: int, k_length: int, softcap: float, shape: tuple[int, ...], seed: int) -> None:
    leaves, dout = inputs(seed, q_length, k_length, 3)
    options = {**MASKS[mask], "alibi_slopes": slopes_of(seed, shape), "softcap": softcap}
    left, right = (None if bound < 0 else bound for bound in options.get("window_size", (-1, -1)))
    if reason := refused(left, right, [(q_length, k_length)]):
        with pytest.raises(UnsupportedError, match=reason):
            ring_attention(*leaves, backend=BACKEND, **options)
        return
    out, lse = ring_attention(*leaves, backend=BACKEND, return_lse=True, **options)
    truth = attention_oracle(*(x.detach() for x in leaves), dout=dout, **options)
    torch.testing.assert_close(out, truth.out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, truth.lse, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(out, leaves, dout), (truth.dq, truth.dk, truth.dv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cu_k", [None, (0, 9, 10, 21, 21, 50)], ids=["alike", "other-keys"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "ahead"])
def test_packed(mask: str, cu_k: tuple[int, ...] | None, seed: int) -> None:
    """Documents of one call, of one token, without keys, of more queries than keys; slopes (H,), and (1, H)."""
    cu_q = (0, 5, 6, 24, 26, 50)
    leaves, dout = inputs(seed, 50, 50, 1)
    slopes = slopes_of(seed, (4,))
    plan_options = {**MASKS[mask], "alibi_slopes": slopes}
    cu = {} if cu_k is None else {"cu_seqlens_k": list(cu_k)}
    packed = [x[0] for x in leaves]
    if mask == "left" and cu_k is not None:  # 18 queries, 11 keys
        with pytest.raises(UnsupportedError, match="see beyond"):
            ring_attention_packed(*packed, list(cu_q), backend=BACKEND, **cu, **plan_options)
        return
    out, lse = ring_attention_packed(*packed, list(cu_q), backend=BACKEND, return_lse=True, **cu, **plan_options)
    truth = attention_oracle(
        *(x.detach() for x in leaves), dout=dout, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k or cu_q, **plan_options
    )
    torch.testing.assert_close(out, truth.out[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, truth.lse[0], rtol=1e-10, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(out, leaves, dout[0]), (truth.dq, truth.dk, truth.dv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_causal_call_is_a_window_where_there_are_slopes(seed: int) -> None:
    """Read as causal, the kernel would leave slope * position out of lse."""
    provider = FlashAttentionOnFake()
    backend = NativeBackend(provider)
    kernel: FlashAttnKernel = provider.kernel()
    leaves, _ = inputs(seed, 8, 8, 1)
    q, k, v = (x.detach() for x in leaves)
    (step,) = make_plan(Problem(8, 8, 8, 8, None, 0, "contiguous", 1), 0, "ring").steps
    out, lse = torch.empty_like(q), torch.empty(1, 4, 8, dtype=torch.float64)
    params = Params(0.25)
    table = on_device(step.forward, q.device)
    for slopes in (None, slopes_of(seed, (4,))):
        backend.forward(q, k[None], v[None], out, lse, None, table, params=replace(params, alibi_slopes=slopes))
    assert kernel.causal == [True, False]


@pytest.mark.parametrize("name", ["native", *(f"native[fake-{name}]" for name in ("aten", "fa4", "cudnn"))])
def test_kernels_without_slopes_refuse(name: str) -> None:
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(
        UnsupportedError,
        match=r"alibi is not among its features \(alibi_slopes was given\).*reference",
    ):
        ring_attention(q, q, q, alibi_slopes=torch.ones(2), backend=name)


def refusal(seed: int) -> str:
    q = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(seed))
    try:
        ring_attention(q, q, q, alibi_slopes=torch.ones(2), backend=BACKEND)
    except UnsupportedError as error:
        return str(error)
    return ""


def test_two_ranks_are_refused_in_words_that_help(ranks: Any, seed: int) -> None:
    for said in ranks(2, refusal, seed):
        assert "ring_alibi is not among its features (alibi_slopes on several ranks: the distances in a block" in said
        assert "; alibi is not" not in said and "reference" in said


def test_the_contract_says_what_it_can() -> None:
    features = load_backend(BACKEND).capabilities(torch.device("cpu")).features
    assert "alibi" in features and "ring_alibi" not in features
    case = RingCase(name="refused", world_size=2, alibi="head", dtype=torch.float64)
    assert case.features >= {"alibi", "ring_alibi"}
    assert "ring_alibi" not in replace(case, world_size=1).features
    simulated = KernelCase(name="refused", world_size=2, alibi="head", dtype=torch.float64)
    for asked in (simulated, replace(simulated, world_size=1, hand_made=True)):
        assert "ring_alibi" in asked.features
        check_refused(asked, load_backend(BACKEND))
    with pytest.raises(AssertionError, match="did not refuse"):
        check_refused(replace(simulated, world_size=1), load_backend(BACKEND))
