"""dq over calls that touch any rows of any batch entries in any order."""

from __future__ import annotations

import random

import pytest
import torch

from ring_native.calls import EVERY, Call
from ring_native.gradients import QueryGradient
from ring_native.masks import FULL


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_summed_in_fp32_and_kept_as_they_came_until_then(batch: int, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        length = draw.randint(1, 12)
        q = torch.empty(batch, length, 2, 4, dtype=torch.bfloat16)
        gradient, truth = QueryGradient(q), torch.zeros(q.shape, dtype=torch.float64)
        placed = 0
        for _ in range(draw.randint(0, 6)):
            start = draw.randint(0, length - 1)
            stop = draw.randint(start + 1, length)
            call = Call(draw.choice([EVERY, *range(batch)]), start, stop, 0, 1, FULL)
            dq = torch.randn(truth[call.entries, call.rows].shape).bfloat16()
            untouched = not truth[call.entries, call.rows].any()
            place = gradient.place(call)
            assert (place is not None) == untouched, "a kernel may write where nothing is yet, and only there"
            if place is None:
                gradient.add(call, dq)
            else:
                placed += 1
                place.copy_(dq)
            truth[call.entries, call.rows] += dq.double()
        found = gradient.finish()
        assert found.dtype == torch.bfloat16
        # The sums of a few bf16 numbers are exact in fp32, or nearly, so that one rounding is left.
        torch.testing.assert_close(found.double(), truth, rtol=2**-8, atol=1e-6)
        assert not found[truth == 0].any()


def test_fp64_is_summed_in_place() -> None:
    q = torch.empty(1, 4, 1, 2, dtype=torch.float64)
    gradient = QueryGradient(q)
    one = torch.ones(1, 3, 1, 2, dtype=torch.float64)
    gradient.add(Call(EVERY, 0, 3, 0, 1, FULL), one)
    gradient.add(Call(EVERY, 1, 4, 0, 1, FULL), one * 1e-12)
    assert gradient.finish()[0, :, 0, 0].tolist() == [1.0, 1.0 + 1e-12, 1.0 + 1e-12, 1e-12]
