import pytest

from ring_compare.suites import SUITES, Cell, Overrides, check_cell, default_suite, suite_cells


def cells(name, **axes):
    return suite_cells(SUITES[name], Overrides(**axes), all_ranks=4)


@pytest.mark.parametrize("name", SUITES)
def test_cells_are_distinct_and_can_be_cut(name):
    found = cells(name)
    assert len(found) == len(set(found)) > 0
    assert [cell for cell in found if check_cell(cell)] == []
    assert sorted(found, key=lambda cell: cell.world_size) == found  # one set of workers per size


def test_cpu_suite_covers_all_of_its_axes():
    found = cells("cpu")
    assert {cell.world_size for cell in found} == {1, 2, 4}
    for world_size in (2, 4):
        chosen = [cell for cell in found if cell.world_size == world_size and cell.D == 64]
        assert len({(cell.mask, cell.layout, cell.schedule) for cell in chosen}) == 3 * 3 * 2


def test_gpu_suite_is_what_was_asked_for():
    found = cells("gpu")
    assert {(cell.Hq, cell.Hkv, cell.D, cell.dtype) for cell in found} == {(32, 8, 128, "bfloat16")}
    assert {cell.Sq for cell in found} == {8192, 32768}
    assert {cell.mask for cell in found} == {"causal", "full"}
    assert {cell.world_size for cell in found} == {1, 4}  # 4: all that are visible
    assert SUITES["gpu"].limits["reference"].reason


def test_one_rank_has_one_layout_and_schedule():
    found = [cell for cell in cells("cpu", world_sizes=(1,)) if cell.D == 64]
    assert len(found) == 3  # masks
    assert {(cell.layout, cell.schedule) for cell in found} == {("contiguous", "ring")}
    chosen = cells("cpu", world_sizes=(1,), layouts=("stripe",), schedules=("gather",))
    assert {(cell.layout, cell.schedule) for cell in chosen} == {("stripe", "gather")}


def test_overrides_replace_axes():
    found = cells("smoke", layouts=("stripe",), seqlens=(64, 32), dtypes=("bfloat16",), masks=("window",))
    assert {(c.layout, c.dtype, c.mask) for c in found} == {("stripe", "bfloat16", "window")}
    assert {c.Sq for c in found} == {64, 32}
    assert all(c.window_size != (-1, -1) for c in found)
    assert {c.schedule for c in found} == {"ring", "gather"}  # untouched


def test_length_that_does_not_divide_is_named():
    cell = cells("smoke", layouts=("zigzag",), seqlens=(130,))[0]
    assert "130 does not divide into 4" in check_cell(cell)


def test_cell_dict_round_trip():
    cell = cells("cpu", masks=("window",))[0]
    assert Cell.from_dict(cell.to_dict()) == cell


def test_default_suites():
    assert (default_suite("cpu"), default_suite("cuda")) == ("cpu", "gpu")
