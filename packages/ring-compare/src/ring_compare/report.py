"""Markdown from records: accuracy and speed of every cell, what failed or was skipped and why."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ring_compare.kernel_report import KERNEL_COLUMNS, KERNEL_NOTES, kernel_row
from ring_compare.kernels import of_one_gpu
from ring_compare.lines import NATIVE, Line, Pair, measured_together, summary
from ring_compare.ratios import ratios
from ring_compare.records import RecordError, Records, Result
from ring_compare.suites import KERNEL_PHASES, PHASES

COLUMNS = (
    "implementation",
    "out max err",
    "out RMSE",
    "lse max err",
    "grad max err",
    "fwd iter/s",
    "fwd+bwd iter/s",
    "vs native %",
    "peak memory",
)
SPEED_COLUMNS = (
    "implementation",
    "fwd TFLOP/s per GPU",
    "fwd ms [p20-p80]",
    "fwd latency ms",
    "fwd host ms",
    "fwd tokens/s",
    "fwd+bwd TFLOP/s per GPU",
    "fwd+bwd ms [p20-p80]",
    "fwd+bwd latency ms",
    "fwd+bwd host ms",
    "fwd+bwd tokens/s",
)
RATIO_COLUMNS = (
    "implementation",
    "speed, × ring-flash-attn",
    "time, × kernels alone",
    "extra memory, × ring-flash-attn",
    "error, × one call",
)
_GRADIENTS = ("dq", "dk", "dv")


def check_names(results: Iterable[Result]) -> None:
    """Refuse records in which something other than flash-attn bears the name `native`."""
    for result in results:
        if result.implementation == NATIVE and result.provider != "flash-attn" and result.status == "ok":
            raise RecordError(f"a row is called native, yet its provider is {result.provider or 'not named'!r}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "n/a"
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.3f} GiB"


def _error(pair: Pair, tensors: Sequence[str], measure: str) -> float | None:
    values = [r.errors[tensor][measure] for r in pair.values() for tensor in tensors if tensor in r.errors]
    nan = [value for value in values if value != value]
    return nan[0] if nan else max(values, default=None)


def _versus_native(line: Line) -> str:
    """`fwd / fwd+bwd` in percent of flash-attn's rate on the same cell; blank where flash-attn did not run."""
    native = Line(NATIVE, line.cell, line.native or {}, None)
    pairs = [(line.rate(phase), native.rate(phase)) for phase in PHASES]
    parts = [f"{100 * mine / theirs:.0f}" if mine and theirs else "" for mine, theirs in pairs]
    return " / ".join(parts) if any(parts) else ""


def main_row(line: Line) -> list[str]:
    """A line of the first table, in the order of COLUMNS."""
    pair = line.pair
    memory = [result.peak_memory_bytes for result in pair.values() if result.peak_memory_bytes is not None]
    return [
        line.name,
        _number(_error(pair, ("out",), "max_abs")),
        _number(_error(pair, ("out",), "rmse")),
        _number(_error(pair, ("lse",), "max_abs")),
        _number(_error(pair, _GRADIENTS, "max_abs")),
        *(_rate(line.rate(phase)) for phase in PHASES),
        _versus_native(line),
        _bytes(max(memory, default=None)),
    ]


def _speed_row(line: Line) -> list[str]:
    row = [line.name]
    for phase in PHASES:
        found = summary(line.pair, phase)
        if found is None:
            row += [""] * 5
            continue
        result = line.pair[phase]
        alone = (f"{statistics.median(x):.3f}" if x else "" for x in (result.latency_ms, result.host_ms))
        spread = f"{found.median_ms:.3f} [{found.p20_ms:.3f}-{found.p80_ms:.3f}]"
        row += [_number(found.tflops_per_gpu), spread, *alone, _rate(found.tokens_per_s)]
    return row


def _both(values: Mapping[str, float | None]) -> str:
    return " / ".join("" if x is None else f"{x:.2f}" for x in values.values()) if any(values.values()) else ""


def _ratio_row(line: Line, lines: Sequence[Line]) -> list[str]:
    found = ratios(line, lines)
    plain = ("" if x is None else f"{x:.2f}" for x in (found.memory, found.accuracy))
    return [line.name, _both(found.speed), _both(found.overhead), *plain]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    # A bar inside a cell would end it.
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return [*lines, ""]


def _machine(environment: dict[str, Any]) -> list[str]:
    device, cpu = environment["device"], environment.get("cpu", {})
    names = device["names"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"- date: {environment['date']}, revision: {environment['revision'][:7]}",
        f"- device: {len(names)} × {names[0]} ({device['type']})",
        f"- CPU: {cpu.get('name', 'unknown')}, {cpu.get('count', '?')} cores",
        f"- versions: {versions}",
    ]
    for key, when in (("nvidia_smi", "before"), ("nvidia_smi_after", "after")):
        for gpu in environment.get(key, ()):
            clocks = f"SM {gpu.get('clocks.sm')} of {gpu.get('clocks.max.sm')} MHz, limit {gpu.get('power.limit')} W"
            state = f"{gpu.get('temperature.gpu')} °C, throttle reasons {gpu.get('throttle_reasons')}"
            lines.append(f"- GPU {gpu.get('index')} {when}: driver {gpu.get('driver_version')}, {clocks}, {state}")
    return [*lines, f"- command: `{environment['command']}`", ""]


