import dataclasses
import importlib.util
import sys

import pytest

from ring_compare import plots
from ring_compare.cli import main
from ring_compare.records import RecordError, Records, Result, environment_row, write_row
from ring_compare.report import COLUMNS, merge, render
from ring_compare.suites import Cell

CELL = Cell(1, 8192, 8192, 32, 8, 128, "bfloat16", "causal", (-1, -1), "zigzag", "gather", 4)
ENVIRONMENT = {
    "date": "2026-11-21T10:00:00+00:00",
    "revision": "0123456789",
    "command": "ring-compare run",
    "device": {"type": "cuda", "slug": "h200", "names": ["NVIDIA H200"] * 4},
    "cpu": {"name": "some CPU", "count": 64},
    "versions": {"torch": "2.11.0"},
    "nvidia_smi": [{"index": "0", "driver_version": "580", "clocks.sm": "1980", "power.limit": "700.00"}],
}


def error(value):
    return {"max_abs": value, "relative": value / 10, "rmse": value / 100, "tolerance": 1.0}


def rows(implementation, provider, milliseconds, **changes):
    """Forward and forward-and-backward of one implementation."""
    common = {"suite": "gpu", "cell": CELL, "implementation": implementation, "provider": provider, "status": "ok"}
    pair = [
        Result(**common, phase="fwd", samples_ms=[milliseconds], errors={"out": error(0.01), "lse": error(0.002)}),
        Result(
            **common,
            phase="fwd+bwd",
            samples_ms=[4 * milliseconds],
            errors={"dq": error(0.03), "dk": error(0.05), "dv": error(0.04)},
            peak_memory_bytes=3 * 2**29,
        ),
    ]
    return [dataclasses.replace(row, **changes) for row in pair]


