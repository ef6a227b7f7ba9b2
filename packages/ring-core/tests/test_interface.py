"""Bad input: what was given, what is needed, how to get it. And odd but legal input: the right numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import (
    UnsupportedError,
    flash_attn_functions,
    join_shards,
    local_positions,
    ring_attention,
    shard_sequence,
)
from ring_core import backend as backends
from ring_core.backend import Capabilities
from ring_core.layout import LAYOUTS
from ring_core.plan import Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.testing import attention_oracle, compare
from ring_core.testing.plugin import RunRanks


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def qkv(length: int = 8, heads: int = 4, kv_heads: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, length, heads, 8, **options), *(randn(2, length, kv_heads, 8, **options) for _ in range(2))  # type: ignore[return-value]


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*leaves), leaves, dout))


@pytest.fixture
def single_precision() -> Iterator[str]:
    """A backend that knows neither float64 nor softcap."""

    class Single(ReferenceBackend):
        name = "single"

        def capabilities(self, device: torch.device) -> Capabilities:
            everything = super().capabilities(device)
            return replace(
                everything,
                dtypes=frozenset({torch.float16, torch.float32}),
                head_dims=backends.HeadDims(8, 64, 8),
                features=everything.features - {"softcap"},
            )

    backends.register_backend("single", Single())
    yield "single"
    backends._registered().pop("single")
    backends.load_backend.cache_clear()
    backends.check_supported.cache_clear()


# --- tensors

X = torch.zeros(2, 8, 4, 8)
KV = torch.zeros(2, 8, 2, 8)

BAD_TENSORS: dict[str, tuple[tuple[Any, Any, Any], type[Exception], str]] = {
    "not a tensor": ((X, [1], KV), TypeError, "k must be a tensor, got list"),
    "none": ((None, KV, KV), TypeError, "q must be a tensor, got NoneType"),
    "three dims": (
        (X, KV, KV[0]),
        ValueError,
        "v must be (batch, sequence, heads, head_dim), got shape (8, 2, 8)",
    ),
    "integers": ((X.int(), KV.int(), KV.int()), TypeError, "q, k, v must be floating point, got torch.int32"),
    "mixed dtypes": (
        (X, KV.half(), KV),
        TypeError,
        "q, k, v must have one dtype, got torch.float32, torch.float16, torch.float32: cast them with .to(dtype)",
    ),
    "mixed devices": (
        (X, KV, KV.to("meta")),
        ValueError,
        "q, k, v must be on one device, got cpu, cpu, meta: move them with .to(device)",
    ),
    "k and v differ": (
        (X, KV, KV[:, :4]),
        ValueError,
        "k and v must have one shape, got (2, 8, 2, 8) and (2, 4, 2, 8)",
    ),
    "batches differ": (
        (X, KV[:1], KV[:1]),
        ValueError,
        "q and k must agree in batch and head_dim, got shapes (2, 8, 4, 8) and (1, 8, 2, 8)",
    ),
    "head dims differ": (
        (X, KV[..., :4], KV[..., :4]),
        ValueError,
        "q and k must agree in batch and head_dim, got shapes (2, 8, 4, 8) and (2, 8, 2, 4)",
    ),
    "heads": (
        (X[:, :, :3], KV, KV),
        ValueError,
        "the number of query heads must be a positive multiple of the number of key heads, got 3 and 2",
    ),
    "no key heads": (
        (X, KV[:, :, :0], KV[:, :, :0]),
        ValueError,
        "the number of query heads must be a positive multiple of the number of key heads, got 4 and 0",
    ),
}


@pytest.mark.parametrize(("tensors", "error", "message"), BAD_TENSORS.values(), ids=list(BAD_TENSORS))
def test_tensors(tensors: tuple[Any, Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ring_attention(*tensors)


SINKS = "sinks must be (4,), floating point, on cpu, got "
WINDOW = "window_size must be (left, right), two ints, each >= 0 or -1 for unbounded, got "
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "layout": (
        {"layout": "spiral"},
        "unknown layout 'spiral'; there are 'contiguous', 'zigzag', 'stripe'",
    ),
    "schedule": ({"schedule": "star"}, "unknown schedule 'star'; there are 'auto', 'ring', 'gather'"),
    "backend": ({"backend": "cuda"}, "there is no backend 'cuda' here; installed: "),
    "backend by number": ({"backend": 3}, "backend must be the name of a backend or None, got int"),
    "half an option": ({"backend": "reference]"}, "there is no backend 'reference]' here; installed: "),
    "backend without options": ({"backend": "reference[fast]"}, "backend 'reference' has no options, got 'fast'"),
    "window of one": ({"window_size": (3,)}, WINDOW + "(3,)"),
    "negative window": ({"window_size": (-2, 0)}, WINDOW + "(-2, 0)"),
    "window as a number": ({"window_size": 128}, WINDOW + "128"),
    "window of floats": ({"window_size": (0.5, 1.0)}, WINDOW + "(0.5, 1.0)"),
    "total too long": (
        {"total_length": 9},
        "total_length says 9 queries, but the ranks hold 8 together",
    ),
    "total negative": ({"total_length": (8, -1)}, "total_length says -1 keys, but the ranks hold 8 together"),
    "total of three": ({"total_length": (8, 8, 8)}, "total_length must be"),
    "total not whole": ({"total_length": 7.5}, "total_length must be one int or a pair (of q, of k), got 7.5"),
    "softcap": ({"softcap": -1.0}, "softcap must be >= 0 (0 is none), got -1.0"),
    "softcap nan": ({"softcap": float("nan")}, "softcap must be >= 0 (0 is none), got nan"),
    "alibi shape": ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must be (4,) or (2, 4), got (3,)"),
    "alibi list": ({"alibi_slopes": [0.5] * 4}, "alibi_slopes must be a tensor, got list"),
    "alibi dtype": (
        {"alibi_slopes": torch.ones(4, dtype=torch.int32)},
        "alibi_slopes must be fp32 or fp64 on cpu, got torch.int32 on cpu",
    ),
    "alibi device": (
        {"alibi_slopes": torch.ones(4, device="meta")},
        "alibi_slopes must be fp32 or fp64 on cpu, got torch.float32 on meta",
    ),
    "sinks list": ({"sinks": [0.5] * 4}, "sinks must be a tensor, got list"),
    "sinks shape": ({"sinks": torch.ones(2)}, SINKS + "(2,), torch.float32, on cpu"),
    "sinks dtype": ({"sinks": torch.ones(4, dtype=torch.int64)}, SINKS + "(4,), torch.int64, on cpu"),
    "sinks device": ({"sinks": torch.ones(4, device="meta")}, SINKS + "(4,), torch.float32, on meta"),
    "dropout 1": ({"dropout_p": 1.0}, "dropout_p must be in [0, 1), got 1.0"),
    "dropout negative": ({"dropout_p": -0.1}, "dropout_p must be in [0, 1), got -0.1"),
    "dropout nan": ({"dropout_p": float("nan")}, "dropout_p must be in [0, 1), got nan"),
    "seed dtype": (
        {"dropout_p": 0.1, "dropout_seed": torch.zeros(1)},
        "dropout_seed must be an int or one int64 on cpu, got 1 torch.float32 on cpu",
    ),
    "seed size": (
        {"dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64)},
        "dropout_seed must be an int or one int64 on cpu, got 2 torch.int64 on cpu",
    ),
    "seed device": (
        {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        "dropout_seed must be an int or one int64 on cpu, got 1 torch.int64 on meta",
    ),
    "seed too large": (
        {"dropout_p": 0.1, "dropout_seed": 1 << 63},
        "dropout_seed must be an int that fits into 64 bits, with its sign, got 9223372036854775808",
    ),
    "seed a float": (
        {"dropout_p": 0.1, "dropout_seed": 1.5},
        "dropout_seed must be an int or one int64 on cpu, got float",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=list(BAD_ARGUMENTS))
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        ring_attention(X, KV, KV, **arguments)


def test_total_length_of_unequal_lengths() -> None:
    with pytest.raises(ValueError, match=r"must be a pair \(of q, of k\) .*, got 3 for 4 queries and 8"):
        ring_attention(X[:, :4], KV, KV, total_length=3)


def test_odd_local_length() -> None:
    """Zigzag deals out two half-chunks."""
    with pytest.raises(ValueError, match=r"length of k is 5, which is odd: pad the whole sequence with ring_core.pad"):
        ring_attention(X[:, :4], KV[:, :5], KV[:, :5], layout="zigzag")
    with pytest.raises(ValueError, match="local length of q is 7, which is odd"):
        ring_attention(X[:, :7], KV[:, :7], KV[:, :7], layout="zigzag")
    assert ring_attention(X[:, :7], KV[:, :7], KV[:, :7], layout="stripe").shape == (2, 7, 4, 8)


def test_a_world_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"10 tokens cannot be dealt .* to 3 ranks .* needs a multiple of 3: pad it"):
        shard_sequence(torch.zeros(1, 10), layout="contiguous", rank=0, world_size=3)


# --- what a backend cannot do


def test_float64_on_a_backend_without_it(single_precision: str) -> None:
    message = (
        r"backend 'single' cannot do this call: q, k, v are torch.float64, it takes torch.float16, torch.float32; "
        r"backends here that can: .*\breference\b"
    )
    with pytest.raises(UnsupportedError, match=message):
        ring_attention(*qkv(), backend=single_precision)
    q, k, v = qkv(dtype=torch.float32)
    assert torch.equal(ring_attention(q, k, v, backend=single_precision), ring_attention(q, k, v, backend="reference"))


def test_everything_wrong_is_named(single_precision: str) -> None:
    with pytest.raises(
        ValueError, match=r"float64.*; the head dim is 12, it takes 8-64 \(multiples of 8\); softcap is not"
    ):
        ring_attention(*(randn(1, 4, 1, 12) for _ in range(3)), softcap=2.0, backend=single_precision)


# --- a group this rank is not in


def outsider() -> str:
    pair = dist.new_group([0, 1])
    x = torch.randn(1, 4, 1, 8)
    if dist.get_rank() < 2:
        ring_attention(x, x, x, group=pair)
        return "done"
    messages = []
    for call in (lambda: ring_attention(x, x, x, group=pair), lambda: shard_sequence(x, layout="stripe", group=pair)):
        with pytest.raises(ValueError, match="is not in the group") as caught:
            call()
        messages.append(str(caught.value))
    return messages[0] if messages[0] == messages[1] else str(messages)


def test_a_group_this_rank_is_not_in(ranks: RunRanks) -> None:
    rejected = "rank 2 is not in the group it passed; only members may call ring attention on a group"
    assert ranks(3, outsider) == ["done", "done", rejected]


# --- strides and offsets


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def offset(x: Tensor) -> Tensor:
    storage = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
    view = storage[3:].view(x.shape)
    view.copy_(x)
    return view


def inside(x: Tensor) -> Tensor:
    wider = torch.full([n + 2 for n in x.shape], torch.nan, dtype=x.dtype)
    view = wider[1:-1, 1:-1, 1:-1, 1:-1]
    view.copy_(x)
    return view


def every_other(x: Tensor) -> Tensor:
    """The last dimension is not dense."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def head_dim_first(x: Tensor) -> Tensor:
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


