import dataclasses
import math

import pytest

from ring_compare.cli import main
from ring_compare.lines import by_problem
from ring_compare.ratios import extra_memory, output_bytes, ratios
from ring_compare.records import Records, Result, environment_row, load, write_row
from ring_compare.report import render
from ring_compare.suites import Cell
from ring_compare.targets import TARGETS, render_targets

CELL = Cell(1, 32768, 32768, 32, 8, 128, "bfloat16", "causal", (-1, -1), "zigzag", "gather", 4)
OWN = dataclasses.replace(CELL, schedule="own")
ENVIRONMENT = {
    "date": "2026-11-21T10:00:00+00:00",
    "revision": "0123456789",
    "command": "ring-compare run",
    "device": {"type": "cuda", "slug": "h200", "names": ["NVIDIA H200"] * 4},
    "versions": {"torch": "2.11.0"},
}
OUTPUTS = (2 * 8192 * 32 + 2 * 8192 * 8) * 128 * 2 + 8192 * 32 * 4  # out, dq, dk, dv; lse


def error(value):
    return {"max_abs": value, "relative": value, "rmse": value, "tolerance": 1.0}


def rows(name, fwd, both, cell=CELL, gib=0.5, off=1.0):
    """Milliseconds forward and of both; `gib` beyond inputs and outputs; `off`: error against one call's."""
    common = {"suite": "rings", "cell": cell, "implementation": name, "provider": "flash-attn"}
    single = {"single_errors": {t: error(1e-3) for t in ("out", "dq", "dk", "dv")}, "single_provider": "flash-attn"}
    peak = int(gib * 2**30) + OUTPUTS
    return [
        Result(**common, phase="fwd", samples_ms=[fwd], errors={"out": error(1e-3), "lse": error(1e-6)}, **single),
        Result(
            **common,
            phase="fwd+bwd",
            samples_ms=[both],
            errors={"dq": error(1e-3 * off), "dk": error(1e-3)},
            peak_memory_bytes=peak,
            **single,
        ),
    ]


def everything(*, native=6.5, off=1.0):
    """Records in which every target but those named is met."""
    found = [
        *rows("ring-flash-attn", 7.40, 26.69, OWN, gib=0.5),
        *rows("native", native, 23.5, gib=0.3, off=off),
        *rows("native", 7.0, 25.0, dataclasses.replace(CELL, schedule="ring"), gib=0.6),
        *rows("native[cudnn]", 5.0, 15.0, gib=0.3),
        *rows("native[fa4]", 3.5, 14.0, gib=0.3),
        *rows("local[native]", 6.4, 22.8, OWN),
        *rows("local[native[fa4]]", 3.4, 13.5, OWN),
    ]
    for mix in ("realistic", "equal64"):
        for layout, native_ms, alone in (("contiguous", 3.0, 2.9), ("balanced", 1.1, 1.0)):
            packed = dataclasses.replace(CELL, documents=mix, layout=layout)
            found += rows("native", native_ms, 3 * native_ms, packed)
            found += rows("local-varlen", alone, 3 * alone, dataclasses.replace(packed, schedule="own"))
    return found


def verdicts(results):
    text, met = render_targets(Records(ENVIRONMENT, results))
    table = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in table}, met


def test_ratios_of_a_line():
    lines = by_problem(everything(off=1.5))[CELL.problem]
    (line,) = [x for x in lines if x.implementation == "native" and x.cell.schedule == "gather"]
    found = ratios(line, lines)
    assert found.speed == pytest.approx({"fwd": 7.40 / 6.5, "fwd+bwd": 26.69 / 23.5})
    assert found.overhead == pytest.approx({"fwd": 6.5 / 6.4, "fwd+bwd": 23.5 / 22.8})
    assert found.memory == pytest.approx(0.6, rel=1e-6)
    assert found.accuracy == pytest.approx(1.5)
    (cudnn,) = [x for x in lines if x.implementation == "native[cudnn]"]
    assert ratios(cudnn, lines).overhead == {"fwd": None, "fwd+bwd": None}  # its kernels alone were not measured


def test_a_nan_is_not_accurate():
    lines = by_problem(rows("native", 1, 2, off=math.nan))[CELL.problem]
    assert math.isnan(ratios(lines[0], lines).accuracy)


