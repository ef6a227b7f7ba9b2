"""RING_CHECK=1 tells ranks apart that do not make the same call."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ring_core import ring_attention
from ring_core.testing.plugin import RunRanks


def attend(lengths: list[int], causal: list[bool]) -> str:
    rank = dist.get_rank()
    x = torch.randn(1, lengths[rank], 2, 8)
    try:
        ring_attention(x, x, x, causal=causal[rank])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "lengths, causal, told",
    [
        ([4, 4, 4], [True, True, True], []),
        ([4, 4, 6], [True, True, True], ["rank 2", "(1, 6, 2, 8)", "(1, 4, 2, 8)", "pad_sequence"]),
        ([4, 4, 4], [True, False, True], ["rank 1", "'right': -1", "'right': 0"]),
    ],
)
def test_a_rank_that_differs_is_named_on_all(
    ranks: RunRanks, lengths: list[int], causal: list[bool], told: list[str]
) -> None:
    for answer in ranks(3, attend, lengths, causal, env={"RING_CHECK": "1"}):
        assert bool(answer) == bool(told)
        assert all(part in answer for part in told), answer
