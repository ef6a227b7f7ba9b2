"""Every provider that is available on GPUs: the contract, rings over NCCL, lengths that differ, calls, accuracy.

`pytest packages/ring-native/tests/gpu`; what is not installed is skipped, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ring_core import (
    UnsupportedError,
    join_shards,
    load_backend,
    ring_attention,
    ring_attention_packed,
    shard_sequence,
)
from ring_core.backend import Capabilities, register_backend
from ring_core.interface import attend
from ring_core.testing.conformance import (
    KernelCase,
    PackedCase,
    RingCase,
    check_capture,
    check_kernel_case,
    check_packed_case,
    check_ring_case,
    kernel_cases,
    packed_cases,
    ring_cases,
    run_packed_case,
    run_ring_case,
)
from ring_core.testing.oracle import attention_oracle
from ring_core.testing.plugin import RunRanks
from ring_native import PROVIDERS, NativeBackend
from ring_native.masks import CAUSAL
from ring_native.providers import Provider

pytestmark = pytest.mark.filterwarnings("default")
"""Other people's libraries warn as they like: importing flash-attn-4 does, of what CuTe DSL deprecates."""

NAMES = ("flash-attn", "aten", "cudnn", "fa3", "fa4")
SCALE = 31
"""Lengths of about 2,000 tokens, multiples of nothing."""


def capabilities(name: str) -> Capabilities:
    can = NativeBackend(name).capabilities(torch.device("cuda", torch.cuda.current_device()))
    if not can.available:
        pytest.skip(can.reason)
    return can


@pytest.mark.gpu
def test_some_provider_is_the_default() -> None:
    can = load_backend("native").capabilities(torch.device("cuda", 0))
    assert can.available and can.provider in NAMES


@pytest.mark.gpu
@pytest.mark.parametrize("case", kernel_cases(scale=SCALE), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernel(name: str, case: KernelCase, seed: int) -> None:
    """In bf16 where the case leaves the dtype open; in fp16 too, where it is cheap to ask."""
    can = capabilities(name)
    backend = load_backend(f"native[{name}]")
    check_kernel_case(case, backend, "cuda", seed=seed)
    if case.dtype is None and torch.float16 in can.dtypes and not case.resolved(can).missing(can):
        check_kernel_case(replace(case, dtype=torch.float16), backend, "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", kernel_cases(), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_of_few_tokens(name: str, case: KernelCase, seed: int) -> None:
    """Blocks smaller than any tile, of one row, of one key."""
    capabilities(name)
    check_kernel_case(case, load_backend(f"native[{name}]"), "cuda", seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured(name: str, seed: int) -> None:
    capabilities(name)
    check_capture(f"native[{name}]", seed=seed)


def by_world_size(cases: Sequence[RingCase | PackedCase]) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.multi_gpu(case.world_size), id=str(case)) for case in cases]


@pytest.mark.parametrize("case", by_world_size(packed_cases((1, 2, 4), scale=15)))
@pytest.mark.parametrize("name", NAMES)
def test_packed(name: str, case: PackedCase, ranks: RunRanks, seed: int) -> None:
    capabilities(name)
    backend = f"native[{name}]"
    results = ranks(case.world_size, run_packed_case, case, backend, seed, "cuda")
    check_packed_case(case, backend, results, seed, "cuda")


@pytest.mark.parametrize("case", by_world_size(ring_cases((1, 2, 4), scale=15)))
@pytest.mark.parametrize("name", NAMES)
def test_ring(name: str, case: RingCase, ranks: RunRanks, seed: int) -> None:
    capabilities(name)
    backend = f"native[{name}]"
    results = ranks(case.world_size, run_ring_case, case, backend, seed, "cuda")
    check_ring_case(case, backend, results, seed, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("q_length,k_length", [(300, 1000), (1000, 300), (1, 700), (700, 1), (257, 256), (64, 65)])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "left", "ahead"])
