"""Packed documents as users meet them: plans, the functions people switch from, what is refused, what travels."""

from __future__ import annotations

import gc
import os
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import (
    flash_attn_functions,
    global_cu_seqlens,
    llama3_flash_attn_prepare_cu_seqlens,
    plan_packed,
    ring_attention_packed,
    shard_sequence,
)
from ring_core.comm import gather_through, record_traffic
from ring_core.comm.keeping import keeps
from ring_core.plan import PACKED_LAYOUTS, make_plan, message_bytes
from ring_core.testing import attention_oracle, compare
from ring_core.testing.plugin import RunRanks

LENGTHS = [0, 1, 23, 0, 40, 7, 1, 29]
CU: list[int] = [0, *np.cumsum(LENGTHS).tolist()]
TOKENS = CU[-1]
FUNCTIONS = flash_attn_functions("reference")


def whole(seed: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 8))
    q, k, v = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return q, k, v


# --- plans


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_shard_and_join_are_inverse(layout: Any, world_size: int) -> None:
    cu_k = [0, *np.cumsum([3, 1, 20, 5, 44, 7, 0, 31]).tolist()]
    plans = [
        plan_packed(CU, cu_seqlens_k=cu_k, layout=layout, causal=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for keys, ends in ((False, CU), (True, cu_k)):
        stream = torch.randn(2, ends[-1], 3, requires_grad=True)
        shards = [plan.shard(stream, dim=1, keys=keys) for plan in plans]
        lengths = [plan.local_length_k if keys else plan.local_length for plan in plans]
        assert [shard.shape[1] for shard in shards] == lengths
        assert torch.equal(plans[0].join(shards, dim=1, keys=keys), stream)
        (grad,) = torch.autograd.grad(plans[0].join(shards, dim=1, keys=keys).sum(), stream)
        assert torch.equal(grad, torch.ones_like(stream))
        document = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        position = torch.from_numpy(np.arange(ends[-1]) - np.array(ends)[document])
        if not keys:  # aligned at their ends
            position += torch.from_numpy((np.diff(cu_k) - np.diff(CU))[document])
        for plan in plans:
            assert torch.equal(plan.positions(keys=keys), plan.shard(position, keys=keys))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_where_streams_divide_layouts_are_those_of_sequences(layout: Any) -> None:
    stream = torch.arange(96)
    for rank in range(4):
        plan = plan_packed([0, 50, 96], layout=layout, rank=rank, world_size=4)
        assert torch.equal(plan.shard(stream), shard_sequence(stream, layout=layout, dim=0, rank=rank, world_size=4))


def test_plans_are_values() -> None:
    made = plan_packed(CU, layout="balanced", causal=True, rank=1, world_size=4)
    for other in (tuple(CU), torch.tensor(CU), torch.tensor(CU, dtype=torch.int32), np.array(CU).tolist()):
        same = plan_packed(other, layout="balanced", causal=True, rank=1, world_size=4)
        assert same == made and hash(same) == hash(made) and same.problem is made.problem
    assert made != plan_packed(CU, layout="balanced", causal=True, rank=2, world_size=4)
    assert made != plan_packed(CU, layout="balanced", rank=1, world_size=4)
    assert made.max_seqlen == 40 and made.causal and made.window_size == (-1, 0)
    text = repr(made)
    for part in ("8 documents", "101 tokens", "causal", "balanced", "rank 1 of 4", f"{made.local_length} tokens in"):
        assert part in text
    assert f"{made.imbalance:.3f}" in text and 1 <= made.imbalance < 1.2
    assert plan_packed([0], rank=0, world_size=2).imbalance == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cu_seqlens": [0, 2.5]}, TypeError, "cu_seqlens must be a list of ints or a tensor"),
        ({"cu_seqlens": 5}, TypeError, "cu_seqlens must be a list of ints or a tensor, got int"),
        ({"cu_seqlens": torch.rand(4)}, ValueError, "cu_seqlens must be int32 or int64 of one dimension, got torch.fl"),
        ({"layout": "stripe"}, ValueError, "unknown layout 'stripe' of packed documents"),
        ({"rank": 0}, ValueError, "give both rank and world_size, or neither"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size must be \(left, right\)"),
        ({"window_size": (0.5, 2)}, TypeError, r"window_size must be \(left, right\), two ints, .* got \(0.5, 2\)"),
        ({"window_size": 5}, TypeError, r"window_size must be \(left, right\), .* got 5"),
    ],
)
def test_wrong_plans_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_packed(**{"cu_seqlens": CU, **options})


def test_wrong_shards_are_refused() -> None:
    plan = plan_packed(CU, rank=1, world_size=4)
    with pytest.raises(ValueError, match="the stream has 101 tokens, the tensor 100 along dim 0"):
        plan.shard(torch.zeros(100))
    with pytest.raises(ValueError, match=r"the shards must have \[25, 25, 25, 26\] tokens, by rank, got \[25, 25\]"):
        plan.join([torch.zeros(25)] * 2)


def unsharded(layout: Any) -> tuple[Tensor, Tensor]:
    plan = plan_packed(CU, layout=layout)
    stream = torch.arange(2.0 * TOKENS).reshape(2, TOKENS)
    mine = plan.shard(stream, dim=1).requires_grad_()
    everything = plan.unshard(mine, dim=1)
    assert torch.equal(everything, stream)
    (grad,) = torch.autograd.grad((everything * stream).sum(), mine)
    with pytest.raises(ValueError, match=f"rank {plan.rank} holds"):
        plan.unshard(torch.zeros(5))
    return grad, plan.shard(stream, dim=1)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_unshard_of_uneven_parts(ranks: RunRanks, layout: str) -> None:
    for grad, mine in ranks(3, unsharded, layout):
        assert torch.equal(grad, 3 * mine), "every rank uses the whole"


# --- functions


def every_function(seed: int) -> dict[str, float]:
    """On each rank: the distance from the oracle of every function for packed documents, gradients included."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    q, k, v = whole(seed)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    dout = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(seed + 1))
    options: dict[str, Any] = {"causal": True, "window_size": (9, 0), "dropout_p": 0.2, "dropout_seed": 5}
    x = [tensor[None] for tensor in (q, k, v)]
    truth = attention_oracle(*x, cu_seqlens_q=CU, dout=dout[None], scale=0.4, softcap=3.0, **options)
    options |= {"softmax_scale": 0.4, "softcap": 3.0, "return_attn_probs": True}
    errors = {}
    for name, function in FUNCTIONS._asdict().items():
        if "varlen" not in name:
            continue
        family = name.split("_flash")[0]
        layout: Any = {"ring": "contiguous", "zigzag_ring": "zigzag", "balanced_ring": "balanced"}.get(family)
        plan = plan_packed(CU, layout=layout or "contiguous", causal=True, window_size=(9, 0))
        a, b, c = (plan.shard(tensor).clone().requires_grad_() for tensor in (q, k, v))
        tensors: tuple[Tensor, ...] = (a, b, c)
        if "qkvpacked" in name:
            tensors = (torch.stack([a, b, c], dim=1),)
        elif "kvpacked" in name:
            tensors = (a, torch.stack([b, c], dim=1))
        if family == "llama3":
            prepared = llama3_flash_attn_prepare_cu_seqlens(torch.tensor(CU), True, rank, world_size)
            out, lse, _ = function(*tensors, *prepared[:4], 2, prepared[4], **options)
        elif "kvpacked" in name:
            out, lse, _ = function(*tensors, torch.tensor(CU, dtype=torch.int32), 40, **options)
        else:
            plain = {key: value for key, value in options.items() if key not in ("causal", "window_size")}
            out, lse, _ = function(*tensors, plan, None, **plain)
        assert truth.dq is not None and truth.dk is not None and truth.dv is not None
        found = (out, *torch.autograd.grad(out, (a, b, c), plan.shard(dout)))
        wanted = [plan.shard(tensor[0]) for tensor in (truth.out, truth.dq, truth.dk, truth.dv)]
        wanted.append(plan.shard(truth.lse[0], dim=1))
        errors[name] = max(compare(x, y).max_abs for x, y in zip((*found, lse), wanted, strict=True))
    return errors


def test_every_function_attends_to_documents(ranks: RunRanks, seed: int) -> None:
    for errors in ranks(2, every_function, seed):
        assert len(errors) == 12
        for name, error in errors.items():
            assert error < 1e-11, name


def prepared_by_hand(cu: list[int], causal: bool, rank: int, world_size: int) -> tuple[Any, ...]:
    """What ring-flash-attn's preparation returns, from its documentation: document by document."""
    chunk = cu[-1] // world_size
    start, stop = rank * chunk, (rank + 1) * chunk
    inside = [(a, b) for a, b in pairwise(cu) if a < stop and b > start and a < b]
    q_ends = [0, *np.cumsum([min(b, stop) - max(a, start) for a, b in inside]).tolist()]
    first, last = inside[0][0], stop if causal else inside[-1][1]
    k_ends = [0, *(min(b, last) - first for _, b in inside)]
    return q_ends, k_ends, max(np.diff(q_ends)), max(np.diff(k_ends)), slice(first, last)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "cu", [[0, 7, 24], [0, 6, 12, 18, 24], [0, 1, 2, 3, 24], [0, 24], [0, 11, 12, 13, 24]], ids=str
)
def test_llama3_prepares_what_ring_flash_attn_prepares(cu: list[int], causal: bool) -> None:
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            given = torch.tensor(cu, dtype=torch.int32)
            *ends, max_q, max_k, local = llama3_flash_attn_prepare_cu_seqlens(given, causal, rank, world_size)
            expected = prepared_by_hand(cu, causal, rank, world_size)
            assert [x.tolist() for x in ends if isinstance(x, Tensor)] == list(expected[:2])
            assert all(isinstance(x, Tensor) and x.dtype == torch.int32 for x in ends)
            assert (max_q, max_k, local) == expected[2:]
            assert isinstance(max_q, int)


