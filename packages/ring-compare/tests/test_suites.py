import dataclasses

import pytest

from ring_compare.implementations import known
from ring_compare.suites import LAYOUTS, SUITES, Cell, Overrides, by_problem, check_cell, default_suite, suite_cells


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
    for cell in (cells("cpu", masks=("window",))[0], cells("packed")[0]):
        assert Cell.from_dict(cell.to_dict()) == cell


def test_rings_suite_is_what_was_asked_for():
    found = cells("rings")
    routes = {(c.layout, c.schedule) for c in found if (c.world_size, c.Sq, c.Hkv) == (4, 32768, 8)}
    assert routes == {("zigzag", "auto"), *((x, y) for x in LAYOUTS for y in ("ring", "gather"))}
    assert {(c.world_size, c.Sq) for c in found if c.Hkv == 8} == {(w, s) for w in (1, 2, 4) for s in (8192, 32768)}
    assert {(c.Hq, c.world_size) for c in found if c.Hkv == 32} == {(32, 4)}  # for torch's context_parallel
    assert {"native[fa4]", "local[native[fa4]]", "ring-flash-attn", "torch-cp"} <= set(SUITES["rings"].implementations)
    backends = ("native", "triton", "cute", "local[")
    assert all(known(name) or name.startswith(backends) for name in SUITES["rings"].implementations)


def test_both_of_our_own_kernels_are_compared_wherever_one_is():
    for suite in SUITES.values():
        names = set(suite.implementations)
        assert {name.replace("triton", "cute") for name in names if "triton" in name and "triton[" not in name} <= names
        if suite.name in ("rings", "packed", "kernels", "kernels-64", "kernels-wide", "steps"):
            assert any("cute" in name for name in names), suite.name


def test_packed_suite_is_what_was_asked_for():
    found = cells("packed")
    assert {c.documents for c in found} == {"realistic", "equal64"}
    assert {c.layout for c in found} == {"contiguous", "zigzag", "balanced"}
    assert {(c.Sq, c.world_size) for c in found} == {(32768, 4)}
    assert cells("packed", layouts=("stripe",)) == []
    assert "equal64 documents" in found[-1].title


def test_problems_stand_together():
    problems = by_problem(cells("rings"))
    assert [cell for problem in problems for cell in problem] == cells("rings")
    assert len({problem[0].problem for problem in problems}) == len(problems)


def test_layouts_of_documents_and_of_sequences():
    assert "no layout balanced of one sequence" in check_cell(dataclasses.replace(cells("smoke")[0], layout="balanced"))
    packed = cells("packed")[0]
    assert "no layout stripe of packed documents" in check_cell(dataclasses.replace(packed, layout="stripe"))
    assert "batch of 1" in check_cell(dataclasses.replace(packed, B=2))


def test_default_suites():
    assert (default_suite("cpu"), default_suite("cuda")) == ("cpu", "gpu")