def table_row(text, name):
    """The cells of the first line that belongs to an implementation on CELL."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} · zigzag · gather |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_columns_are_those_of_the_issue():
    text = render(Records(ENVIRONMENT, rows("triton", "", 0.5)))
    header = (
        "| implementation | out max err | out RMSE | lse max err | grad max err | fwd iter/s | fwd+bwd iter/s "
        "| vs native % | peak memory |"
    )
    assert header in text.splitlines()
    assert len(COLUMNS) == 9


def test_numbers():
    triton = rows("triton", "", 0.25, latency_ms=[0.2, 0.3, 0.4], host_ms=[0.1, 0.1, 0.2])
    text = render(Records(ENVIRONMENT, [*rows("native", "flash-attn", 0.5), *triton]))
    expected = ["0.01", "0.0001", "0.002", "0.05", "4,000", "1,000", "200 / 200", "1.500 GiB"]
    assert table_row(text, "triton") == ["triton · zigzag · gather", *expected]
    assert table_row(text, "native")[7] == "100 / 100"
    assert "4 × NVIDIA H200" in text
    assert "driver 580" in text
    # 4·B·H·S²·D / 2 over 4 ranks in 0.25 ms
    assert "| triton · zigzag · gather | 550 | 0.250 [0.250-0.250] | 0.300 | 0.100 | 32,768,000 |" in text


def test_layouts_and_schedules_share_a_table_with_the_fastest_first():
    ring = dataclasses.replace(CELL, schedule="ring")
    stripe = dataclasses.replace(CELL, layout="stripe")
    alone = dataclasses.replace(CELL, world_size=1)
    measured = [
        *rows("triton", "", 0.5, cell=ring),
        *rows("native", "flash-attn", 0.4, cell=ring),
        *rows("triton", "", 0.25),
        *rows("reference", "", 1.0, cell=stripe, status="failed", reason="boom"),
        *rows("reference", "", 9.0),
        *rows("triton", "", 0.5, cell=alone),
    ]
    text = render(Records(ENVIRONMENT, measured))
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## B 1 · S 8192 · H 32/8 · D 128 · bfloat16 · causal · 4 ranks",
        "## B 1 · S 8192 · H 32/8 · D 128 · bfloat16 · causal · 1 rank",
    ]
    table = text.split("## ")[1].split("\n\n")[1].splitlines()[2:]
    found = {line.split("|")[1].strip(): line.split("|")[8].strip() for line in table}
    assert list(found.items()) == [
        ("triton · zigzag · gather", ""),  # native did not run there, only on the ring
        ("native · zigzag · ring", "100 / 100"),
        ("triton · zigzag · ring", "80 / 80"),
        ("reference · zigzag · gather", ""),
        ("reference · stripe · gather", ""),  # nothing measured: last
    ]
    assert "- reference (fwd, fwd+bwd; stripe · gather): **failed**: boom" in text


def test_runs_stay_apart():
    """A run draws a seed of its own: no row is lost to another run, and no ratio is formed between two."""
    first = [*rows("native", "flash-attn", 0.4, seed=1), *rows("triton", "", 0.5, seed=1)]
    second = rows("triton", "", 0.2, seed=2)
    tables = render(Records(ENVIRONMENT, [*first, *second])).split("## ")[1:]
    assert [table.splitlines()[0] for table in tables] == [CELL.problem] * 2
    assert [table_row(table, "triton")[7] for table in tables] == ["80 / 80", ""]


@pytest.mark.parametrize("changes", [{}, {"status": "failed", "reason": "no"}])
def test_versus_native_is_blank_without_flash_attn(changes):
    measured = [*rows("triton", "", 0.25), *rows("native[aten]", "aten", 0.5)]
    if changes:
        measured += rows("native", "flash-attn", 0.5, **changes)
    text = render(Records(ENVIRONMENT, measured))
    assert table_row(text, "triton")[7] == ""
    assert table_row(text, "native[aten]")[7] == ""


def test_only_flash_attn_may_be_called_native():
    with pytest.raises(RecordError, match="its provider is 'aten'"):
        render(Records(ENVIRONMENT, rows("native", "aten", 0.5)))


def test_skipped_and_failed_are_listed_with_reasons():
    skipped = rows("reference", "", 1.0, status="skipped", reason="too\nlarge", samples_ms=[], errors={})
    failed = rows("cute", "", 1.0, status="failed", reason="rank 1: RuntimeError", samples_ms=[], errors={})
    text = render(Records(ENVIRONMENT, [*rows("triton", "", 0.5), *skipped, *failed]))
    assert "- reference (fwd, fwd+bwd): **skipped**: too large" in text
    assert "- cute (fwd, fwd+bwd): **failed**: rank 1: RuntimeError" in text
    assert "| reference" not in text
    assert table_row(text, "cute")[5:8] == ["", "", ""]


def test_nan_is_shown():
    measured = rows("triton", "", 0.5)
    measured[1].errors["dk"] = dict.fromkeys(error(1.0), float("nan"))
    assert table_row(render(Records(ENVIRONMENT, measured)), "triton")[4] == "nan"


def test_difference_from_native_is_told():
    text = render(Records(ENVIRONMENT, rows("triton", "", 0.5, native_errors={"out": error(0.5), "lse": error(0.1)})))
    assert "triton · zigzag · gather: out 0.05" in text


def test_what_the_host_and_the_clocks_did_is_told():
    after = [{"index": "0", "clocks.sm": "1500", "temperature.gpu": "81", "throttle_reasons": "0x4"}]
    measured = [*rows("triton", "", 0.5, host_ms=[1.0]), *rows("cute", "", 0.5, host_ms=[0.1])]
    text = render(Records({**ENVIRONMENT, "nvidia_smi_after": after}, measured))
    assert "as long as the GPU: triton · zigzag · gather (fwd)." in text  # both: 2 ms against 1
    assert "- GPU 0 after: driver None, SM 1500 of None MHz, limit None W, 81 °C, throttle reasons 0x4" in text


def test_devices_are_never_mixed():
    other = {**ENVIRONMENT, "device": {"type": "cuda", "slug": "h100", "names": ["NVIDIA H100"] * 4}}
    throttled = {**ENVIRONMENT, "nvidia_smi": [{"index": "0", "power.limit": "350.00"}]}
    records = Records(ENVIRONMENT, rows("triton", "", 0.5))
    assert len(merge([records, records]).results) == 4
    for environment in (other, throttled):
        with pytest.raises(RecordError, match="different devices"):
            merge([records, Records(environment, [])])


@pytest.fixture
def record_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with path.open("w") as file:
        write_row(file, environment_row(ENVIRONMENT))
        for result in rows("triton", "", 0.5):
            write_row(file, result.to_dict())
    return path


def test_report_command(record_file, capsys):
    assert main(["report", str(record_file)]) == 0
    assert "| triton · zigzag · gather |" in capsys.readouterr().out
    assert main(["report", str(record_file.with_name("absent"))]) == 2


def test_plots(record_file, tmp_path, capsys):
    code = main(["report", str(record_file), "--plots", str(tmp_path / "plots")])
    if importlib.util.find_spec("matplotlib") is None:
        assert code == 2
        assert "pip install 'ring-compare[plots]'" in capsys.readouterr().err
    else:
        assert code == 0
        names = {path.name for path in (tmp_path / "plots").iterdir()}
        assert names == {"tflops_fwd.svg", "tflops_fwd_bwd.svg", "errors.svg"}


def test_message_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.PlotsUnavailableError, match="ring-compare\\[plots\\]"):
        plots.draw(Records(ENVIRONMENT, rows("triton", "", 0.5)), None)
