"""What the project set out to reach on 4 H200s, as data, and how records compare with that, and with what its kernels
set out to reach on one (`kernel_targets`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ring_compare.goals import Found, Goals, Measure, Target
from ring_compare.kernel_targets import KERNEL_GOALS
from ring_compare.lines import Line, measured_together
from ring_compare.ratios import Ratios, accuracy, extra_memory, find, output_bytes, peer, ratios
from ring_compare.records import Records
from ring_compare.suites import PHASES, Cell

WORLD_SIZE = 4
PEER_TOLERANCE = 0.05


def _problem(lines: Sequence[Line], seqlen: int, heads: tuple[int, int], documents: str = "") -> bool:
    cell = lines[0].cell
    same = (cell.Sq, cell.Hq, cell.Hkv, cell.D, cell.world_size, cell.documents)
    return same == (seqlen, *heads, 128, WORLD_SIZE, documents) and cell.mask == "causal" and cell.dtype == "bfloat16"


def _any(cell: Cell) -> bool:
    return True


def _best(
    name: str,
    value: Callable[[Ratios], float | None],
    *,
    at_least: bool,
    route: Callable[[Cell], bool] = _any,
) -> Measure:
    """The best figure of an implementation over its routes."""

    def measure(problems: Sequence[Sequence[Line]]) -> Found | None:
        found = [
            Found(figure, line.cell.route)
            for lines in problems
            if _problem(lines, 32768, (32, 8))
            for line in lines
            if line.implementation == name and route(line.cell) and line.tried
            for figure in [value(ratios(line, lines))]
            if figure is not None
        ]
        best = max if at_least else min
        return best(found, key=lambda x: x.value, default=None)

    return measure


def _speed(name: str, phase: str, route: Callable[[Cell], bool] = _any) -> Measure:
    return _best(name, lambda x: x.speed[phase], at_least=True, route=route)


def _overhead(name: str, phase: str) -> Measure:
    return _best(name, lambda x: x.overhead[phase], at_least=False)


def _gather(cell: Cell) -> bool:
    return cell.schedule == "gather"


def _documents(name: str, phase: str, mix: str) -> Measure:
    """Of the route that one would choose: the fastest. A layout whose ranks have unequal work would flatter."""

    def measure(problems: Sequence[Sequence[Line]]) -> Found | None:
        for lines in problems:
            if _problem(lines, 32768, (32, 8), mix):
                mine = [line for line in lines if line.implementation == name and line.rate(phase)]
                fastest = max(mine, key=lambda line: line.rate(phase) or 0.0, default=None)
                overhead = None if fastest is None else ratios(fastest, lines).overhead[phase]
                if fastest is not None and overhead:
                    return Found(1 / overhead, fastest.cell.route)
        return None

    return measure


def _memory_of_fastest(name: str) -> Measure:
    """Of the route that one would choose: the fastest."""

    def measure(problems: Sequence[Sequence[Line]]) -> Found | None:
        for lines in problems:
            if _problem(lines, 32768, (32, 8)):
                mine = [line for line in lines if line.implementation == name and line.rate("fwd+bwd")]
                fastest = max(mine, key=lambda line: line.rate("fwd+bwd") or 0.0, default=None)
                figure = None if fastest is None else ratios(fastest, lines).memory
                if fastest is not None and figure is not None:
                    return Found(figure, fastest.cell.route)
        return None

    return measure


def _worst_accuracy(name: str) -> Measure:
    def measure(problems: Sequence[Sequence[Line]]) -> Found | None:
        found = [
            Found(figure, f"{line.cell.route} at {line.cell.Sq}")
            for lines in problems
            for line in lines
            if line.implementation == name and line.cell.world_size == WORLD_SIZE and not line.cell.documents
            for figure in [accuracy(line)]
            if figure is not None
        ]
        return max(found, key=lambda x: math.inf if x.value != x.value else x.value, default=None)

    return measure


_FA2, _CUDNN, _FA4 = ("flash-attn", "native"), ("cudnn", "native[cudnn]"), ("fa4", "native[fa4]")
_PEER = "ring-flash-attn zigzag"


def _targets() -> Iterator[Target]:
    fa2, cudnn, fa4 = _FA2[1], _CUDNN[1], _FA4[1]
    long, both = "32768 tokens", "fwd+bwd"
    for phase in PHASES:
        what = f"flash-attn, {long}, {phase}: speed, × {_PEER}"
        yield Target(what, 1.05, 1.12, True, _speed(fa2, phase))
    yield Target(f"cudnn, {long}, {both}: speed, × {_PEER}", 1.5, 1.7, True, _speed(cudnn, both))
    for phase, must, goal in (("fwd", 1.8, 2.1), (both, 1.65, 1.9)):
        what = f"fa4, gather, {long}, {phase}: speed, × {_PEER}"
        yield Target(what, must, goal, True, _speed(fa4, phase, _gather))
    for (provider, name), most in ((_FA2, 1.08), (_FA4, 1.15)):
        for phase in PHASES:
            what = f"{provider}, 8192 tokens per GPU, {phase}: time, × kernels alone"
            yield Target(what, most, 1.05, False, _overhead(name, phase))
    for mix, lowest, ideal in (("realistic", 0.85, 0.92), ("equal64", None, None)):
        for phase in PHASES:
            what = f"packed, {mix}, {long}, {phase}: throughput, × one varlen call per rank"
            yield Target(what, lowest, ideal, True, _documents(fa2, phase, mix))
    for provider, name in (_FA2, _CUDNN, _FA4):
        what = f"{provider}, {long}: extra memory, × {_PEER} (its fastest route)"
        yield Target(what, 0.9, 0.75, False, _memory_of_fastest(name))
    for provider, name in (_FA2, _CUDNN, _FA4):
        what = f"{provider}, {WORLD_SIZE} ranks, all routes: error, × one call"
        yield Target(what, 1.3, None, False, _worst_accuracy(name))


TARGETS = tuple(_targets())
GOALS = (Goals("rings", "4 GPUs, 32/8 heads × 128, bf16, causal", TARGETS), *KERNEL_GOALS)


@dataclass(frozen=True)
class KnownPeer:
    """What a peer took on 4 H200s, 2026-11-21, one host, torch 2.11.0+cu130 (milliseconds, median)."""

    name: str
    layout: str
    seqlen: int
    heads: tuple[int, int]
    ms: dict[str, float]


def _known(name: str, layout: str, seqlen: int, heads: tuple[int, int], fwd: float, both: float) -> KnownPeer:
    return KnownPeer(name, layout, seqlen, heads, {"fwd": fwd, "fwd+bwd": both})


_GQA, _MHA = (32, 8), (32, 32)
KNOWN_PEERS = (
    _known("ring-flash-attn", "contiguous", 8192, _GQA, 1.26, 4.27),
    _known("ring-flash-attn", "contiguous", 32768, _GQA, 11.06, 43.65),
    _known("ring-flash-attn", "contiguous", 131072, _GQA, 168.0, 649.0),
    KnownPeer("ring-flash-attn", "zigzag", 8192, _GQA, {"fwd+bwd": 3.95}),
    _known("ring-flash-attn", "zigzag", 32768, _GQA, 7.40, 26.69),
    _known("ring-flash-attn", "zigzag", 131072, _GQA, 101.7, 380.5),
    _known("ring-flash-attn", "stripe", 8192, _GQA, 1.36, 4.01),
    _known("ring-flash-attn", "stripe", 32768, _GQA, 9.16, 28.55),
    _known("ring-flash-attn", "stripe", 131072, _GQA, 104.0, 379.7),
    _known("ring-flash-attn", "zigzag", 32768, _MHA, 8.26, 31.22),
    _known("torch-cp", "zigzag", 8192, _MHA, 1.30, 4.95),
    _known("torch-cp", "zigzag", 32768, _MHA, 5.56, 20.54),
    _known("torch-cp[all-to-all]", "zigzag", 8192, _MHA, 1.54, 5.33),
    _known("torch-cp[all-to-all]", "zigzag", 32768, _MHA, 6.86, 21.99),
)
KNOWN_EXTRA_GIB = {32768: 0.66, 131072: 2.63}
"""Peak of ring-flash-attn zigzag over its inputs, forward and backward, 32/8 heads."""


def render_targets(records: Records, names: Sequence[str] = ()) -> tuple[str, bool]:
    """The tables of these names as Markdown, and whether every `must` in them was measured and met. No name: the tables
    that the records say anything about, or that of rings."""
    problems = measured_together(records.results)
    figures = {goals.name: goals.figures(problems) for goals in GOALS}
    touched = [name for name, found in figures.items() if any(x is not None for x in found)]
    shown = [goals for goals in GOALS if goals.name in (names or touched or ("rings",))]
    lines: list[str] = []
    met = True
    for goals in shown:
        found = figures[goals.name]
        lines += goals.render(found)
        met = met and all(target.met(x) for target, x in zip(goals.targets, found, strict=True))
        if goals.name == "rings":
            lines += _peers(problems)
    return "\n".join(lines).rstrip() + "\n", met


def _peers(problems: Sequence[Sequence[Line]]) -> list[str]:
    """Peers beside what was measured before: a run in which they are slow proves nothing."""
    rows = []
    for known in KNOWN_PEERS:
        for lines in problems:
            line = find(lines, known.name, known.layout) if _problem(lines, known.seqlen, known.heads) else None
            if line is not None:
                heads = f"{known.heads[0]}/{known.heads[1]}"
                name = f"{known.name} {known.layout}, {known.seqlen} tokens, {heads}"
                rows += [_peer_row(f"{name}, {phase}, ms", ms, _ms(line, phase)) for phase, ms in known.ms.items()]
    for seqlen, known_gib in KNOWN_EXTRA_GIB.items():
        for lines in problems:
            line = peer(lines) if _problem(lines, seqlen, _GQA) else None
            found = None if line is None else _gib(line)
            if line is not None:
                rows.append(_peer_row(f"{_PEER}, {seqlen} tokens, peak beyond inputs, GiB", known_gib, found))
    header = ["| peer | known | here | |", "|---|---|---|---|"]
    return [*header, *rows, ""] if rows else ["No peer was measured on 4 ranks.", ""]


def _ms(line: Line, phase: str) -> float | None:
    rate = line.rate(phase)
    return None if rate is None else 1e3 / rate


def _gib(line: Line) -> float | None:
    result = line.pair.get("fwd+bwd")
    extra = extra_memory(result)
    return None if result is None or extra is None else (extra + output_bytes(result.cell, result.phase)) / 2**30


def _peer_row(name: str, known: float, found: float | None) -> str:
    if found is None:
        return f"| {name} | {known:.4g} |  | not measured |"
    apart = found / known - 1
    verdict = "" if abs(apart) <= PEER_TOLERANCE else f"**{apart:+.0%}**"
    return f"| {name} | {known:.4g} | {found:.4g} | {verdict} |"
