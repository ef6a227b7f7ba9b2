"""Which provider runs and what it is called for; what is refused; what the package promises."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from native_fakes import FAKES, Fake, fa4_like, flash_attn_like
from torch import Tensor

import ring_native
from ring_core import UnsupportedError, load_backend, ring_attention
from ring_core.backend import Backend, DeviceTable, Params, on_device
from ring_core.plan import GatherPlan, Problem, make_plan
from ring_core.segment import COLUMNS, FIRST, LAST, Segment, Table
from ring_core.testing import compare
from ring_core.testing.oracle import attention_oracle
from ring_native import PROVIDERS, NativeBackend
from ring_native.masks import CAUSAL, FULL, Mask
from ring_native.providers.single_key import single_key, single_key_backward

CPU = torch.device("cpu")


def table(segments: list[Segment]) -> DeviceTable:
    rows = np.array(segments, np.int32).reshape(-1, len(COLUMNS))
    return on_device(Table(rows, np.arange(len(rows) + 1, dtype=np.int32)), CPU)


def block(q: tuple[int, int], k: tuple[int, int], upper: int | None = None, batch: int = -1) -> Segment:
    """Queries and keys (start, stop) of one piece, causal with `upper`, all at once."""
    q_len, k_len = q[1] - q[0], k[1] - k[0]
    return Segment(q[0], q_len, 0, k[0], k_len, -q_len, k_len if upper is None else upper, 0, 0, 1, batch, FIRST | LAST)


def inputs(seed: int, q_length: int, k_length: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, dout with 4 heads on 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, q_length, 4, 16), *[(batch, k_length, 2, 16)] * 2, (batch, q_length, 4, 16)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(fake: Any, x: list[Tensor], tables: list[tuple[DeviceTable, DeviceTable]]) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of calls of forward, then of backward, on the keys as one piece."""
    q, k, v, dout = x
    backend: Backend = NativeBackend(fake)
    params = Params(0.3)
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan, dtype=sums)
    state = torch.full(q.shape, torch.nan, dtype=sums)
    for forward, _ in tables:
        backend.forward(q, k[None], v[None], out, lse, state, forward, params=params)
    dk, dv = torch.zeros(2, *k.shape, dtype=sums)
    kept = backend.prepare(q, k.shape, out, dout, lse, None, params=params)
    for _, backward in tables:
        backend.backward(kept, q, k[None], v[None], dout, dk[None], dv[None], backward, params=params)
    dq, _ = backend.finish(kept, params=params)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def phases(fake: Fake, phase: str) -> list[tuple[int, int, Mask, int]]:
    return [call[1:] for call in fake.calls if call[0] == phase]


# --- which kernels


def test_the_provider_is_visible() -> None:
    backend = load_backend("native")
    assert backend.name == "native"
    assert backend.capabilities(CPU).provider == "cpu"
    assert load_backend("native[cpu]").name == "native[cpu]"
    functions = ring_native.flash_attn_functions("fa4")
    assert functions.ring_flash_attn_func.__module__ == "ring_native"
    assert ring_native.ring_flash_attn_func.__name__ == "ring_flash_attn_func"


def test_an_unknown_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"provider='fa9'.*there are 'flash-attn', 'aten', 'cudnn', 'fa3', 'fa4', 'cpu'"
    ):
        NativeBackend("fa9")
    with pytest.raises(ValueError, match="'flash-attn'"):
        load_backend("native[fa9]")
    monkeypatch.setenv("RING_NATIVE_PROVIDER", "fa9")
    with pytest.raises(ValueError, match="RING_NATIVE_PROVIDER='fa9'"):
        NativeBackend()


def test_the_environment_names_the_default_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RING_NATIVE_PROVIDER", "cudnn")
    backend = NativeBackend()
    assert backend.provider(torch.device("cuda", 0)).name == "cudnn"
    assert backend.provider(CPU).name == "cpu"
    assert NativeBackend("fa4").provider(torch.device("cuda", 0)).name == "fa4"


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu" and not name.startswith("fake")])
def test_what_is_missing_is_said(name: str) -> None:
    can = NativeBackend(name).capabilities(CPU)
    assert not can.available and repr(name) in can.reason and "CUDA" in can.reason
    q = torch.randn(1, 4, 2, 32)
    with pytest.raises(UnsupportedError, match=rf"native\[{name}\].*CUDA"):
        ring_attention(q, q, q, backend=f"native[{name}]")