def test_a_plan_goes_when_its_user_lets_it_go() -> None:
    """What calls remember must not hold a plan: it holds its group, and that the memory which its ranks share."""
    plan = plan_packed(CU, causal=True, rank=0, world_size=1)
    q, k, v = whole(0)
    ring_attention_packed(q.requires_grad_(), k, v, plan, backend="reference").sum().backward()
    gone = weakref.ref(plan)
    del plan
    gc.collect()
    assert gone() is None


def test_what_contradicts_itself_is_refused() -> None:
    q, k, v = whole(0)
    plan = plan_packed(CU, causal=True, window_size=(9, -1))
    ring_attention_packed(q, k, v, plan, causal=True, window_size=(9, -1), layout="contiguous")
    for options, message in (
        ({"causal": False}, "causal=False, the plan's is True"),
        ({"window_size": (8, 0)}, r"window_size=\(8, 0\), the plan's is \(9, 0\)"),
        ({"layout": "zigzag"}, "layout='zigzag', the plan's is 'contiguous'"),
        ({"cu_seqlens_k": CU}, "cu_seqlens_k is part of a plan"),
        ({"schedule": "spiral"}, "unknown schedule 'spiral'"),
    ):
        with pytest.raises(ValueError, match=message):
            ring_attention_packed(q, k, v, plan, **options)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="layout='zigzag', the plan's is 'contiguous'"):
        FUNCTIONS.zigzag_ring_flash_attn_varlen_func(q, k, v, plan, 40)
    with pytest.raises(ValueError, match="max_seqlen is 39, but the longest document of the global stream has 40"):
        FUNCTIONS.ring_flash_attn_varlen_func(q, k, v, CU, 39)
    with pytest.raises(TypeError, match="there is no cu_seqlens_k"):
        FUNCTIONS.ring_flash_attn_varlen_qkvpacked_func(torch.stack([q, q, q], 1), CU, 40, cu_seqlens_k=CU)
    with pytest.raises(ValueError, match=r"kv must be \(tokens, 2, heads, head_dim\), got shape \(101, 2, 8\)"):
        FUNCTIONS.ring_flash_attn_varlen_kvpacked_func(q, k, CU, 40)
    with pytest.raises(ValueError, match=r"q must be \(tokens, heads, head_dim\), got shape \(1, 101, 4, 8\)"):
        ring_attention_packed(q[None], k, v, plan)
    with pytest.raises(ValueError, match="cu_seqlens describes 101 tokens, of which rank 0 of 1 holds 101 in the cont"):
        ring_attention_packed(q[:100], k, v, plan)
    with pytest.raises(ValueError, match="planned for 2 ranks, but the group has 1"):
        ring_attention_packed(q, k, v, plan_packed(CU, rank=0, world_size=2))


