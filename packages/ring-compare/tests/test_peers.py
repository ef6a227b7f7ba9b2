"""Peers and yardsticks on gloo ranks, or on one rank, with the library replaced where it needs a GPU."""

import sys
from types import ModuleType
from typing import NamedTuple

import compare_fakes
import pytest
import torch

from ring_compare import implementations
from ring_compare.documents import document_lengths
from ring_compare.launch import OwnRanks, run_task
from ring_compare.measure import Task
from ring_compare.peers import ring_flash_attn
from ring_compare.suites import Cell, Suite, Timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TIMING = Timing(warmup_s=0.001, measure_s=0.001, min_samples=2, max_samples=2)


def cell(mask="causal", layout="zigzag", world_size=2, heads=(2, 2), **changes):
    fields = {"schedule": "own", "dtype": "float32", "window_size": (-1, -1), "documents": "", **changes}
    names = (fields["dtype"], mask, fields["window_size"], layout, fields["schedule"], world_size, fields["documents"])
    return Cell(2 if not fields["documents"] else 1, 64, 64, *heads, 16, *names)


class Place(NamedTuple):
    """Ranks on which to run, in a world of their own size."""

    launcher: OwnRanks
    world_size: int


@pytest.fixture(scope="module")
def ranks(request):
    """One pool per world size: pytest brings the tests of a size together."""
    launcher = OwnRanks("cpu")
    yield Place(launcher, request.param)
    launcher.close()


def of_sizes(*sizes):
    return pytest.mark.parametrize("ranks", sizes, indirect=True)


def run(ranks, cells, *names):
    task = Task(Suite("test", "", (), TIMING, 60.0), tuple(cells), names, 0)
    return run_task(ranks.launcher, task, lambda stage: None)


@of_sizes(2, 4)
def test_torch_context_parallel_agrees_with_float64(ranks):
    names = ("torch-cp", "torch-cp[all-to-all]")
    for problem in (cell(world_size=ranks.world_size), cell("full", "contiguous", ranks.world_size)):
        rows = run(ranks, [problem], *names)
        assert [(row.implementation, row.phase) for row in rows] == [(n, p) for n in names for p in ("fwd", "fwd+bwd")]
        assert [row.reason for row in rows] == [""] * 4
        assert rows[0].errors.keys() == {"out"}  # no lse
        assert rows[1].errors.keys() == {"dq", "dk", "dv"}
        assert rows[0].single_provider == "torch"
        assert 0 < rows[0].single_errors["out"]["relative"] < 1e-6


@pytest.mark.parametrize(
    "problem, reason",
    [
        (cell(world_size=1), "several ranks"),
        (cell(heads=(4, 2)), "as many key heads"),
        (cell(layout="stripe"), "compared on zigzag"),
        (cell("full"), "on contiguous chunks when full"),
        (cell("window", window_size=(3, 0)), "causal and full masks"),
    ],
)
def test_what_torch_context_parallel_refuses(problem, reason):
    assert reason in implementations.load("torch-cp").supports(problem, CPU)