STRIDES = [transposed, offset, inside, every_other, head_dim_first]


def attend_strided(name: str, layout: str, schedule: str) -> bool:
    change = next(f for f in STRIDES if f.__name__ == name)
    tensors = [x.detach() for x in qkv()]
    dout = torch.randn_like(tensors[0])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, causal=True, layout=layout, schedule=schedule)  # type: ignore[call-overload, no-any-return]

    plain = gradients(attend, [x.clone().requires_grad_() for x in tensors], dout)
    odd = gradients(attend, [change(x).detach().requires_grad_() for x in tensors], change(dout))
    outs = attend(*tensors), attend(*(change(x) for x in tensors))
    # The same numbers in another order in memory: a BLAS may sum them in another order too.
    return all(compare(a, b).relative < 1e-13 for a, b in zip([outs[0], *plain], [outs[1], *odd], strict=True))


@pytest.mark.parametrize("change", STRIDES, ids=lambda f: f.__name__)
def test_strides_and_offsets(ranks: RunRanks, change: Callable[[Tensor], Tensor]) -> None:
    assert attend_strided(change.__name__, "contiguous", "auto")
    for layout, schedule in (("zigzag", "ring"), ("stripe", "gather")):
        assert ranks(2, attend_strided, change.__name__, layout, schedule) == [True, True]