@pytest.mark.parametrize("name", NAMES)
def test_unequal_lengths_align_at_the_ends(name: str, mask: str, q_length: int, k_length: int, seed: int) -> None:
    """Aligned top-left, or with a bound read as none, all of out would be wrong, not a digit of it."""
    options: dict[str, Any] = {
        "full": {},
        "causal": {"causal": True},
        "window": {"window_size": (200, 50)},
        "left": {"window_size": (100, -1)},
        "ahead": {"window_size": (-1, 30)},
    }[mask]
    can = capabilities(name)
    if "window_size" in options and "window" not in can.features:
        pytest.skip(f"{name} has no windows")
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, q_length, 8), (2, k_length, 2), (2, k_length, 2), (2, q_length, 8))
    q, k, v, dout = (torch.randn(*shape, 64, generator=generator).cuda().bfloat16() for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ring_attention(*leaves, backend=f"native[{name}]", return_lse=True, **options)
    truth = attention_oracle(*(x.detach() for x in leaves), dout=dout, **options)
    seen = truth.lse.isfinite()
    assert torch.equal(lse.isfinite().cpu(), seen.cpu())
    assert not out.detach().transpose(1, 2)[~seen.to(out.device)].any(), "rows that see nothing are 0"
    torch.testing.assert_close(lse[seen].double(), truth.lse[seen].to(lse.device), rtol=0, atol=1e-3)
    found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)) | {"out": out}
    for what, value in found.items():
        wanted = getattr(truth, what).to(value.device)
        # Of one key the softmax is constant: dq and dk are 0.
        size = dout.double().norm() if k_length == 1 and what in ("dq", "dk") else wanted.norm()
        error = float((value.detach().double() - wanted).norm() / size)
        assert error < 0.02, f"{what} is {error:.1%} off"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8,), (2, 8)], ids=["head", "batch"])
@pytest.mark.parametrize("q_length,k_length", [(1000, 1000), (300, 1000), (1000, 300), (1, 700), (257, 256)])
@pytest.mark.parametrize("mask", ["full", "causal", "behind", "window", "left", "ahead"])
@pytest.mark.parametrize("name", NAMES)
def test_alibi_on_one_rank(
    name: str, mask: str, q_length: int, k_length: int, shape: tuple[int, ...], seed: int
) -> None:
    """lse among it: what is common to a row is seen nowhere else."""
    options: dict[str, Any] = {
        "full": {},
        "causal": {"causal": True},
        "behind": {"causal": True, "window_size": (200, 0)},
        "window": {"window_size": (200, 50)},
        "left": {"window_size": (100, -1)},
        "ahead": {"window_size": (-1, 30)},
    }[mask]
    if "alibi" not in capabilities(name).features:
        pytest.skip(f"{name} has no slopes")
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, q_length, 8), (2, k_length, 2), (2, k_length, 2), (2, q_length, 8))
    q, k, v, dout = (torch.randn(*shape, 64, generator=generator).cuda().bfloat16() for shape in shapes)
    slopes = torch.rand(shape, generator=generator).cuda() / 2
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if mask == "left" and q_length > k_length + 1:
        with pytest.raises(UnsupportedError, match="see beyond"):
            ring_attention(*leaves, backend=f"native[{name}]", alibi_slopes=slopes, **options)
        return
    out, lse = ring_attention(*leaves, backend=f"native[{name}]", return_lse=True, alibi_slopes=slopes, **options)
    truth = attention_oracle(*(x.detach() for x in leaves), dout=dout, alibi_slopes=slopes, **options)
    seen = truth.lse.isfinite()
    torch.testing.assert_close(lse[seen].double(), truth.lse[seen].to(lse.device), rtol=1e-5, atol=2e-3)
    found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)) | {"out": out}
    for what, value in found.items():
        wanted = getattr(truth, what).to(value.device)
        error = float((value.detach().double() - wanted).norm() / wanted.norm())
        assert error < 0.02, f"{what} is {error:.1%} off"


@pytest.mark.gpu
@pytest.mark.parametrize("cu_k", [None, [0, 90, 91, 211, 211, 900]], ids=["alike", "other-keys"])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("name", NAMES)
def test_alibi_of_packed_documents(name: str, mask: str, cu_k: list[int] | None, seed: int) -> None:
    """One of one token, one without keys, one of more queries than keys."""
    options: dict[str, Any] = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (60, 30)}}[mask]
    if "alibi" not in capabilities(name).features:
        pytest.skip(f"{name} has no slopes")
    cu_q = [0, 50, 51, 230, 260, 900]
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(900, heads, 64, generator=generator).cuda().bfloat16() for heads in (8, 2, 2, 8))
    slopes = torch.rand(8, generator=generator).cuda() / 2
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys = {} if cu_k is None else {"cu_seqlens_k": cu_k}
    backend = f"native[{name}]"
    out, lse = ring_attention_packed(
        *leaves, cu_q, backend=backend, return_lse=True, alibi_slopes=slopes, **keys, **options
    )
    truth = attention_oracle(
        *(x.detach()[None] for x in leaves),
        dout=dout[None],
        alibi_slopes=slopes,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k or cu_q,
        **options,
    )
    seen = truth.lse[0].isfinite()
    torch.testing.assert_close(lse[seen].double(), truth.lse[0][seen].to(lse.device), rtol=1e-5, atol=2e-3)
    found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)) | {"out": out}
    for what, value in found.items():
        wanted = getattr(truth, what)[0].to(value.device)
        error = float((value.detach().double() - wanted).norm() / wanted.norm())
        assert error < 0.02, f"{what} is {error:.1%} off"