def _device_key(environment: dict[str, Any]) -> tuple[str, ...]:
    """What must agree before numbers may stand in one report."""
    device = environment["device"]
    limits = sorted({gpu.get("power.limit", "") for gpu in environment.get("nvidia_smi", ())})
    return (device["type"], *device["names"], *limits)


def merge(files: Sequence[Records]) -> Records:
    """Several files as one; RecordError when they come from different devices."""
    first = files[0]
    for other in files[1:]:
        if _device_key(other.environment) != _device_key(first.environment):
            names = [records.environment["device"]["names"][0] for records in (first, other)]
            raise RecordError(f"these records come from different devices ({names[0]}; {names[1]}): report them apart")
    return Records(first.environment, [result for records in files for result in records.results])


def _farthest(lines: Sequence[Line]) -> list[str]:
    """How far each implementation's results are from flash-attn's, on the route where they are farthest."""
    worst: dict[str, tuple[float, str]] = {}
    for line in lines:
        for result in line.pair.values():
            for tensor, table in result.native_errors.items():
                value = table["relative"]
                if line.implementation not in worst or not value <= worst[line.implementation][0]:  # NaN is farthest
                    worst[line.implementation] = value, f"{line.name}: {tensor} {value:.2g}"
    return [text for _, text in worst.values()]


def _host_bound(result: Result) -> bool:
    alone = result.latency_ms or result.samples_ms
    return bool(result.host_ms) and statistics.median(result.host_ms) >= statistics.median(alone)


_NOTES = """\
Errors are against float64, over all ranks; grad: the worst of dq, dk, dv. Rates: median of the slowest rank, on GPUs
of calls in a row that the host has a head start to enqueue, as in training; latency: of one call alone, begun by all
ranks together on idle GPUs, its host work included; host: until that call returned.
`vs native %` is fwd / fwd+bwd relative to flash-attn on the same layout and schedule; blank: it did not run.
TFLOP/s count 4·B·H·S²·D forward (half when causal, exact pairs in windows) and 2.5 times that backward.
Peak memory is one rank's, beyond its inputs; on a CPU the growth of the resident set, a rough figure. On GPUs it is
what torch's allocator saw plus, for the gather schedule, all peer memory that the process then holds.
Ratios, fwd / fwd+bwd: speed against ring-flash-attn's zigzag (of documents it cannot cut: its llama3); time against
the same kernels with all keys local (local[…], local-varlen); peak memory beyond inputs and outputs, fwd+bwd; the
worst of the errors of out, dq, dk, dv, each against that of one call on the whole sequence. All of one run, samples
interleaved. Route `own`: an implementation with one schedule of its own.""".splitlines()


def render(records: Records) -> str:
    """The whole report."""
    check_names(records.results)
    suites = ", ".join(dict.fromkeys(result.suite for result in records.results)) or "nothing"
    lines = [f"# ring-compare: {suites}", "", *_machine(records.environment)]
    lines += [*_NOTES, ""]
    if any(result.phase == "bwd" for result in records.results):
        lines += [*KERNEL_NOTES, ""]
    for found in measured_together(records.results):
        lines += [f"## {found[0].cell.problem}", ""]
        shown = [line for line in found if line.tried]
        if shown:
            lines += _table(COLUMNS, map(main_row, shown))
        timed = [line for line in shown if any(map(line.rate, KERNEL_PHASES))]
        kernels = [line for line in timed if of_one_gpu(line)]
        if kernels:
            lines += _table(KERNEL_COLUMNS, (kernel_row(line, found) for line in kernels))
        if timed:
            lines += _table(SPEED_COLUMNS, map(_speed_row, timed))
        rows = [_ratio_row(line, found) for line in timed]
        if any(any(row[1:]) for row in rows):
            lines += _table(RATIO_COLUMNS, rows)
        compared = _farthest(shown)
        if compared:
            lines += [f"Largest relative difference from native's results: {'; '.join(compared)}.", ""]
        bound = [f"{line.name} ({phase})" for line in timed for phase, r in line.pair.items() if _host_bound(r)]
        if bound:
            lines += [f"Bound by the host, which the call keeps as long as the GPU: {'; '.join(bound)}.", ""]
        lines += _troubles(found)
    return "\n".join(lines).rstrip() + "\n"


def _troubles(lines: Sequence[Line]) -> list[str]:
    """What failed or was skipped and why; phases, layouts and schedules share an entry when they share the reason."""
    places: dict[tuple[str, str, str], dict[str, list[str]]] = {}  # by implementation, status, reason: routes by phase
    for line in lines:
        for phase, result in line.pair.items():
            if result.status != "ok":
                reason = " ".join(result.reason.split())
                entry = places.setdefault((line.implementation, result.status, reason), {})
                entry.setdefault(phase, []).append(line.cell.route)
    entries = []
    for (implementation, status, reason), routes in places.items():
        everywhere = {line.cell.route for line in lines if line.implementation == implementation}
        some = dict.fromkeys(route for phase in routes.values() for route in phase)
        where = "" if some.keys() == everywhere else f"; {', '.join(some)}"
        entries.append(f"- {implementation} ({', '.join(routes)}{where}): **{status}**: {reason}")
    return [*entries, ""] if entries else []