def test_expanded_gradient_and_tensors() -> None:
    """Strides of 0: what .sum().backward() and broadcast keys give."""
    q = randn(1, 6, 4, 8, grad=True)
    k = randn(1, 6, 1, 8)
    out = ring_attention(q, k.expand(1, 6, 4, 8), k.expand(1, 6, 4, 8), causal=True)
    out.sum().backward()
    expected = attention_oracle(q, k, k, causal=True, dout=torch.ones_like(out))
    assert compare(out, expected.out).max_abs < 1e-13
    assert q.grad is not None and expected.dq is not None and compare(q.grad, expected.dq).max_abs < 1e-13


def test_results_are_fresh_and_contiguous() -> None:
    q, k, v = (transposed(x) for x in qkv())
    out, lse = ring_attention(q, k, v, return_lse=True)
    assert out.is_contiguous() and lse.is_contiguous() and lse.shape == (2, 4, 8)
    assert {out.data_ptr(), lse.data_ptr()}.isdisjoint({q.data_ptr(), k.data_ptr(), v.data_ptr()})


# --- empty and unseen


def empty(q_length: int, k_length: int, layout: str, schedule: str) -> list[bool]:
    q = randn(2, q_length, 4, 8, grad=True)
    k, v = (randn(2, k_length, 2, 8, grad=True) for _ in range(2))
    out, lse = ring_attention(q, k, v, layout=layout, schedule=schedule, return_lse=True)  # type: ignore[call-overload]
    out.sum().backward()
    grads = [x.grad for x in (q, k, v)]
    return [
        out.shape == q.shape and not out.any(),
        lse.shape == (2, 4, q_length) and bool((lse == -torch.inf).all()),
        all(x is not None and not x.any() for x in grads),
    ]


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_no_queries_or_no_keys(ranks: RunRanks, lengths: tuple[int, int], schedule: str) -> None:
    for layout in LAYOUTS:
        assert empty(*lengths, layout, schedule) == [True] * 3
        assert ranks(2, empty, *lengths, layout, schedule) == [[True] * 3] * 2