def test_options_of_peers_are_checked():
    with pytest.raises(ValueError, match="there are all-gather and all-to-all"):
        implementations.load("torch-cp[ring]")


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A package of the peer's name, whose adapters cannot be imported, as beside current transformers."""
    package = tmp_path / "ring_flash_attn"
    package.mkdir()
    (package / "adapters.py").write_text("raise ImportError('is_flash_attn_greater_or_equal_2_10')")
    functions = "\n".join(
        f"def {name}(q, k, v, causal=False, return_attn_probs=False, group=None, **more):\n"
        f"    calls.append(({name!r}, causal, more))\n    return (q, 'lse', None) if return_attn_probs else q"
        for name in (
            "ring_flash_attn_func",
            "zigzag_ring_flash_attn_func",
            "stripe_flash_attn_func",
            "zigzag_ring_flash_attn_varlen_func",
        )
    )
    text = f"from .adapters import substitute_hf_flash_attn, update_ring_flash_attn_params\ncalls = []\n{functions}\n"
    (package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ring_flash_attn", "ring_flash_attn.adapters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield ring_flash_attn.load_library()
    for name in ("ring_flash_attn", "ring_flash_attn.adapters"):
        sys.modules.pop(name, None)


def test_ring_flash_attn_without_its_adapters(library):
    assert isinstance(sys.modules["ring_flash_attn.adapters"], ModuleType)
    made = implementations.load("ring-flash-attn")
    x = torch.zeros(1, 4, 2, 16)
    for layout, name in (
        ("contiguous", "ring_flash_attn_func"),
        ("zigzag", "zigzag_ring_flash_attn_func"),
        ("stripe", "stripe_flash_attn_func"),
    ):
        assert made.call(x, x, x, cell(layout=layout), None) == (x, "lse")
        assert library.calls[-1] == (name, True, {})
    assert implementations.traits(made).label == "ring-flash-attn"


def test_ring_flash_attn_that_is_not_installed(monkeypatch):
    for name in ("ring_flash_attn", "ring_flash_attn.adapters"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(ring_flash_attn.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ring-compare\[peers\]'"):
        implementations.load("ring-flash-attn")


@pytest.mark.parametrize(
    "name, problem, reason",
    [
        ("ring-flash-attn", cell(dtype="bfloat16"), None),
        ("ring-flash-attn", cell("full", "contiguous", dtype="bfloat16"), None),
        ("ring-flash-attn", cell(), "no float32"),
        ("ring-flash-attn", cell(dtype="bfloat16", world_size=1), "one rank is no ring"),
        ("ring-flash-attn", cell("full", dtype="bfloat16"), "zigzag ring is causal only"),
        ("ring-flash-attn", cell("window", dtype="bfloat16"), "windows to each block"),
        ("ring-flash-attn", cell(dtype="bfloat16", documents="equal4"), None),
        ("ring-flash-attn", cell(dtype="bfloat16", documents="equal32"), "must divide by 4; 32 do not"),
        ("ring-flash-attn", cell(layout="balanced", dtype="bfloat16", documents="equal4"), "only zigzag"),
        ("ring-flash-attn[llama3]", cell(layout="contiguous", dtype="bfloat16", documents="equal32"), None),
        ("ring-flash-attn[llama3]", cell(layout="contiguous", dtype="bfloat16"), "for packed documents"),
    ],
)
def test_what_ring_flash_attn_supports(library, name, problem, reason):
    found = implementations.load(name).supports(problem, CUDA)
    assert found is None if reason is None else reason in found
    assert "CUDA devices only" in implementations.load(name).supports(problem, CPU)


def test_ring_flash_attn_deals_out_every_document(library):
    problem = cell(dtype="bfloat16", documents="equal4")
    made = implementations.load("ring-flash-attn")
    shares = [implementations.traits(made).positions(problem, rank, 64) for rank in range(2)]
    assert shares[0][:8].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert shares[1][8:16].tolist() == [20, 21, 22, 23, 24, 25, 26, 27]
    assert sorted(torch.cat(shares).tolist()) == list(range(64))
    x = torch.zeros(1, 32, 2, 16)
    made.call(x, x, x, cell(dtype="bfloat16", documents="equal4", world_size=1), None)
    name, causal, arguments = library.calls[-1]
    assert (name, causal, arguments["max_seqlen"]) == ("zigzag_ring_flash_attn_varlen_func", True, 16)
    assert arguments["cu_seqlens"].tolist() == [0, 16, 32, 48, 64]


@of_sizes(1, 2, 4)
def test_kernels_alone_compute_the_ranks_share(ranks):
    problem = cell(world_size=ranks.world_size, heads=(4, 2), schedule="ring")
    rows = run(ranks, [problem], "local[reference]", "reference")
    local = [row for row in rows if row.implementation == "local[reference]"]
    assert [row.reason for row in rows] == [""] * 4
    assert [row.cell.schedule for row in local] == ["own"] * 2
    assert local[0].errors.keys() == {"out", "lse"}
    assert local[1].errors.keys() == {"dq"}  # dk, dv are other ranks' too
    assert local[1].samples_ms


@of_sizes(2)
def test_kernels_alone_once_for_every_schedule_and_on_zigzag_only(ranks):
    routes = [cell(schedule="ring"), cell(schedule="gather"), cell(schedule="ring", layout="stripe")]
    rows = run(ranks, routes, "local[reference]")
    assert [(row.cell.layout, row.cell.schedule, row.status) for row in rows] == [
        ("stripe", "own", "skipped"),
        ("stripe", "own", "skipped"),
        ("zigzag", "own", "ok"),
        ("zigzag", "own", "ok"),
    ]


def test_what_gives_less_than_it_says_fails():
    class Mute(compare_fakes.Plain):
        def call(self, q, k, v, problem, group):
            return super().call(q, k, v, problem, group)[0], None

    sys.modules["compare_mute"] = module = ModuleType("compare_mute")
    module.Mute = Mute
    try:
        from ring_compare.measure import CellRun
        from ring_compare.ranks import Ranks

        task = Task(Suite("test", "", (), TIMING, 60.0), (cell(world_size=1),), ("compare_mute:Mute",), 0)
        forward, both = CellRun(task, Ranks(0, 1, CPU), lambda stage: None).run()
    finally:
        del sys.modules["compare_mute"]
    assert (forward.status, forward.reason) == ("failed", "it gives no lse")
    assert both.status == "failed"


def test_document_mixes():
    found = document_lengths("realistic", 32768)
    assert sum(found) == 32768
    assert found == document_lengths("realistic", 32768)
    assert max(found) > 4000
    assert min(found) < 400
    assert 16 < len(found) < 64
    assert document_lengths("equal64", 32768) == (512,) * 64
    with pytest.raises(ValueError, match="32768 tokens are not 3 documents"):
        document_lengths("equal3", 32768)
    with pytest.raises(ValueError, match="unknown mix"):
        document_lengths("books", 64)