def test_llama3_refuses_what_it_cannot_use() -> None:
    q, k, v = whole(0)
    prepared = llama3_flash_attn_prepare_cu_seqlens(CU, True, 0, 1)
    call = FUNCTIONS.llama3_flash_attn_varlen_func
    assert isinstance(call(q, k, v, *prepared[:4], 1, prepared[4], causal=True), Tensor)
    with pytest.raises(ValueError, match=r"ring_core\.llama3_flash_attn_prepare_cu_seqlens"):
        call(q, k, v, *prepared[:2], 40, 40, 1, prepared[4], causal=True)
    with pytest.raises(ValueError, match="was given causal=True"):
        call(q, k, v, *prepared[:4], 1, prepared[4])
    with pytest.raises(ValueError, match="heads_k_stride must divide the number of key heads, got 3 and 2"):
        call(q, k, v, *prepared[:4], 3, prepared[4], causal=True)
    with pytest.raises(ValueError, match="heads_k_stride must be at least 1, got 0"):
        call(q, k, v, *prepared[:4], 0, prepared[4], causal=True)
    other = llama3_flash_attn_prepare_cu_seqlens(CU, True, 1, 2)
    with pytest.raises(ValueError, match="prepared for rank 1 of 2, called on rank 0 of 1"):
        call(q, k, v, *other[:4], 1, other[4], causal=True)


