import dataclasses
import json
import math

import pytest

from ring_compare import environment
from ring_compare.records import RecordError, Result, closing_row, environment_row, load, record_path, write_row
from ring_compare.suites import Cell

CELL = Cell(1, 64, 64, 4, 2, 32, "float32", "window", (7, 0), "zigzag", "ring", 2)
RESULT = Result(
    suite="smoke",
    cell=CELL,
    implementation="reference",
    provider="",
    phase="fwd",
    status="ok",
    seed=3,
    samples_ms=[1.5, 2.5],
    errors={"out": {"max_abs": 1e-6, "relative": math.nan, "rmse": math.inf, "tolerance": 1.0}},
    peak_memory_bytes=1024,
    memory_method="VmHWM growth",
)


def write(path, *rows):
    with path.open("w") as file:
        for row in rows:
            write_row(file, row)
    return path


@pytest.fixture(scope="module")
def where():
    return environment.describe("cpu", ["run", "--out", "/somewhere/private", "--seed", "3"])


def test_round_trip(tmp_path, where):
    path = write(tmp_path / "r.jsonl", environment_row(where), RESULT.to_dict())
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    loaded = load(path)
    assert loaded.environment["device"]["type"] == "cpu"
    assert math.isnan(loaded.results[0].errors["out"]["relative"])
    errors = {"out": {**loaded.results[0].errors["out"], "relative": 0.0}}
    expected = {"out": {**RESULT.errors["out"], "relative": 0.0}}
    assert errors == expected
    assert dataclasses.replace(loaded.results[0], errors={}) == dataclasses.replace(RESULT, errors={})


def test_environment_names_no_host_and_no_path(where):
    assert where["command"] == "ring-compare run --out DIR --seed 3"
    assert environment.command_line(["run", "--out=/x"]) == "ring-compare run --out=DIR"
    assert {"python", "torch"} <= where["versions"].keys()
    assert "/somewhere" not in json.dumps(where)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": 3}, "schema 3; this version reads 1 and 2"),
        ({"status": "fine"}, "status 'fine'"),
        ({"phase": "step"}, "phase 'step'"),
        ({"surprise": 1}, "unknown fields.*surprise"),
        ({"cell": {"B": 1}}, "a field does not fit"),
        ({"samples_ms": []}, "without samples"),
        ({"samples_ms": ["fast"]}, "a field does not fit"),
        ({"suite": None, "seed": ...}, "missing fields.*seed"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, where, change, message):
    row = {key: value for key, value in (RESULT.to_dict() | change).items() if value is not ...}
    path = write(tmp_path / "r.jsonl", environment_row(where), RESULT.to_dict(), row)
    with pytest.raises(RecordError, match=rf"r\.jsonl:3: .*{message}"):
        load(path)


def test_records_of_schema_1_are_still_read(tmp_path, where):
    row = RESULT.to_dict() | {"schema": 1}
    old = {key: value for key, value in row.items() if key not in ("single_errors", "single_provider", "arena_bytes")}
    del old["cell"]["documents"]
    path = write(tmp_path / "r.jsonl", environment_row(where) | {"schema": 1}, old)
    (loaded,) = load(path).results
    assert loaded.cell == CELL
    assert (loaded.single_errors, loaded.single_provider, loaded.arena_bytes) == ({}, "", 0)


def test_closing_row_goes_to_the_environment(tmp_path, where):
    gpus = [{"index": "0", "throttle_reasons": "0x0"}]
    path = write(tmp_path / "r.jsonl", environment_row(where), RESULT.to_dict(), closing_row(gpus))
    assert load(path).environment["nvidia_smi_after"] == gpus
    assert len(load(path).results) == 1


def test_files_that_are_no_records(tmp_path, where):
    path = tmp_path / "r.jsonl"
    path.write_text("")
    with pytest.raises(RecordError, match="empty"):
        load(path)
    path.write_text("{")
    with pytest.raises(RecordError, match=r"r\.jsonl:1: not JSON"):
        load(path)
    write(path, RESULT.to_dict())
    with pytest.raises(RecordError, match="first row must be the environment"):
        load(path)


def test_a_run_that_was_killed_keeps_what_it_had(tmp_path, where):
    path = write(tmp_path / "r.jsonl", environment_row(where), RESULT.to_dict(), RESULT.to_dict())
    whole = path.read_text()
    path.write_text(whole.rstrip("\n"))
    assert len(load(path).results) == 2
    path.write_text(whole[: -len(whole) // 5])
    with pytest.warns(UserWarning, match="r.jsonl: the last line was not finished"):
        assert len(load(path).results) == 1


def test_record_path(tmp_path):
    where = {"date": "2026-11-21T10:00:00+00:00", "revision": "0123456789", "device": {"slug": "h200"}}
    path = record_path(tmp_path, "gpu", where, 4)
    assert path == tmp_path / "gpu" / "2026-11-21_h200x4_0123456.jsonl"
    path.parent.mkdir()
    path.touch()
    assert record_path(tmp_path, "gpu", where, 4).name == "2026-11-21.2_h200x4_0123456.jsonl"
