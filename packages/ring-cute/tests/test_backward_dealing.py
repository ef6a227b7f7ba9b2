"""How a group's query heads are dealt out over clusters, on a GPU of 132 processors."""

from __future__ import annotations

import pytest
import torch

from ring_core.backend import on_device
from ring_core.testing.direct import causal_keys
from ring_cute.hopper import backward_launch
from ring_cute.hopper.backward_launch import Dealing, schedule_for
from ring_cute.hopper.backward_settings import backward_settings_for, tile_keys_of

DIM = 128


@pytest.fixture(autouse=True)
def _processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_launch, "_processors", lambda device: 132)


def dealt_out(heads: tuple[int, int], length: int, batch: int, *, causal: bool, whole: bool = False) -> Dealing:
    settings = backward_settings_for(DIM)
    table = on_device(causal_keys(length, length, causal=causal), torch.device("cpu"))
    prepared = schedule_for(table, batch, tile_keys_of(DIM, settings), settings.block, False, False)
    q = torch.empty(batch, length, heads[0], DIM, device="meta")
    return backward_launch._dealt_out(prepared, q, heads[1], settings.cluster, whole=whole)


def test_a_small_call_is_divided_until_every_processor_has_two_tiles() -> None:
    assert dealt_out((8, 2), 4096, 1, causal=True).parts == 4  # of 64 tiles
    assert dealt_out((8, 2), 512, 1, causal=True).parts == 4  # more there are not
    assert dealt_out((8, 8), 512, 1, causal=True).parts == 1


@pytest.mark.parametrize(("length", "batch"), [(4096, 4), (16384, 1), (32768, 1)])
def test_a_large_group_is_divided_where_its_rows_do_not_stay_in_the_l2(length: int, batch: int) -> None:
    assert dealt_out((64, 8), length, batch, causal=True).parts == 2
    assert dealt_out((64, 8), length, batch, causal=False).parts == 1
    assert dealt_out((32, 8), length, batch, causal=True).parts == 1


def test_nothing_is_divided_where_order_or_counts_matter() -> None:
    assert dealt_out((64, 8), 16384, 1, causal=True, whole=True) == Dealing(1, 8, 4)


def test_parts_make_up_the_group() -> None:
    for heads in ((12, 2), (24, 2), (14, 2)):
        found = dealt_out(heads, 8192, 1, causal=True)
        assert found.parts * found.members == heads[0] // heads[1]