def refusal_of_alibi(name: str) -> str:
    q = torch.ones(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(UnsupportedError) as caught:
        ring_attention(q, q, q, alibi_slopes=torch.ones(2, device="cuda"), backend=f"native[{name}]")
    return str(caught.value)


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("name", NAMES)
def test_alibi_on_two_ranks_is_refused(name: str, ranks: RunRanks) -> None:
    capabilities(name)
    for said in ranks(2, refusal_of_alibi, name):
        assert "ring_alibi is not among its features (alibi_slopes on several ranks" in said


class Recording:
    """A provider that notes what it was called for: (phase, Sq, Sk, whether causal)."""

    def __init__(self, inner: Provider) -> None:
        self.inner, self.name = inner, f"recording-{inner.name}"
        self.style, self.varlen, self.capabilities = inner.style, inner.varlen, inner.capabilities
        self.beside = inner.beside
        self.calls: list[tuple[str, int, int, bool]] = []

    def forward(self, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(("forward", q.shape[-3], k.shape[-3], options["mask"] == CAUSAL))
        return self.inner.forward(q, k, *rest, **options)

    def backward(self, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(("backward", q.shape[-3], k.shape[-3], options["mask"] == CAUSAL))
        return self.inner.backward(q, k, *rest, **options)


def count_zigzag(name: str, seed: int) -> list[tuple[str, int, int, bool]]:
    """The calls of a zigzag gather, forward and backward, on this rank, in groups of 2 of 4 key heads."""
    recording = Recording(PROVIDERS[name])
    backend = f"recording-{name}-{seed}"  # a name of its own: ring-core remembers what a name means
    register_backend(backend, NativeBackend(recording))
    generator = torch.Generator().manual_seed(seed)
    whole = (torch.randn(1, 2048, heads, 128, generator=generator).cuda().bfloat16() for heads in (8, 4, 4))
    q, k, v = (shard_sequence(x, layout="zigzag").requires_grad_() for x in whole)
    out, _ = attend(
        q,
        k,
        v,
        causal=True,
        layout="zigzag",
        schedule="gather",
        heads_at_once=2,
        window_size=(-1, -1),
        softmax_scale=None,
        backend=backend,
        group=None,
        total_length=None,
        softcap=0.0,
        alibi_slopes=None,
        sinks=None,
        dropout_p=0.0,
        dropout_seed=None,
        deterministic=False,
    )
    out.backward(torch.ones_like(out))
    return recording.calls


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "cudnn"])
def test_a_zigzag_gather_calls_twice_a_head_group(name: str, ranks: RunRanks, seed: int) -> None:
    capabilities(name)
    half = 256
    for rank, calls in enumerate(ranks(4, count_zigzag, name, seed)):
        a_group = [(half, half * (8 - rank), True), (half, half * (rank + 1), True)]
        if rank == 3:  # whose halves are neighbours
            a_group = [(2 * half, 5 * half, True)]
        for phase in ("forward", "backward"):
            assert [call[1:] for call in calls if call[0] == phase] == 2 * a_group, f"rank {rank}, {phase}"


def one_layout(name: str, layout: Any, schedule: Any, seed: int) -> dict[str, Tensor]:
    """This rank's out, dq, dk, dv."""
    q, k, v, dout = (shard_sequence(x, layout=layout) for x in long_inputs(seed))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ring_attention(*leaves, causal=True, layout=layout, schedule=schedule, backend=f"native[{name}]")
    found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)) | {"out": out}
    assert dist.get_world_size() == 4
    return {what: x.detach().cpu() for what, x in found.items()}


def long_inputs(seed: int) -> list[Tensor]:
    """q, k, v, dout of 4096 tokens, 8 heads on 2."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4096, heads, 128, generator=generator).cuda().bfloat16() for heads in (8, 2, 2, 8)]


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "stripe"])
@pytest.mark.parametrize("schedule", ["ring", "gather"])
@pytest.mark.parametrize("name", NAMES)
def test_a_ring_is_as_exact_as_one_call(name: str, layout: Any, schedule: str, ranks: RunRanks, seed: int) -> None:
    """Error against fp64 at most 1.3 times that of one call of the same kernels on the whole sequence, on one GPU."""
    capabilities(name)
    q, k, v, dout = long_inputs(seed)
    truth = attention_oracle(q, k, v, causal=True, dout=dout)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ring_attention(*leaves, causal=True, backend=f"native[{name}]")
    alone = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)) | {"out": out}
    parts = ranks(4, one_layout, name, layout, schedule, seed)
    for what, value in alone.items():
        wanted = getattr(truth, what).cpu()
        joined = join_shards([part[what] for part in parts], layout=layout)
        ring, single = (float((x.detach().cpu().double() - wanted).norm()) for x in (joined, value))
        assert ring <= 1.3 * single, f"{what}: {ring / single:.2f} times the error of one call"
