"""What the project's own kernels set out to reach on one H200, as data: tables `triton` and `cute`.

Ratios are means over cells and the worst of them, each against yardsticks of the same run. Where a backend has several
names (whatever it chooses, or a path that is forced), the figure is that of the better name, which is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ring_compare.goals import Found, Goals, Measure, Problems, Target
from ring_compare.kernels import CUDNN, FA2, FA3, FA4, FLEX, host_us, memory, speed, steps_overhead
from ring_compare.lines import Line, summary

SEQLENS = (4096, 8192, 16384, 32768)
TOKENS = 16384
"""Short sequences come in batches of so many tokens."""
Names = tuple[str, ...]
Value = Callable[[Line, Sequence[Line]], float | None]
Combine = Callable[[Sequence[float]], float]


class Place(NamedTuple):
    """Which cell a problem is, of those that the tables are about."""

    seqlen: int
    heads: tuple[int, int]
    head_dim: int
    mask: str

    def __str__(self) -> str:
        return f"S {self.seqlen}, {self.heads[0]}/{self.heads[1]}, D {self.head_dim}, {self.mask}"


def _places(
    heads: Sequence[tuple[int, int]],
    head_dims: Sequence[int],
    seqlens: Sequence[int] = SEQLENS,
    masks: Sequence[str] = ("causal", "full"),
) -> frozenset[Place]:
    return frozenset(Place(*place) for place in product(seqlens, heads, head_dims, masks))


def _place(lines: Sequence[Line]) -> Place | None:
    cell = lines[0].cell
    batch = max(1, TOKENS // cell.Sq)
    usual = (cell.B, cell.Sk, cell.dtype, cell.world_size, cell.documents) == (batch, cell.Sq, "bfloat16", 1, "")
    return Place(cell.Sq, (cell.Hq, cell.Hkv), cell.D, cell.mask) if usual else None


def _over(places: frozenset[Place], names: Names, value: Value, combine: Combine, *, at_least: bool = True) -> Measure:
    """A figure of all places: of the name that was measured on most of them, among such the one that does best."""

    def of_name(problems: Problems, name: str) -> tuple[int, Found] | None:
        figures: dict[Place, float] = {}
        for lines in problems:
            place = _place(lines)
            if place is not None and place in places:
                figure = next((value(line, lines) for line in lines if line.implementation == name), None)
                if figure is not None:
                    figures[place] = figure
        if not figures:
            return None
        total, complete = combine(list(figures.values())), len(figures) == len(places)
        text = f"{name}, {len(figures)} cells" if complete else f"{name}, {len(figures)} of {len(places)} cells"
        if combine in (min, max):
            text += f": {next(place for place, figure in figures.items() if figure == total)}"
        return len(figures), Found(total, text, complete)

    def measure(problems: Problems) -> Found | None:
        found = [x for x in (of_name(problems, name) for name in names) if x is not None]
        most = max((count for count, _ in found), default=0)
        best = max if at_least else min
        return best((x for count, x in found if count == most), key=lambda x: x.value, default=None)

    return measure


def _speed(phase: str, yardsticks: Names) -> Value:
    return lambda line, lines: speed(line, lines, yardsticks, phase)


def _tflops(phase: str) -> Value:
    def value(line: Line, lines: Sequence[Line]) -> float | None:
        found = summary(line.pair, phase)
        return None if found is None else found.tflops_per_gpu

    return value


def _of_steps(names: Names, count: int, value: Value) -> Measure:
    """8192 queries against 32768 keys, full, as the suite `steps` has them; the best of the names."""

    def measure(problems: Problems) -> Found | None:
        wanted = [f"steps-{count}[{name}]" for name in names]
        found = []
        for lines in problems:
            cell = lines[0].cell
            if (cell.Sq, cell.Sk, cell.D, cell.mask, cell.dtype) == (8192, 32768, 128, "full", "bfloat16"):
                figures = [(line, value(line, lines)) for line in lines if line.implementation in wanted]
                found += [
                    Found(x, f"{line.implementation}, {cell.Hq}/{cell.Hkv}") for line, x in figures if x is not None
                ]
        return min(found, key=lambda x: x.value, default=None)

    return measure


def _steps_targets(names: Names, most: float, ideal: float, us: float, few_us: float) -> Iterator[Target]:
    for phase, count in product(("fwd", "bwd"), (4, 8, 16)):
        must, goal = (most, ideal) if (phase, count) == ("fwd", 4) else (None, None)

        def overhead(line: Line, lines: Sequence[Line], phase: str = phase) -> float | None:
            return steps_overhead(line, lines, phase)

        what = f"{count} steps of {32768 // count} keys, {phase}: time, × one call"
        yield Target(what, must, goal, False, _of_steps(names, count, overhead))
    for phase in ("fwd", "bwd"):
        must, goal = (us, few_us) if phase == "fwd" else (None, None)

        def host(line: Line, lines: Sequence[Line], phase: str = phase) -> float | None:
            return host_us(line, phase)

        yield Target(f"host time per step of 16, {phase}, µs", must, goal, False, _of_steps(names, 16, host))


_D64 = _places(((32, 32),), (64,))
_mean, _geometric = statistics.fmean, statistics.geometric_mean


def _triton() -> Iterator[Target]:
    names, portable = ("triton", "triton[hopper]"), ("triton[portable]",)
    heads = ((16, 16), (32, 8))
    places = _places(heads, (128,))
    for phase, mean, goal, worst in (("fwd", 0.97, 1.08, 0.90), ("bwd", 0.85, 1.13, 0.75)):
        value = _speed(phase, CUDNN)
        yield Target(f"D 128, {phase}: speed, × cuDNN, mean", mean, goal, True, _over(places, names, value, _mean))
        yield Target(f"D 128, {phase}: speed, × cuDNN, worst cell", worst, None, True, _over(places, names, value, min))
    for phase, must in (("fwd", 0.92), ("bwd", 0.82)):
        measure = _over(_D64, names, _speed(phase, CUDNN), _mean)
        yield Target(f"D 64, {phase}: speed, × cuDNN, mean", must, None, True, measure)
        measure = _over(_D64, names, _speed(phase, FA4), _mean)
        yield Target(f"D 64, {phase}: speed, × FA4, mean", None, 1.0, True, measure)
    for phase, masks, must in (
        ("fwd", ("full",), 1.3),
        ("fwd", ("causal",), 1.2),
        ("bwd", ("causal", "full"), 1.1),
    ):
        some = _places(heads, (128,), masks=masks)
        what = f"portable, D 128, {phase}, {' and '.join(masks)}: speed, × FA2, mean"
        yield Target(what, must, None, True, _over(some, portable, _speed(phase, FA2), _mean))
    for phase in ("fwd", "bwd"):
        what = f"portable, D 128, {phase}: speed, × FlexAttention, mean"
        yield Target(what, None, 1.1, True, _over(places, portable, _speed(phase, FLEX), _mean))
    yield from _steps_targets((*names, *portable), 1.05, 1.03, 25.0, 10.0)
    yield Target("D 128: peak memory, × FA2, worst cell", 1.05, None, False, _least_memory(places, names))


def _cute() -> Iterator[Target]:
    names = ("cute",)
    places = _places(((16, 16), (32, 8), (64, 8)), (128,))
    long = _places(((16, 16), (32, 8), (64, 8)), (128,), SEQLENS[1:])
    wide = _places(((16, 16),), (192, 256), (4096, 16384))
    for phase, goal, tflops in (("fwd", 1.15, 700), ("bwd", 1.17, 620)):
        value = _speed(phase, CUDNN)
        what = f"D 128, {phase}: speed, × cuDNN"
        yield Target(f"{what}, geometric mean", 1.06, goal, True, _over(places, names, value, _geometric))
        yield Target(f"{what}, worst cell", 0.97, None, True, _over(places, names, value, min))
        better = _over(places, names, _speed(phase, (*FA3, *FA4)), _geometric)
        yield Target(f"D 128, {phase}: speed, × the better of FA3 and FA4, mean", None, 1.02, True, better)
        least = _over(long, names, _tflops(phase), min)
        yield Target(f"D 128, {phase}, from S 8192: TFLOP/s, worst cell", None, tflops, True, least)
    for phase in ("fwd", "bwd"):
        measure = _over(_D64, names, _speed(phase, CUDNN), _geometric)
        yield Target(f"D 64, {phase}: speed, × cuDNN, mean", 1.02, None, True, measure)
        measure = _over(_D64, names, _speed(phase, FA4), _geometric)
        yield Target(f"D 64, {phase}: speed, × FA4, mean", None, 1.0, True, measure)
    for phase in ("fwd", "bwd"):
        measure = _over(wide, names, _speed(phase, (*CUDNN, *FA4)), min)
        what = f"D 192 and 256, {phase}: speed, × the better of cuDNN and FA4, worst cell"
        yield Target(what, 0.95, 1.0, True, measure)
    yield from _steps_targets(names, 1.04, 1.02, 10.0, 10.0)


def _least_memory(places: frozenset[Place], names: Names) -> Measure:
    return _over(places, names, memory, max, at_least=False)


_TITLE = "one H200, bf16"
KERNEL_GOALS = (
    Goals("triton", f"ring-triton, {_TITLE}", tuple(_triton())),
    Goals("cute", f"ring-cute, {_TITLE}", tuple(_cute())),
)