def test_import_needs_no_provider() -> None:
    """Nor does it import one."""
    code = (
        "import sys, ring_native; ring_native.NativeBackend();"
        "assert not {'flash_attn', 'flash_attn_interface', 'triton'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})


# --- what is refused


@pytest.mark.parametrize(
    ("option", "feature"),
    [
        ({"dropout_p": 0.1}, "dropout"),
        ({"softcap": 1.0}, "softcap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"alibi_slopes": torch.ones(4)}, "alibi"),
    ],
)
def test_what_the_kernel_lacks_is_refused(option: dict[str, Any], feature: str) -> None:
    q, k, v, _ = inputs(0, 8, 8, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=f"'native'.*{feature}.*reference"):
        ring_attention(q, k, v, backend="native", **option)


def test_a_gradient_of_lse_is_refused_in_backward() -> None:
    q, k, v, _ = inputs(0, 8, 8, dtype=torch.float32)
    out, lse = ring_attention(q.requires_grad_(), k, v, backend="native", return_lse=True)
    torch.autograd.backward(out.sum(), retain_graph=True)
    with pytest.raises(UnsupportedError, match=r"'native'.*lse_grad"):
        torch.autograd.backward(lse.sum())


def test_a_window_is_no_mask_of_cudnn() -> None:
    q, k, v, _ = inputs(0, 8, 8, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"fake-cudnn.*window"):
        ring_attention(q, k, v, causal=True, window_size=(2, 0), backend="native[fake-cudnn]")


# --- what kernels are called for


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_zigzag_gather_calls_twice(batch: int, rank: int, seed: int) -> None:
    """And nothing is merged: every row is written once, where it belongs; pieces that collapse are not copied."""
    plan = make_plan(Problem(64, 64, 64, 64, None, 0, "zigzag", 4), rank, "gather")
    assert isinstance(plan, GatherPlan)
    fake = flash_attn_like()
    q, _, _, dout = inputs(seed, 16, 16, batch)
    joined = torch.randn(2, batch, plan.piece_count * plan.piece_length, 2, 16, dtype=torch.float64)
    k, v = (x.unflatten(1, (plan.piece_count, plan.piece_length)).transpose(0, 1) for x in joined)
    out, lse = torch.empty_like(q), torch.empty(batch, 4, 16, dtype=torch.float64)
    backend, params = NativeBackend(fake), Params(0.25)
    (step,) = plan.steps
    backend.forward(q, k, v, out, lse, None, on_device(step.forward, CPU), params=params)
    expected = [(8, 8 * (8 - rank), CAUSAL, 0), (8, 8 * (rank + 1), CAUSAL, 0)]  # the longer one first
    assert phases(fake, "forward") == expected
    state = backend.prepare(q, torch.Size((batch, 16, 2, 16)), out, dout, lse, None, params=params)
    dk, dv = (torch.zeros_like(x).unflatten(1, k.shape[:3:2]).transpose(0, 1) for x in joined)
    backend.backward(state, q, k, v, dout, dk, dv, on_device(step.backward, CPU), params=params)
    assert phases(fake, "backward") == expected
    for number, keys in enumerate((8 * (rank + 1), 8 * (8 - rank))):
        rows = slice(8 * number, 8 * number + 8)
        truth = attention_oracle(q[:, rows], *(x[:, :keys] for x in joined), causal=True, scale=0.25)
        torch.testing.assert_close(out[:, rows], truth.out, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse[:, :, rows], truth.lse, rtol=1e-10, atol=1e-12)


def test_packed_documents_are_one_call(seed: int) -> None:
    """Short, of one token, causal all: forward and backward, as long as they lie one after the other."""
    lengths = [5, 1, 1, 7, 3, 1, 12]
    edges = np.cumsum([0, *lengths]).tolist()
    segments = [block((a, b), (a, b), upper=0) for a, b in pairwise(edges)]
    fake = flash_attn_like()
    x = inputs(seed, edges[-1], edges[-1])
    found = run(fake, x, [(table(segments), table(segments))])
    assert phases(fake, "forward") == phases(fake, "backward") == [(30, 30, CAUSAL, len(lengths))]
    truth = attention_oracle(
        *x[:3], causal=True, scale=0.3, dout=x[3], cu_seqlens_q=edges, cu_seqlens_k=edges, total_length=None
    )
    for name, value in found.items():
        torch.testing.assert_close(value, getattr(truth, name), rtol=1e-10, atol=1e-12)


def test_documents_that_share_keys_are_not_one_backward_call(seed: int) -> None:
    """Kernels write dk and dv, they do not add."""
    segments = [block((0, 4), (0, 6)), block((4, 8), (0, 6), upper=1), block((8, 12), (6, 9), upper=0)]
    fake = flash_attn_like()
    x = inputs(seed, 12, 9)
    found = run(fake, x, [(table(segments), table(segments))])
    for _, _, k_len, _, count in fake.calls:
        assert k_len <= 9 and count <= 2
    whole = run("cpu", x, [(table(segments), table(segments))])
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-11)


def test_documents_of_several_entries_are_calls_of_their_own(seed: int) -> None:
    """With B > 1 keys of two entries do not lie one after the other."""
    segments = [block((0, 6), (0, 6), 0, batch=0), block((6, 9), (6, 9), 0, batch=0), block((0, 9), (0, 9), 0, batch=1)]
    fake = flash_attn_like()
    run(fake, inputs(seed, 9, 9, batch=2), [(table(segments), table(segments))])
    assert phases(fake, "forward") == [(9, 9, CAUSAL, 2), (9, 9, CAUSAL, 0)]


def test_dq_is_summed_in_fp32(seed: int) -> None:
    """bf16 contributions of two calls, where bf16 sums would be seen; rows of one call keep what it wrote."""
    x = inputs(seed, 8, 12, dtype=torch.bfloat16)
    first, second = block((0, 8), (0, 6)), block((0, 4), (6, 12))
    nothing = block((4, 8), (0, 0))  # in which the other rows end
    tables = [
        (table([first._replace(flags=FIRST)]), table([first])),
        (table([second._replace(flags=LAST), nothing._replace(flags=LAST)]), table([second])),
    ]
    fake = fa4_like()
    found = run(fake, x, tables)
    backend, params = NativeBackend(fake), Params(0.3)
    parts = []
    for _, backward in tables:
        state = backend.prepare(x[0], x[1].shape, found["out"], x[3], found["lse"], None, params=params)
        dk, dv = torch.zeros(2, 1, *x[1].shape)
        backend.backward(state, x[0], x[1][None], x[2][None], x[3], dk, dv, backward, params=params)
        parts.append(backend.finish(state, params=params)[0])
    assert torch.equal(found["dq"][:, :4], (parts[0][:, :4].float() + parts[1][:, :4].float()).bfloat16())
    assert torch.equal(found["dq"][:, 4:], parts[0][:, 4:])
    assert not parts[1][:, 4:].any()


@pytest.mark.parametrize("name", FAKES)
def test_final_gradients_are_rounded_once(name: str, seed: int) -> None:
    """dk and dv in bf16 are those in fp32, rounded, also of keys that three calls see or none."""
    q, k, v, dout = inputs(seed, 12, 9, dtype=torch.bfloat16)
    alone = [block((0, 6), (1, 7))]
    shared = [block((0, 4), (0, 6)), block((4, 8), (0, 4)), block((8, 12), (3, 8))]
    for segments, calls in ((alone, 1), (shared, 3)):
        fake = FAKES[name]()
        backend, params = NativeBackend(fake), Params(0.3)
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            state = backend.prepare(q, k.shape, q, dout, torch.full((1, 4, 12), 2.0), None, params=params)
            dk, dv = (torch.full(k[None].shape, torch.nan, dtype=dtype) for _ in range(2))
            backend.backward(state, q, k[None], v[None], dout, dk, dv, table(segments), params=params)
            found.append((dk, dv))
        if isinstance(fake, Fake):
            assert len(fake.calls) == 2 * calls
        for wide, final in zip(*found, strict=True):
            assert wide.any() and not wide[0, :, 8:].any()
            assert torch.equal(final, wide.bfloat16())


@pytest.mark.parametrize("writes", [True, False])
def test_a_kernel_writes_dk_and_dv_where_they_stay(writes: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = inputs(seed, 16, 14, dtype=torch.bfloat16)
    fake = flash_attn_like()
    fake.writes = writes
    given: list[tuple[Tensor, Tensor] | None] = []
    kernel = fake.backward

    def backward(*args: Any, **options: Any) -> Any:
        given.append(args[8])
        return kernel(*args, **options)

    monkeypatch.setattr(fake, "backward", backward)
    native, params = NativeBackend(fake), Params(0.3)
    state = native.prepare(q, k.shape, q, dout, torch.zeros(1, 4, 16), None, params=params)
    dk, dv = (torch.full(k[None].shape, torch.nan, dtype=k.dtype) for _ in range(2))
    native.backward(state, q, k[None], v[None], dout, dk, dv, table([block((0, 16), (2, 9))]), params=params)
    (into,) = given
    assert into is not None and [x.data_ptr() for x in into] == [x[:, :, 2:].data_ptr() for x in (dk, dv)]
    for x in (dk, dv):
        assert x[0, 0, 2:9].any() and x.isfinite().all() and not x[0, 0, :2].any() and not x[0, 0, 9:].any()


@pytest.mark.parametrize("name", ["flash-attn", "cudnn", "aten"])
@pytest.mark.parametrize("q_length,k_length", [(7, 12), (12, 7), (5, 5), (1, 9), (9, 1)])
def test_unequal_lengths_align_at_the_ends(name: str, q_length: int, k_length: int, seed: int) -> None:
    q, k, v, dout = inputs(seed, q_length, k_length, batch=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ring_attention(*leaves, causal=True, backend=f"native[fake-{name}]")
    truth = attention_oracle(q.detach(), k.detach(), v.detach(), causal=True, dout=dout)
    torch.testing.assert_close(out, truth.out, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(out, leaves, dout), (truth.dq, truth.dk, truth.dv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_single_key(seed: int) -> None:
    """The closed form, as one of two blocks of a row."""
    q, k, v, dout = inputs(seed, 6, 4, batch=2)
    whole = attention_oracle(q, k, v, scale=0.3, dout=dout)
    assert whole.dk is not None and whole.dv is not None
    part = attention_oracle(q, k[:, :1], v[:, :1], scale=0.3)
    out, lse = single_key(q, k[:, :1], v[:, :1], 0.3)
    torch.testing.assert_close(out, part.out)
    torch.testing.assert_close(lse, part.lse)
    _, dk, dv = single_key_backward(q, k[:, :1], v[:, :1], whole.out, dout, whole.lse, 0.3)
    torch.testing.assert_close(dk, whole.dk[:, :1])
    torch.testing.assert_close(dv, whole.dv[:, :1])
    parts = [
        single_key_backward(q, k[:, n : n + 1], v[:, n : n + 1], whole.out, dout, whole.lse, 0.3)[0] for n in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole.dq)


def test_every_stand_in_is_for_a_provider() -> None:
    for name, make in FAKES.items():
        assert (PROVIDERS[name].style, PROVIDERS[name].varlen) == (make().style, make().varlen)


def test_a_step_with_full_keys_has_no_mask() -> None:
    fake = flash_attn_like()
    run(fake, inputs(0, 9, 4), [(table([block((0, 9), (0, 4))]), table([block((0, 9), (0, 4))]))])
    assert phases(fake, "forward") == [(9, 4, FULL, 0)]


def test_the_provider_in_use_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = NativeBackend()
    with caplog.at_level("INFO", logger="ring_native"):
        for _ in range(2):
            backend.capabilities(CPU)
    assert caplog.messages == ["native on cpu: the kernels of cpu"]


def test_a_default_device_is_for_users() -> None:
    """Masks of the CPU's kernels are where the tensors are."""
    q, k, v, _ = inputs(3, 12, 12, dtype=torch.float32)
    options: dict[str, Any] = {"window_size": (2, 1), "backend": "native"}
    want = ring_attention(q, k, v, **options)
    with torch.device("meta"):
        assert torch.equal(ring_attention(q, k, v, **options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-0.25, 0.0])
def test_scales_that_are_not_positive(scale: float, dtype: torch.dtype) -> None:
    """Kernels hide keys by -inf before they multiply."""
    q, k, v, dout = inputs(4, 64, 64, dtype=dtype)
    truth = attention_oracle(q, k, v, causal=True, scale=scale, dout=dout)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ring_attention(*leaves, causal=True, softmax_scale=scale, backend="native")
    found = (out, *torch.autograd.grad(out, leaves, dout))
    for name, got in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert compare(got, getattr(truth, name)).rmse < (1e-5 if dtype == torch.float32 else 2e-2), name