def test_no_batch_and_no_head_dim() -> None:
    assert ring_attention(X[:0], KV[:0], KV[:0]).shape == (0, 8, 4, 8)


def unseen(layout: Any, schedule: Any) -> list[Tensor]:
    """More queries than keys under a causal mask: the first half of the rows sees nothing."""
    torch.manual_seed(11)  # the same on all ranks
    q, k, v = randn(1, 16, 4, 8), randn(1, 8, 2, 8), randn(1, 8, 2, 8)
    q, k, v = (shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v))
    out, lse = ring_attention(q, k, v, causal=True, layout=layout, schedule=schedule, return_lse=True)
    out.square().sum().backward()
    assert q.grad is not None and k.grad is not None
    return [out.detach(), lse.detach(), q.grad, k.grad]


@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_see_nothing(ranks: RunRanks, layout: Any, schedule: str) -> None:
    for rank, (out, lse, dq, dk) in enumerate(ranks(2, unseen, layout, schedule)):
        blind = shard_sequence(torch.arange(16) < 8, layout=layout, dim=0, rank=rank, world_size=2)
        assert not out[:, blind].any() and (lse[..., blind] == -torch.inf).all() and not dq[:, blind].any()
        assert out[:, ~blind].all() and lse[..., ~blind].isfinite().all()
        assert dq.isfinite().all() and dk.isfinite().all()


