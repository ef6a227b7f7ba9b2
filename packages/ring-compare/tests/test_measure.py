import math

import compare_fakes
import pytest
import torch

from ring_compare import implementations
from ring_compare.accuracy import Expectation, complaint, difference, gather_results, make_inputs
from ring_compare.measure import CellRun, Task
from ring_compare.memory import peak_memory
from ring_compare.places import layout_positions
from ring_compare.ranks import Ranks
from ring_compare.suites import Cell, Limit, Suite, Timing
from ring_compare.timing import sample_interleaved

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
TIMING = Timing(warmup_s=0.001, measure_s=0.001, min_samples=2, max_samples=3)
MASKS = [("full", (-1, -1)), ("causal", (-1, -1)), ("window", (5, 0)), ("window", (2, 3))]


def cell(mask="causal", window_size=(-1, -1), dtype="float32"):
    return Cell(2, 32, 32, 4, 2, 16, dtype, mask, window_size, "zigzag", "ring", 1)


def run(*names, limits=None):
    stages = []
    suite = Suite("test", "", (), TIMING, 60.0, limits or {})
    task = Task(suite, (cell(),), tuple(f"compare_fakes:{name}" for name in names), 7)
    rows = CellRun(task, ALONE, stages.append).run()
    return {(row.implementation, row.phase): row for row in rows}, stages


@pytest.mark.parametrize("mask, window_size", MASKS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_plain_attention_is_within_tolerance(mask, window_size, dtype):
    problem = cell(mask, window_size, dtype)
    inputs = make_inputs(problem, 0, CPU)
    expected = Expectation(problem, inputs, ALONE)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = compare_fakes.Plain().call(q, k, v, problem, None)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout)
    results = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
    errors = expected.errors(gather_results(results, problem, ALONE, layout_positions))
    assert complaint(errors) == ""
    results["dk"] = dk * 1.02
    errors = expected.errors(gather_results(results, problem, ALONE, layout_positions))
    assert complaint(errors).startswith("dk relative error 0.0")


def test_inputs_depend_on_the_seed_only():
    first, again, other = (make_inputs(cell(), seed, CPU) for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.dout, again.dout)
    assert not torch.equal(first.q, other.q)


def test_difference_of_infinities_and_nan():
    def heads(lse):
        zero = torch.zeros(1, 2, 1, 1)
        results = {"out": zero, "dq": zero, "dk": zero, "dv": zero, "lse": torch.tensor([[lse]])}
        two = Cell(1, 2, 2, 1, 1, 1, *("float32", "full", (-1, -1), "zigzag", "ring", 1))
        return gather_results(results, two, ALONE, layout_positions)

    nothing = heads([-math.inf, 1.0])
    assert difference(nothing, nothing, ALONE)["lse"]["max_abs"] == 0.0
    assert difference(heads([-math.inf, 1.5]), nothing, ALONE)["lse"]["relative"] == 0.5
    table = difference(heads([math.nan, 1.0]), nothing, ALONE)
    assert all(math.isnan(value) for value in table["lse"].values())
    assert complaint({"lse": {**table["lse"], "tolerance": 1.0}}).startswith("lse relative error nan")
    assert difference(heads([0.0, 1.0]), nothing, ALONE)["lse"]["relative"] == math.inf


def test_rows_of_one_cell():
    rows, stages = run("Native", "Plain", "Wrong", "NotANumber", "Picky", "Unsupported")
    for phase, tensors in (("fwd", {"out", "lse"}), ("fwd+bwd", {"dq", "dk", "dv"})):
        native, plain = rows["native", phase], rows["plain[torch]", phase]
        assert (native.provider, native.status, native.native_errors) == ("flash-attn", "ok", {})
        assert plain.status == "ok"
        assert plain.errors.keys() == plain.native_errors.keys() == tensors
        assert max(table["max_abs"] for table in plain.native_errors.values()) == 0.0  # the same computation
        assert 2 <= len(plain.samples_ms) <= 3
        assert plain.memory_method
        for label in ("wrong[torch]", "nan[torch]"):
            assert rows[label, phase].status == "failed"
            assert rows[label, phase].samples_ms == []  # a wrong result has no speed
        assert (rows["picky[torch]", phase].status, rows["picky[torch]", phase].reason) == (
            "skipped",
            "only on Sundays",
        )
        assert rows["unsupported[torch]", phase].status == "skipped"
    assert rows["unsupported[torch]", "fwd"].reason.startswith("no causal masks here")
    assert "out relative error 0.01" in rows["wrong[torch]", "fwd"].reason
    assert [stage.number for stage in stages] == list(range(len(stages)))


def test_missing_library_is_no_failure():
    task = Task(Suite("test", "", (), TIMING, 60.0), (cell(),), ("no_such_module:Thing",), 7)
    rows = CellRun(task, ALONE, lambda stage: None).run()
    assert [row.status for row in rows] == ["skipped"] * 2
    assert "cannot be imported: No module named 'no_such_module'" in rows[0].reason


def test_token_limit_of_a_suite():
    rows, _ = run("Plain", limits={"plain": Limit(16, "it is slow")})
    assert {row.status for row in rows.values()} == {"skipped"}
    assert rows["plain[torch]", "fwd"].reason == "limited to 16 tokens in this suite: it is slow"


def test_samples_are_interleaved():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timing = Timing(warmup_s=0.0, measure_s=10.0, min_samples=1, max_samples=4)
    samples = sample_interleaved(calls, timing, ALONE, lambda name, step: None)
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4}
    rounds = ["".join(order[-8:][start : start + 2]) for start in range(0, 8, 2)]
    assert set(rounds) == {"ab", "ba"}, "each round has all, and no fixed order"


def test_peak_memory_on_the_cpu():
    with peak_memory(CPU, 0) as peak:
        torch.ones(2**24)  # 64 MiB, gone at once
    if peak.bytes is None:
        assert peak.method.startswith("n/a")  # say so rather than invent a figure
    else:
        assert 60 * 2**20 < peak.bytes < 100 * 2**20


def test_names_of_implementations():
    assert implementations.display_name("native", "flash-attn") == "native"
    assert implementations.display_name("native", "aten") == "native[aten]"
    assert implementations.display_name("native[fa4]", "fa4") == "native[fa4]"
    assert implementations.display_name("native[flash-attn]", "flash-attn") == "native"
    assert implementations.split_option("local[native[fa4]]") == ("local", "native[fa4]")
    assert implementations.display_name("triton", "") == "triton"
    assert "reference" in implementations.installed_names()
    with pytest.raises(ValueError, match=r"unknown implementation 'nothing'; installed: .*reference"):
        implementations.load("nothing")
    with pytest.raises(TypeError, match="needs name"):
        implementations.load("builtins:dict")


def test_every_installed_backend_says_what_it_supports():
    made = implementations.load("reference")
    assert made.supports(cell(), CPU) is None
    assert made.provider(CPU) == ""
