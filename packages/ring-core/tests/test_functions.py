"""The flash-attn-shaped family: names, signatures, and that packed forms are the plain one."""

from __future__ import annotations

import inspect
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core import AttentionFunctions, flash_attn_functions, ring_attention, shard_sequence
from ring_core.testing import attention_oracle, compare
from ring_core.testing.plugin import RunRanks

NAMES = [
    f"{family}_{kind}func"
    for family in ("ring_flash_attn", "zigzag_ring_flash_attn", "stripe_flash_attn")
    for kind in ("", "kvpacked_", "qkvpacked_")
]
LAYOUT_OF = {"ring_flash_attn": "contiguous", "zigzag_ring_flash_attn": "zigzag", "stripe_flash_attn": "stripe"}

# From DESIGN.md, in flash-attn's positional order; total_length is ours, for padded sequences.
TAIL: dict[str, Any] = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
    "group": None,
}
KEYWORDS: dict[str, Any] = {
    "softcap": 0.0,
    "sinks": None,
    "dropout_seed": None,
    "schedule": "auto",
    "total_length": None,
}

VARLEN = [
    f"{family}_flash_attn_varlen_{kind}func"
    for family in ("ring", "zigzag_ring", "balanced_ring", "llama3")
    for kind in ("", "kvpacked_", "qkvpacked_")
]
VARLEN_HEAD = ["cu_seqlens", "max_seqlen"]
LLAMA3_HEAD = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "heads_k_stride", "local_k_slice"]

FUNCTIONS = flash_attn_functions("reference")
BATCHED = FUNCTIONS[: len(NAMES)]


def layout_of(name: str) -> str:
    return LAYOUT_OF[name.removesuffix("func").removesuffix("_").removesuffix("_qkvpacked").removesuffix("_kvpacked")]


def test_names() -> None:
    assert list(AttentionFunctions._fields) == NAMES + VARLEN
    for name, function in zip(NAMES + VARLEN, FUNCTIONS, strict=True):
        assert function.__name__ == name


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    heads = ["qkv"] if "qkvpacked" in name else ["q", "kv"] if "kvpacked" in name else ["q", "k", "v"]
    parameters = inspect.signature(getattr(FUNCTIONS, name)).parameters
    assert list(parameters) == [*heads, *TAIL, *KEYWORDS]
    for parameter in heads:
        assert parameters[parameter].default is inspect.Parameter.empty
    for parameter, default in {**TAIL, **KEYWORDS}.items():
        assert parameters[parameter].default == default
    kinds = {parameters[parameter].kind for parameter in [*heads, *TAIL]}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {parameters[parameter].kind for parameter in KEYWORDS} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", VARLEN)
def test_signatures_for_packed_documents(name: str) -> None:
    tensors = ["qkv"] if "qkvpacked" in name else ["q", "kv"] if "kvpacked" in name else ["q", "k", "v"]
    head = LLAMA3_HEAD if "llama3" in name else VARLEN_HEAD
    keywords = {key: default for key, default in KEYWORDS.items() if key != "total_length"}
    if "llama3" not in name and "qkvpacked" not in name:
        keywords["cu_seqlens_k"] = None
    parameters = inspect.signature(getattr(FUNCTIONS, name)).parameters
    assert list(parameters)[: len(tensors) + len(head) + len(TAIL)] == [*tensors, *head, *TAIL]
    assert set(parameters) == {*tensors, *head, *TAIL, *keywords}
    for parameter, default in {**TAIL, **keywords}.items():
        assert parameters[parameter].default == default
    assert {parameters[key].kind for key in keywords} == {inspect.Parameter.KEYWORD_ONLY}
    doc = inspect.getdoc(getattr(FUNCTIONS, name)) or ""
    assert "Returns:" in doc and "{" not in doc and "(Hq, T_local)" in doc


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name: str) -> None:
    doc = inspect.getdoc(getattr(FUNCTIONS, name)) or ""
    assert f"in the {layout_of(name)} layout" in doc and "shard_sequence" in doc and "Returns:" in doc
    assert ("qkv (B, S, 3, H, D)" in doc) == ("qkvpacked" in name)
    assert ("kv (B, S, 2, Hkv, D)" in doc) == ("_kvpacked" in name)
    assert "{" not in doc, "an unfilled template"


