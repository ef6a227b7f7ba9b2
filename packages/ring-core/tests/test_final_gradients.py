"""dk and dv where nothing travels: final as the backend writes them, without buffers in fp32 beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ring_core import autograd, plan_packed, ring_attention, ring_attention_packed
from ring_core.backend import Capabilities, departures_of, names_every_key, register_backend
from ring_core.comm import transport
from ring_core.comm.transport import Keys
from ring_core.plan import PackedProblem, Problem, make_plan
from ring_core.reference import ReferenceBackend
from ring_core.segment import Table
from ring_core.testing import attention_oracle
from ring_core.testing.conformance.tables import keys_of
from ring_core.testing.plugin import RunRanks


class Noted(ReferenceBackend):
    """Notes the dtype of each dk that it is given, and whether that was zeros."""

    name = "noted"

    def __init__(self, final: bool) -> None:
        self.final = final
        self.given: list[tuple[torch.dtype, bool]] = []

    def capabilities(self, device: torch.device) -> Capabilities:
        can = super().capabilities(device)
        return replace(can, flags=False, final_gradients=self.final)

    def backward(
        self, state: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dk: Tensor, *rest: Any, **more: Any
    ) -> None:
        self.given.append((dk.dtype, not dk.any()))
        super().backward(state, q, k, v, dout, dk, *rest, **more)


def noted(final: bool) -> Noted:
    """The backend of that name, from now on."""
    backend = Noted(final)
    register_backend("noted", backend)
    autograd._way.cache_clear()  # which knows the last one of the name
    return backend


def gradients(dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """dq, dk, dv of a call whose first keys nobody sees, and the truth."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 16, dtype=dtype) for length, heads in ((20, 4), (32, 2), (32, 2)))
    dout = torch.randn_like(q)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*given, window_size=(3, 2), backend="noted", **options)
    found = list(torch.autograd.grad(out, given, dout))
    truth = attention_oracle(q, k, v, window_size=(3, 2), dout=dout)
    assert truth.dq is not None and truth.dk is not None and truth.dv is not None
    return found, [truth.dq, truth.dk, truth.dv]


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_buffers_have_the_keys_dtype_where_the_backend_writes_it(dtype: torch.dtype, final: bool) -> None:
    backend = noted(final)
    found, truth = gradients(dtype)
    sums = torch.promote_types(dtype, torch.float32)
    ((given, zeros),) = backend.given
    assert given == (dtype if final else sums)
    assert zeros or (final and dtype != sums), "a backend that adds is given zeros"
    for x, want in zip(found, truth, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(
            x.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=0.02 if dtype.itemsize == 2 else 1e-4
        )
    assert not found[1][:, :9].any() and not found[2][:, :9].any(), "keys before every window"
    assert found[1].untyped_storage().data_ptr() != found[2].untyped_storage().data_ptr()


class Allocations(TorchDispatchMode):
    """Every tensor that an operation returns, and that is as large as dk."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.dtypes = numel, set[torch.dtype]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.dtypes |= {x.dtype for x in tree_leaves(found) if isinstance(x, Tensor) and x.numel() >= self.numel}
        return found


def test_no_buffer_in_fp32() -> None:
    k = torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16)
    plan = make_plan(Problem(8, 8, 8, 8, None, 0, "contiguous", 1), 0, "ring")
    for final, dtypes in ((True, {torch.bfloat16}), (False, {torch.float32, torch.bfloat16})):
        with Allocations(k.numel()) as seen:
            local = transport(plan, None, 4, k, "backward", final_gradients=final)
            homeward = local.gradients(k, zeroed=not local.final_gradients)
            to = homeward.buffers(Keys(0, slice(0, 2), k[None], k[None]))
            dk, dv = homeward.collect()
        assert seen.dtypes == dtypes
        assert local.final_gradients == final and to.dk.dtype == (torch.bfloat16 if final else torch.float32)
        assert (dk.data_ptr() == to.dk.data_ptr()) == (dv.data_ptr() == to.dv.data_ptr()) == final


def test_keys_that_nobody_sees_are_zeros_without_a_call() -> None:
    backend = noted(True)
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 8, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out = ring_attention(q, k, v, total_length=(8, 0), backend="noted")
    filled = lambda shape, **options: torch.full(shape, 7.0, **options)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", filled)  # memory that held something
        found = torch.autograd.grad(out.sum(), (q, k, v))
    assert not backend.given and not any(x.any() for x in found)


def test_packed_documents() -> None:
    backend = noted(True)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(17, 2, 16, dtype=torch.bfloat16) for _ in range(4))
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    cu = [0, 5, 5, 17]
    out = ring_attention_packed(*given, cu, causal=True, backend="noted")
    found = torch.autograd.grad(out, given, dout)
    assert [dtype for dtype, _ in backend.given] == [torch.bfloat16]
    truth = attention_oracle(
        *(x[None] for x in (q, k, v)), cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, dout=dout[None]
    )
    for x, want in zip(found, (truth.dq, truth.dk, truth.dv), strict=True):
        assert want is not None
        torch.testing.assert_close(x.double(), want[0], rtol=0.03, atol=0.02)


def on_ranks(schedule: str, layout: str) -> list[torch.dtype]:
    """What dtypes a rank's backend is given."""
    backend = noted(True)
    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    options: dict[str, Any] = {"schedule": schedule, "layout": layout, "backend": "noted", "group": dist.group.WORLD}
    ring_attention(q, q, q, causal=True, **options).sum().backward()
    found = [dtype for dtype, _ in backend.given]
    backend.given.clear()
    # documents that end where the ranks do: nothing travels
    x = torch.randn(8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    plan = plan_packed([0, 8, 16], causal=True, layout="contiguous", group=dist.group.WORLD)
    ring_attention_packed(x, x, x, plan, backend="noted", group=dist.group.WORLD).sum().backward()
    return [*found, *(dtype for dtype, _ in backend.given)]


@pytest.mark.parametrize(("schedule", "layout"), [("ring", "zigzag"), ("gather", "contiguous")])
def test_only_where_nothing_travels(schedule: str, layout: str, ranks: RunRanks) -> None:
    for found in ranks(2, on_ranks, schedule, layout):
        *travelling, staying = found
        assert travelling and set(travelling) == {torch.float32} and staying == torch.bfloat16


def tables() -> Iterator[tuple[Table, int, int]]:
    """Key-major ones, with pieces and tokens of each."""
    for layout, world, left, total in (
        ("contiguous", 1, None, 48), ("contiguous", 2, 5, 48), ("zigzag", 2, 7, 40), ("stripe", 3, None, 48),
    ):  # fmt: skip
        problem = Problem(48, 48, total, total, left, 0, layout, world)  # type: ignore[arg-type]
        for rank in range(world):
            for step in make_plan(problem, rank, "ring").steps:
                tokens = max((s.k_start + s.k_len for s in step.backward.segments), default=1)
                yield step.backward, 1, max(tokens, 48 // world)
    for cu in ([0, 3, 20, 21, 48], [0, 30, 40]):
        packed = PackedProblem.of(cu, cu, left=None, right=0, layout="contiguous", world_size=1)
        for step in make_plan(packed, 0, "gather").steps:
            yield step.backward, 1, 48


def test_whether_a_table_names_every_key() -> None:
    said = set()
    for table, pieces, tokens in tables():
        named = keys_of(table, 2, torch.zeros(pieces, tokens))
        assert names_every_key(table, pieces, tokens, 2) == bool(named.all())
        assert sum(departures_of(table, pieces, 2, 1)) == int(named.sum()), "a key is in one strip at most"
        said.add(bool(named.all()))
    assert said == {True, False}