def conventions() -> list[str]:
    messages = []
    q, k, v = whole(0, 50)
    for function in (FUNCTIONS.ring_flash_attn_varlen_func, FUNCTIONS.zigzag_ring_flash_attn_varlen_func):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            function(q, k, v, [0, 20, 50], 30, causal=True)
        messages.append(str(caught.value))
    return messages


def test_cu_seqlens_of_ring_flash_attn_are_recognised(ranks: RunRanks) -> None:
    for messages in ranks(2, conventions):
        for message in messages:
            assert "cu_seqlens ends with 50, the local length of q, though there are 2 ranks" in message
            assert "ring_core.global_cu_seqlens(cu_seqlens, 2) converts it" in message and "shard(x)" in message
    assert global_cu_seqlens([0, 20, 50], 2) == [0, 40, 100]
    converted = global_cu_seqlens(torch.tensor([0, 20, 50]), 2)
    assert isinstance(converted, Tensor) and converted.tolist() == [0, 40, 100]


def disagreeing() -> str:
    os.environ["RING_CHECK"] = "1"
    try:
        plan = plan_packed(CU)
        q, k, v = (plan.shard(x) for x in whole(0))
        ring_attention_packed(q, k, v, plan)  # lengths differ, and may
        other = plan_packed([0, 50 + dist.get_rank(), TOKENS])
        with pytest.raises(ValueError, match="all ranks must make the same call") as caught:
            ring_attention_packed(q, k, v, other)
        return str(caught.value)
    finally:
        del os.environ["RING_CHECK"]


def test_ring_check_compares_documents(ranks: RunRanks) -> None:
    for message in ranks(2, disagreeing):
        assert "'cu_seqlens of q': (0, 51, 101)" in message and "'cu_seqlens of q': (0, 50, 101)" in message


# --- torch.compile


