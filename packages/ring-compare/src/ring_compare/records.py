"""Records: JSON lines, the environment first, then one row per cell, implementation and phase."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ring_compare.suites import KERNEL_PHASES, Cell

SCHEMA = 2
READABLE = (1, SCHEMA)
"""Schema 1 had no packed documents (`documents` in cells) and no `single_errors`, `single_provider`, `arena_bytes`.
Rows of the phase `bwd` are of schema 2 like the rest."""
STATUSES = ("ok", "failed", "skipped")
_ENVIRONMENT_KEYS = ("date", "revision", "device", "versions", "command")


class RecordError(ValueError):
    """A record file that cannot be read, with the line and what is wrong with it."""


@dataclass
class Result:
    """One measured (or failed, or skipped) implementation and phase of a cell; a row of the file."""

    suite: str
    cell: Cell
    implementation: str
    provider: str
    phase: str
    status: str = "ok"
    reason: str = ""
    seed: int = 0
    samples_ms: list[float] = field(default_factory=list)  # on a GPU: per call, of several in a row
    latency_ms: list[float] = field(default_factory=list)  # on a GPU: of one call alone
    host_ms: list[float] = field(default_factory=list)  # and until it returned on the host
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    native_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    single_errors: dict[str, dict[str, float]] = field(default_factory=dict)  # of one call on the whole sequence
    single_provider: str = ""
    peak_memory_bytes: int | None = None
    memory_method: str = ""
    arena_bytes: int = 0  # of peak_memory_bytes: peer memory, which torch's allocator does not see

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, schema included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA, "kind": "result", **fields, "cell": self.cell.to_dict()}


@dataclass(frozen=True)
class Records:
    """A whole file."""

    environment: dict[str, Any]
    results: list[Result]


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings, which float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_row(file: TextIO, row: dict[str, Any]) -> None:
    """One line, flushed: a run that is killed keeps what it had."""
    file.write(json.dumps(_plain(row), allow_nan=False) + "\n")
    file.flush()


def environment_row(environment: dict[str, Any]) -> dict[str, Any]:
    """The first row of a file."""
    return {"schema": SCHEMA, "kind": "environment", **environment}


def closing_row(gpus: list[dict[str, str]]) -> dict[str, Any]:
    """The last row of a file from GPUs: what nvidia-smi says after the run, which `load` adds to the environment."""
    return {"schema": SCHEMA, "kind": "closing", "nvidia_smi_after": gpus}


def _floats(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {name: {key: float(value) for key, value in table.items()} for name, table in tables.items()}


def parse_result(row: dict[str, Any]) -> Result:
    """Result of a decoded row; raises RecordError saying what does not fit."""
    known = {f.name for f in dataclasses.fields(Result)}
    if row.get("schema") == 1:
        row = {"single_errors": {}, "single_provider": "", "arena_bytes": 0, "latency_ms": [], **row}
    missing = sorted(known - row.keys())
    unknown = sorted(row.keys() - known - {"schema", "kind"})
    if missing or unknown:
        raise RecordError(f"missing fields {missing}, unknown fields {unknown}")
    if row["status"] not in STATUSES:
        raise RecordError(f"status {row['status']!r} is none of {', '.join(STATUSES)}")
    if row["phase"] not in KERNEL_PHASES:
        raise RecordError(f"phase {row['phase']!r} is none of {', '.join(KERNEL_PHASES)}")
    fields = {name: row[name] for name in known}
    try:
        fields["cell"] = Cell.from_dict(row["cell"])
        fields["samples_ms"] = [float(x) for x in row["samples_ms"]]
        for name in ("errors", "native_errors", "single_errors"):
            fields[name] = _floats(row[name])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RecordError(f"a field does not fit: {error}") from error
    if fields["status"] == "ok" and not fields["samples_ms"]:
        raise RecordError("status ok without samples")
    return Result(**fields)


def _decode(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path.name}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict) or row.get("schema") not in READABLE:
        found = row.get("schema") if isinstance(row, dict) else type(row).__name__
        raise RecordError(
            f"{path.name}:{number}: schema {found!r}; this version reads {' and '.join(map(str, READABLE))}"
        )
    return row


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def load(path: Path) -> Records:
    """Read and check a file; RecordError names the line. A last line that a killed run has not finished is left out,
    with a warning."""
    text = path.read_text(encoding="utf-8")
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and not text.endswith("\n") and not _is_json(lines[-1][1]):
        warnings.warn(f"{path.name}: the last line was not finished, and is left out", stacklevel=2)
        del lines[-1]
    if not lines:
        raise RecordError(f"{path.name}: empty")
    environment, *rows = (_decode(path, number, line) for number, line in lines)
    absent = [key for key in _ENVIRONMENT_KEYS if key not in environment]
    if environment.get("kind") != "environment" or absent:
        raise RecordError(f"{path.name}:1: the first row must be the environment; missing {absent}")
    results = []
    for (number, _), row in zip(lines[1:], rows, strict=True):
        if row.get("kind") == "closing":
            environment["nvidia_smi_after"] = row.get("nvidia_smi_after", [])
            continue
        try:
            results.append(parse_result(row))
        except RecordError as error:
            raise RecordError(f"{path.name}:{number}: {error}") from error
    return Records(environment, results)


def record_path(root: Path, suite: str, environment: dict[str, Any], world_size: int) -> Path:
    """`<suite>/<date>_<gpu>x<n>_<rev7>.jsonl` under root; a second run of a day gets `.2` after the date."""
    device = environment["device"]
    revision = str(environment["revision"])[:7]
    date = str(environment["date"])[:10]
    for count in range(1, 1000):
        stamp = date if count == 1 else f"{date}.{count}"
        path = root / suite / f"{stamp}_{device['slug']}x{world_size}_{revision}.jsonl"
        if not path.exists():
            return path
    raise FileExistsError(f"a thousand runs of suite {suite} on {date} under {root}")
