"""The table of kernels on one GPU: the backward by itself, and each against cuDNN, FA2 and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ring_compare.kernels import CUDNN, FA2, FLEX, host_us, memory, speed, steps_overhead
from ring_compare.lines import Line, summary
from ring_compare.suites import KERNEL_PHASES

KERNEL_COLUMNS = (
    "implementation",
    "TFLOP/s, fwd",
    "bwd",
    "fwd+bwd",
    "bwd ms [p20-p80]",
    "speed, × cuDNN",
    "× FA2",
    "× FlexAttention",
    "peak memory, × FA2",
    "time, × one step",
    "host µs per step",
)
KERNEL_NOTES = """\
Kernels on one GPU: `bwd` is the backward alone, its forward run before the clock. Pairs are fwd / bwd, of this run,
samples interleaved; cuDNN and FA2 through ring-native and as `sdpa[…]`, the better of them; the peak is beyond inputs.
`steps-N`: N calls of a backend's contract, each on one N-th of the keys, against one on all.""".splitlines()
_APART = ("fwd", "bwd")


def kernel_row(line: Line, lines: Sequence[Line]) -> list[str]:
    """A line of the table, in the order of KERNEL_COLUMNS."""
    found = {phase: summary(line.pair, phase) for phase in KERNEL_PHASES}
    rates = ["" if x is None else f"{x.tflops_per_gpu:.3g}" for x in found.values()]
    backward, share = found["bwd"], memory(line, lines)
    return [
        line.name,
        *rates,
        "" if backward is None else f"{backward.median_ms:.3f} [{backward.p20_ms:.3f}-{backward.p80_ms:.3f}]",
        *(_speeds(line, lines, names) for names in (CUDNN, FA2, FLEX)),
        "" if share is None else f"{share:.2f}",
        _pair(lambda phase: steps_overhead(line, lines, phase), "{:.3f}"),
        _pair(lambda phase: host_us(line, phase), "{:.0f}"),
    ]


def _speeds(line: Line, lines: Sequence[Line], names: Sequence[str]) -> str:
    return _pair(lambda phase: speed(line, lines, names, phase))


def _pair(value: Callable[[str], float | None], form: str = "{:.2f}") -> str:
    values = [value(phase) for phase in _APART]
    return " / ".join("" if x is None else form.format(x) for x in values) if any(values) else ""