def test_compiled_with_a_plan_without_new_graphs_for_new_documents() -> None:
    """The plan's content is an input of the graph."""
    q, k, v = (x.requires_grad_() for x in whole(1))
    layer = torch.compile(
        lambda q, k, v, plan: ring_attention_packed(q * 2, k, v, plan, return_lse=True),
        fullgraph=True,
        backend="aot_eager",
    )
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    for number, lengths in enumerate(([50, 51], [20, 0, 81], [1, 2, 90, 8], [7] * 14 + [3])):
        plan = plan_packed([0, *np.cumsum(lengths).tolist()], causal=True, layout="balanced")
        if number == 2:
            graphs = counted["unique_graphs"]
        results = []
        for call in (layer, lambda q, k, v, plan: ring_attention_packed(q * 2, k, v, plan, return_lse=True)):
            out, lse = call(q, k, v, plan)
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counted["unique_graphs"] == graphs, "recompiled for other documents"


def compiled_on_ranks(layout: Any) -> float:
    plan = plan_packed(CU, causal=True, layout=layout)
    q, k, v = (plan.shard(x).requires_grad_() for x in whole(2))
    layer = torch.compile(
        lambda q, k, v: ring_attention_packed(q, k, v, CU, causal=True, layout=layout),
        fullgraph=True,
        backend="aot_eager",
    )
    outs = (layer(q, k, v), ring_attention_packed(q, k, v, plan))
    results = [(out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in outs]
    return max(compare(a, b).max_abs for a, b in zip(*results, strict=True))


def test_compiled_with_a_list(ranks: RunRanks) -> None:
    assert max(ranks(2, compiled_on_ranks, "balanced", timeout=240)) < 1e-12


# --- what travels


def sent(layout: Any, transport: str, mask: dict[str, Any], lengths: list[int]) -> tuple[Any, Any, int]:
    """(counted, predicted, keys that this rank's queries see and others hold, by brute force)."""
    cu = [0, *np.cumsum(lengths).tolist()]
    schedule: Any = "ring" if transport == "ring" else "gather"
    plan = plan_packed(cu, layout=layout, **mask)
    made = make_plan(plan.problem, plan.rank, schedule)
    q, k, v = (plan.shard(x).float().requires_grad_() for x in whole(3, cu[-1]))
    with gather_through(transport if transport != "ring" else "auto"), record_traffic() as traffic:
        out = ring_attention_packed(q, k, v, plan, schedule=schedule)
        out.backward(torch.randn_like(out))
    shape = {"batch": 1, "num_kv_heads": 2, "head_dim": 8, "element_size": 4}
    predicted = {("keys", peer): 2 * message_bytes(n, **shape) for peer, n in made.key_tokens.items()}
    predicted |= {("gradients", peer): message_bytes(n, **shape) for peer, n in made.gradient_tokens.items()}
    document = np.repeat(np.arange(len(lengths)), lengths)
    token = np.arange(cu[-1])
    distance = token - token[:, None]
    left, right = plan.window_size
    seen = (document == document[:, None]) & (distance <= (np.inf if right < 0 else right))
    seen &= distance >= (-np.inf if left < 0 else -left)
    mine = plan.shard(torch.from_numpy(token)).numpy()
    foreign = np.setdiff1d(np.flatnonzero(seen[mine].any(axis=0)), mine)
    return {peer: n for peer, n in traffic.sent.items() if n}, predicted, len(foreign)


@pytest.mark.parametrize("transport", ["ring", "collectives", "shared_memory"])
@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
@pytest.mark.parametrize("mask", [{"causal": True}, {}, {"causal": True, "window_size": (6, 0)}], ids=str)
def test_bytes_are_those_of_the_plan_and_no_more_than_needed(
    ranks: RunRanks, transport: str, layout: str, mask: dict[str, Any]
) -> None:
    results = ranks(3, sent, layout, transport, mask, LENGTHS)
    for counted, predicted, _ in results:
        assert counted == predicted
    if transport != "ring":
        per_token = 2 * message_bytes(1, batch=1, num_kv_heads=2, head_dim=8, element_size=4)
        keys = sum(n for counted, _, _ in results for (kind, _), n in counted.items() if kind == "keys")
        assert keys == per_token * sum(foreign for _, _, foreign in results)


def kept(transport: str, lengths: list[int]) -> tuple[Any, Any, float]:
    """(counted over a forward and two backwards, predicted, distance from gathering again for each)."""
    plan = plan_packed([0, *np.cumsum(lengths).tolist()], layout="balanced", causal=True)
    made = make_plan(plan.problem, plan.rank, "gather")
    q, k, v = (plan.shard(x).requires_grad_() for x in whole(3, sum(lengths)))
    results: list[list[Tensor]] = []
    sent: list[dict[Any, int]] = []
    for keep in (True, False):
        with pytest.MonkeyPatch.context() as patch, gather_through(transport), record_traffic() as traffic:
            if not keep:
                patch.setattr("ring_core.comm.keeps", lambda *_: False)
            out = ring_attention_packed(q, k, v, plan, schedule="gather")
            for seed in (1, 2):
                dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
                gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            results.append([out, *gradients])
        sent.append({peer: n for peer, n in traffic.sent.items() if n})
    shape = {"batch": 1, "num_kv_heads": 2, "head_dim": 8, "element_size": 8}
    predicted = {("keys", peer): message_bytes(n, **shape) for peer, n in made.key_tokens.items()}
    predicted |= {("gradients", peer): 2 * message_bytes(n, **shape) for peer, n in made.gradient_tokens.items()}
    again = {peer: n * (3 if peer[0] == "keys" else 1) for peer, n in predicted.items()}
    return sent, [predicted, again], max(compare(a, b).max_abs for a, b in zip(*results, strict=True))


def test_keys_are_kept_where_they_are_few() -> None:
    """Of the least that any rank saves anyway; what is asked says nothing of a rank."""
    found = []
    for lengths in ([7, 6], [5, 8, 4], [13, 2, 10], [9, 9, 9, 2]):
        problem = plan_packed([0, *np.cumsum(lengths).tolist()], causal=True, rank=0, world_size=2).problem
        kept = [keeps(problem, heads, 1, 1) for heads in range(1, 12)]
        assert kept == sorted(kept), "more query heads make more that is saved anyway"
        assert not any(keeps(problem, heads, 1, 2) for heads in range(1, 12)), "groups take turns in their buffers"
        found += kept
    assert set(found) == {False, True}


@pytest.mark.parametrize("transport", ["collectives", "shared_memory"])
def test_few_gathered_keys_stay_for_the_backward(ranks: RunRanks, transport: str) -> None:
    results = ranks(3, kept, transport, [9, 5, 14, 3, 11, 6, 12, 4, 8])
    assert any(("keys", peer) in counted[0] for counted, _, _ in results for peer in range(3)), "some travel"
    for counted, predicted, distance in results:
        assert counted == predicted
        assert distance == 0.0


def test_documents_of_one_rank_send_nothing(ranks: RunRanks) -> None:
    for counted, predicted, foreign in ranks(3, sent, "contiguous", "ring", {}, [8, 4, 12, 6, 6]):
        assert counted == predicted == {} and foreign == 0


def stay_home(layout: str, seed: int) -> tuple[int, float]:
    """Bytes sent for documents that end where chunks do, and the distance from the truth."""
    cu_seqlens = [0, 4, 8, 16, 20, 24, 32]
    plan = plan_packed(cu_seqlens, layout=layout, causal=True)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(32, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    truth = attention_oracle(
        q[None], k[None], v[None], dout=dout[None], causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
    )
    mine = [plan.shard(x).requires_grad_() for x in (q, k, v)]
    with record_traffic() as traffic:
        out = ring_attention_packed(*mine, plan, schedule="gather")
        found = [out, *torch.autograd.grad(out, mine, plan.shard(dout))]
    wanted = [truth.out, truth.dq, truth.dk, truth.dv]
    errors = [float((x - plan.shard(y[0])).abs().max()) for x, y in zip(found, wanted, strict=True) if y is not None]
    return sum(traffic.sent.values()), max(errors)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_documents_of_one_rank_each_do_not_travel(ranks: RunRanks, layout: str, seed: int) -> None:
    for sent, error in ranks(2, stay_home, layout, seed):
        assert sent == 0 and error < 1e-12