def test_outputs_do_not_count_as_extra_memory():
    assert output_bytes(CELL, "fwd+bwd") == OUTPUTS
    assert output_bytes(CELL, "fwd") == 8192 * 32 * (128 * 2 + 4)
    assert extra_memory(rows("native", 1, 2, gib=0.25)[1]) == 2**28


def test_all_targets_met():
    found, met = verdicts(everything())
    assert met
    assert found["flash-attn, 32768 tokens, fwd: speed, × ring-flash-attn zigzag"] == [
        "≥ 1.05",
        "≥ 1.12",
        "1.138 (zigzag · gather)",
        "goal",
    ]
    assert found["cudnn, 32768 tokens, fwd+bwd: speed, × ring-flash-attn zigzag"][3] == "goal"
    assert found["fa4, 8192 tokens per GPU, fwd+bwd: time, × kernels alone"][:4] == [
        "≤ 1.15",
        "≤ 1.05",
        "1.037 (zigzag · gather)",
        "goal",
    ]
    # The fastest layout, though ours comes closer to the kernels where ranks have unequal work.
    packed = found["packed, realistic, 32768 tokens, fwd: throughput, × one varlen call per rank"]
    assert packed[2:] == ["0.909 (balanced · gather)", "pass"]
    assert found["packed, equal64, 32768 tokens, fwd: throughput, × one varlen call per rank"][3] == "told"
    memory = found["flash-attn, 32768 tokens: extra memory, × ring-flash-attn zigzag (its fastest route)"]
    assert memory[2:] == ["0.600 (zigzag · gather)", "goal"]
    assert found["cudnn, 4 ranks, all routes: error, × one call"][2:] == ["1.000 (zigzag · gather at 32768)", "goal"]
    assert {target.what for target in TARGETS} <= found.keys()


def test_a_miss_and_what_was_not_measured():
    found, met = verdicts(everything(native=9.0, off=1.31))
    assert not met
    assert found["flash-attn, 32768 tokens, fwd: speed, × ring-flash-attn zigzag"][3] == "pass"  # the ring route
    assert found["flash-attn, 4 ranks, all routes: error, × one call"][3] == "**miss**"
    results = [r for r in everything() if r.implementation != "native[fa4]"]
    found, met = verdicts(results)
    assert not met
    assert found["fa4, gather, 32768 tokens, fwd: speed, × ring-flash-attn zigzag"][2:] == ["", "not measured"]
    assert not verdicts([])[1]


def test_other_shapes_do_not_count():
    for change in ({"world_size": 2}, {"Hkv": 32}, {"mask": "full"}, {"D": 64}):
        results = [dataclasses.replace(r, cell=dataclasses.replace(r.cell, **change)) for r in everything()]
        found, _ = verdicts(results)
        assert found["flash-attn, 32768 tokens, fwd: speed, × ring-flash-attn zigzag"][3] == "not measured"


def test_peers_stand_beside_what_they_took_before():
    found, _ = verdicts(everything())
    assert found["ring-flash-attn zigzag, 32768 tokens, 32/8, fwd, ms"] == ["7.4", "7.4", ""]
    slow = [*rows("ring-flash-attn", 7.40, 30.0, OWN), *rows("native", 6.5, 23.0)]
    assert verdicts(slow)[0]["ring-flash-attn zigzag, 32768 tokens, 32/8, fwd+bwd, ms"] == ["26.69", "30", "**+12%**"]


def test_report_has_the_ratios():
    text = render(Records(ENVIRONMENT, everything()))
    assert "| native · zigzag · gather | 1.14 / 1.14 | 1.02 / 1.03 | 0.60 | 1.00 |" in text
    assert "| ring-flash-attn · zigzag · own | 1.00 / 1.00 |  | 1.00 | 1.00 |" in text


def test_command(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    with path.open("w") as file:
        write_row(file, environment_row(ENVIRONMENT))
        for result in everything():
            write_row(file, result.to_dict())
    assert [r.cell.documents for r in load(path).results][-1] == "equal64"
    assert main(["targets", str(path)]) == 0
    assert "| flash-attn, 32768 tokens, fwd: speed" in capsys.readouterr().out
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "native[fa4]" not in line))
    assert main(["targets", str(path)]) == 1