# --- nan and inf


POSITION = 13


def poisoned(value: float, layout: Any, schedule: Any, where: str) -> list[Tensor]:
    """One number of one query, key or value, at POSITION, head 1, batch entry 0, is `value`: out, lse, dq, dk, dv."""
    torch.manual_seed(5)
    tensors = {"q": randn(2, 32, 4, 8), "k": randn(2, 32, 2, 8), "v": randn(2, 32, 2, 8)}
    tensors[where][0, POSITION, 1, 3] = value
    parts = [shard_sequence(x, layout=layout).requires_grad_() for x in tensors.values()]
    out, lse = ring_attention(*parts, causal=True, layout=layout, schedule=schedule, return_lse=True)
    out.sum().backward()
    return [out.detach(), lse.detach(), *(x.grad for x in parts if x.grad is not None)]


def infected(x: Tensor) -> Tensor:
    """bool (2, 32, heads) from (2, 32, heads, D)"""
    return ~x.isfinite().all(dim=-1)


def in_reach(layout: Any, schedule: str, where: str) -> tuple[Tensor, Tensor]:
    """bool (32,) each: rows that share a segment with the poisoned key (or are it), keys that share one with those."""
    rows, keys = torch.arange(32) == POSITION, torch.zeros(32, dtype=torch.bool)
    segments = []  # (query positions, key positions) of all ranks
    for rank in range(4):
        plan = make_plan(Problem(32, 32, 32, 32, None, 0, layout, 4), rank, schedule)
        local = local_positions(32, layout=layout, rank=rank, world_size=4)
        for step in plan.steps:
            segments += [
                (local[s.q_start : s.q_start + s.q_len], s.k_position + s.stride * torch.arange(s.k_len))
                for s in step.forward.segments + step.backward.segments
            ]
    if where != "q":
        for seen_by, seen in segments:
            if POSITION in seen:
                rows[seen_by] = True
    for seen_by, seen in segments:
        if rows[seen_by].any():
            keys[seen] = True
    return rows, keys


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["k", "v", "q"])
@pytest.mark.parametrize(("layout", "schedule"), [("contiguous", "ring"), ("zigzag", "gather"), ("stripe", "ring")])
def test_nan_and_inf_stay_where_they_are_seen(
    ranks: RunRanks, where: str, value: float, layout: Any, schedule: str
) -> None:
    """As in flash-attn: nan reaches every row that sees it, in its head and batch entry. Rows that do not see it stay
    clean where they share no segment with it; inside one a masked weight of 0 still meets nan in the product. inf in a
    value is inf or nan in the output; inf in a key or query makes scores of +inf (nan) or -inf (no weight)."""
    parts = ranks(4, poisoned, value, layout, schedule, where)
    out, dq, dk, dv = (join_shards([part[i] for part in parts], layout=layout) for i in (0, 2, 3, 4))
    lse = join_shards([part[1] for part in parts], layout=layout, dim=2).transpose(1, 2)
    heads, kv_head = (slice(1, 2), 0) if where == "q" else (slice(2, 4), 1)
    rows, keys = in_reach(layout, schedule, where)
    if layout != "stripe":
        assert not rows.all(), "the test would find nothing"
    may_q, may_k = torch.zeros(2, 32, 4, dtype=torch.bool), torch.zeros(2, 32, 2, dtype=torch.bool)
    may_q[0, rows, heads] = True
    may_k[0, keys, kv_head] = True
    for name, x, may in (("out", out, may_q), ("dq", dq, may_q), ("dk", dk, may_k), ("dv", dv, may_k)):
        assert not (infected(x) & ~may).any(), f"{name}: reaches what shares no segment with it"
    must = torch.zeros(2, 32, 4, dtype=torch.bool)
    must[0, (torch.arange(32) >= POSITION) if where != "q" else rows, heads] = True
    if value != value or where == "v":
        assert not (must & ~infected(out)).any(), f"{value} got lost on the way"
    if value != value:
        seen = torch.zeros_like(must) if where == "v" else must
        assert torch.equal(lse.isnan(), seen), "lse: nan exactly for the rows that see the key"