def test_prefix_and_module() -> None:
    """As a backend package makes them: names that pickle finds again."""
    module = types.ModuleType("some_backend")
    made = flash_attn_functions("reference", prefix="some_", module="some_backend")
    for name, function in zip(NAMES + VARLEN, made, strict=True):
        assert function.__name__ == f"some_{name}" and function.__module__ == "some_backend"
        assert getattr(function, "__qualname__") == f"some_{name}"  # noqa: B009
        setattr(module, function.__name__, function)
    sys.modules["some_backend"] = module
    try:
        for function in made:
            assert pickle.loads(pickle.dumps(function)) is function
    finally:
        del sys.modules["some_backend"]


def inputs(kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 8, heads, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))  # type: ignore[return-value]


OPTIONS: dict[str, Any] = {
    "causal": True,
    "window_size": (5, 0),
    "softmax_scale": 0.4,
    "softcap": 3.0,
    "dropout_p": 0.2,
    "dropout_seed": 5,
    "total_length": 7,
}


def layouts_differ(seed: int) -> list[list[float]]:
    """On each rank: the distance of every plain function from the oracle, and of packed ones from the plain ones."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(2, 8, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 4, 4, 4))
    options = {("scale" if name == "softmax_scale" else name): value for name, value in OPTIONS.items()}
    expected = attention_oracle(q, k, v, dout=dout, **options)
    truth = (expected.out, expected.dq, expected.dk, expected.dv)
    errors = []
    for name, function in zip(NAMES, BATCHED, strict=True):
        call: Any = function
        layout: Any = layout_of(name)
        a, b, c, d = (shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v, dout))
        if "qkvpacked" in name:
            out = call(torch.stack([a, b, c], dim=2), **OPTIONS)
        elif "kvpacked" in name:
            out = call(a, torch.stack([b, c], dim=2), **OPTIONS)
        else:
            out = call(a, b, c, **OPTIONS)
        found = (out, *torch.autograd.grad((out * d).sum(), (a, b, c)))
        wanted = [shard_sequence(x, layout=layout) for x in truth if x is not None]
        errors.append([compare(x, y).max_abs for x, y in zip(found, wanted, strict=True)])
    return errors


def test_every_function_attends_in_its_layout(ranks: RunRanks, seed: int) -> None:
    """Through the dropout mask and the padding as well: all arguments arrive."""
    for errors in ranks(2, layouts_differ, seed):
        for name, error in zip(NAMES, errors, strict=True):
            assert max(error) < 1e-12, name


@pytest.mark.parametrize("family", [0, 3, 6])
def test_packed_forms_are_the_plain_one(family: int) -> None:
    """Bitwise, gradients too; packed in one tensor, strided."""
    plain, kvpacked, qkvpacked = (FUNCTIONS[family + i] for i in range(3))
    qkv = torch.randn(2, 8, 3, 4, 8, requires_grad=True)
    dout = torch.randn(2, 8, 4, 8)
    outs: list[Any] = [
        plain(*qkv.unbind(2), causal=True),
        kvpacked(qkv[:, :, 0], qkv[:, :, 1:], causal=True),
        qkvpacked(qkv, causal=True),
    ]
    results = [(out, *torch.autograd.grad(out, qkv, dout)) for out in outs]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_return_attn_probs() -> None:
    q, k, v = inputs()
    out, lse, nothing = FUNCTIONS.ring_flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected = ring_attention(q, k, v, causal=True, return_lse=True)
    assert nothing is None and torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert lse.shape == (2, 4, 8)
    single = FUNCTIONS.ring_flash_attn_func(q.float(), k.float(), v.float(), return_attn_probs=True)
    assert single[1].dtype == torch.float32
    packed = FUNCTIONS.stripe_flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True, return_attn_probs=True)
    assert torch.equal(packed[1], lse)


def test_positional_arguments_are_those_of_flash_attn() -> None:
    q, k, v = inputs()
    slopes = torch.rand(4)
    positional = FUNCTIONS.ring_flash_attn_func(q, k, v, 0.0, 0.3, True, (4, 0), slopes, False, True, None)
    expected = ring_attention(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(4, 0), alibi_slopes=slopes, return_lse=True
    )
    assert torch.equal(positional[0], expected[0]) and torch.equal(positional[1], expected[1])
    with pytest.raises(TypeError):
        FUNCTIONS.ring_flash_attn_func(q, k, v, 0.0, 0.3, True, (4, 0), slopes, False, True, None, 30.0)  # type: ignore[misc]


def test_the_backend_is_the_one_asked_for() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="there is no backend 'nowhere' here"):
        flash_attn_functions("nowhere").ring_flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_functions(None).ring_flash_attn_func(q, k, v), ring_attention(q, k, v))
