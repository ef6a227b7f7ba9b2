"""A backend that can do nothing but whole softmaxes, made to fulfil the whole contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_core.accumulate import Accumulating, accumulating
from ring_core.backend import Capabilities, DeviceTable
from ring_core.merge import merge_
from ring_core.reference import ReferenceBackend
from ring_core.segment import FIRST, LAST
from ring_core.testing import attention_oracle
from ring_core.testing.conformance import KernelCase, check_kernel_case, kernel_cases


class Stateless(ReferenceBackend):
    """Refuses what flash-attn cannot do: a state, and strips of several segments. Leaves what it need not write as
    rubbish."""

    name = "stateless"

    def __init__(self) -> None:
        self.sunk = 0  # rows that began with a sink
        self.calls = 0

    def capabilities(self, device: torch.device) -> Capabilities:
        return replace(super().capabilities(device), accumulate=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Tensor | None,
        table: DeviceTable,
        **rest: Any,
    ) -> None:
        assert state is None, "a backend that cannot accumulate was handed a state"
        assert all(len(strip) == 1 for strip in table.host.grouped), "a strip has several segments"
        assert all(s.flags & FIRST and s.flags & LAST for s in table.host.segments), "a segment is not first and last"
        self.calls += 1
        if rest["params"].sinks is not None:
            self.sunk += sum(s.q_len for s in table.host.segments)
        super().forward(q, k, v, out, lse, None, table, **rest)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_kernel(case: KernelCase, seed: int) -> None:
    check_kernel_case(case, Stateless(), seed=seed)


def test_only_backends_that_need_it_are_wrapped() -> None:
    cpu, reference, stateless = torch.device("cpu"), ReferenceBackend(), Stateless()
    assert accumulating(reference, cpu) is reference
    wrapped = accumulating(stateless, cpu)
    assert isinstance(wrapped, Accumulating)
    assert wrapped.inner is stateless
    assert wrapped.capabilities(cpu).accumulate
    assert wrapped.name == "stateless"


def test_each_row_meets_the_sink_once(seed: int) -> None:
    """Rows that begin in one call with several segments: only the first of them may count the sink."""
    case = next(case for case in kernel_cases() if str(case) == "sinks-contiguous-ring-3")
    inner = Stateless()
    check_kernel_case(case, inner, seed=seed)
    assert inner.sunk == case.q_length  # of all ranks together
    assert inner.calls > case.world_size  # and yet there was something to merge


def test_merge_is_the_softmax_of_both(seed: int) -> None:
    """Against the oracle on the concatenation, with rows that have seen nothing on either side, or on both, holding
    NaN."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator, dtype=torch.float64) for n in (12, 14, 14))
    scale = 30.0  # exponents of hundreds: only differences of lse may be exponentiated
    parts = [attention_oracle(q, k[:, a:b], v[:, a:b], scale=scale) for a, b in ((0, 5), (5, 14))]
    whole = attention_oracle(q, k, v, scale=scale)
    out, block_out = (part.out.clone() for part in parts)
    lse, block_lse = (part.lse.clone() for part in parts)
    for rows, (mine, theirs) in (
        (slice(0, 3), (False, True)),
        (slice(3, 6), (True, False)),
        (slice(6, 8), (False, False)),
    ):
        for seen, (o, m) in zip((mine, theirs), ((out, lse), (block_out, block_lse)), strict=True):
            if not seen:
                o[:, rows], m[:, :, rows] = torch.nan, -torch.inf
    merge_(out, lse, block_out, block_lse)
    torch.testing.assert_close(out[:, :3], parts[1].out[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 3:6], parts[0].out[:, 3:6], rtol=0, atol=0)
    assert (out[:, 6:8] == 0).all()
    assert (lse[:, :, 6:8] == -torch.inf).all()
    torch.testing.assert_close(out[:, 8:], whole.out[:, 8:], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse[:, :, 8:], whole.lse[:, :, 8:], rtol=1e-12, atol=1e-12)