def test_minus_infinity_in_a_key_is_no_weight() -> None:
    """A score of -inf: the key counts for nothing, as if it were masked."""
    q, k, v = torch.ones(1, 4, 1, 8), randn(1, 4, 1, 8, dtype=torch.float32), randn(1, 4, 1, 8, dtype=torch.float32)
    k[0, 2, 0, 0] = -torch.inf
    without = [0, 1, 3]
    expected = attention_oracle(q, k[:, without], v[:, without])
    assert compare(ring_attention(q, k, v), expected.out).max_abs < 1e-6


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x * 1e4 for x in qkv(dtype=torch.float32))
    out, lse = ring_attention(q, k, v, causal=True, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()


# --- what needs no checking must still be right


def test_scale_and_windows_mean_what_they_say() -> None:
    q, k, v = qkv()
    expected = attention_oracle(q, k, v, window_size=(3, 2), scale=0.3)
    assert compare(ring_attention(q, k, v, window_size=(3, 2), softmax_scale=0.3), expected.out).max_abs < 1e-13
    even = ring_attention(q, k, v, window_size=(3, 2), softmax_scale=0.0)  # all seen keys count alike
    assert compare(even[:, 0], v[:, :3].mean(1).repeat_interleave(2, 1)).max_abs < 1e-13
    causal = ring_attention(q, k, v, causal=True)
    assert torch.equal(ring_attention(q, k, v, window_size=(-1, 0)), causal)
    assert torch.equal(ring_attention(q, k, v, causal=True, window_size=(100, 7)), causal), "causal goes before right"
    assert torch.equal(ring_attention(q, k, v, causal=True, total_length=8), causal)
    assert torch.equal(ring_attention(q, k, v, causal=True, total_length=(8, 8)), causal)


def test_seeds_of_any_kind() -> None:
    q, k, v = qkv()

    def dropped(seed: Any) -> Tensor:
        return ring_attention(q, k, v, dropout_p=0.5, dropout_seed=seed)

    assert torch.equal(dropped(7), dropped(torch.tensor([7])))
    assert torch.equal(dropped(7), dropped(torch.tensor(7)))
    assert not torch.equal(dropped(7), dropped(8))
    assert torch.equal(dropped(-1), dropped(torch.tensor([-1])))
    torch.manual_seed(1)
    drawn = dropped(None)
    torch.manual_seed(1)
    assert torch.equal(drawn, dropped(None)) and not torch.equal(drawn, dropped(None))


def test_packed_functions_check_their_shapes() -> None:
    functions = flash_attn_functions("reference")
    with pytest.raises(ValueError, match=r"kv must be \(batch, sequence, 2, heads, .*, got shape \(2, 8, 4, 8\)"):
        functions.ring_flash_attn_kvpacked_func(X, X)
    with pytest.raises(ValueError, match=r"qkv must be \(batch, sequence, 3, heads, .*, got shape \(2, 8, 2, 4, 8\)"):
        functions.zigzag_ring_flash_attn_qkvpacked_func(torch.stack([X, X], dim=2))
    with pytest.raises(TypeError, match="qkv must be a tensor, got tuple"):
        functions.stripe_flash_attn_qkvpacked_func((X, X, X))  # type: ignore[arg-type]
