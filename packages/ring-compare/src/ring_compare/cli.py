"""The command `ring-compare`: run, list, report, targets, env."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ring_compare import environment, implementations, launch, plots, records, report, targets, terminal
from ring_compare.run import Outcome, Plan, execute
from ring_compare.suites import (
    DTYPES,
    KERNEL_PHASES,
    LAYOUTS,
    MASKS,
    SCHEDULES,
    SUITES,
    Overrides,
    Suite,
    default_suite,
    suite_cells,
)

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


class UsageError(Exception):
    """The command cannot be carried out as given."""


def _dtype(word: str) -> str:
    name = _SHORT_DTYPES.get(word, word)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join((*DTYPES, *_SHORT_DTYPES))}")
    return name


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive integer")
    return int(word)


def _heads(word: str) -> tuple[int, int]:
    """ "32/8", or "16" for as many key heads."""
    queries, _, keys = word.partition("/")
    pair = _positive(queries), _positive(keys or queries)
    if pair[0] % pair[1]:
        raise argparse.ArgumentTypeError(f"{word!r}: {pair[0]} query heads do not share {pair[1]} key heads evenly")
    return pair


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("ring-compare", description="Accuracy, speed and memory of ring attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="measure",
        description="Measure everything installed. Starts its own ranks; under torchrun it joins the ranks given. "
        "Axes given here replace the suite's. Exit code 1: something failed, is beyond tolerance, or nothing ran.",
    )
    run.add_argument("--suite", choices=SUITES, help="default: gpu where there are GPUs, else cpu")
    run.add_argument(
        "--implementations",
        "--backend",
        dest="implementations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="backends, with an option in brackets if they have any (native 'native[cudnn]'), peers "
        "(ring-flash-attn, torch-cp, 'torch-cp[all-to-all]'), kernels alone ('local[native]'), or module:factory; "
        "default: the suite's, else everything installed",
    )
    run.add_argument("--layout", nargs="+", default=[], choices=(*LAYOUTS, "balanced"))
    run.add_argument("--schedule", nargs="+", default=[], choices=SCHEDULES)
    run.add_argument("--mask", nargs="+", default=[], choices=MASKS)
    run.add_argument("--world-size", nargs="+", default=[], type=_positive, metavar="N")
    run.add_argument("--seqlen", nargs="+", default=[], type=_positive, metavar="S", help="tokens over all ranks")
    run.add_argument("--dtype", nargs="+", default=[], type=_dtype, metavar="DTYPE", help=", ".join(DTYPES))
    run.add_argument("--batch", nargs="+", default=[], type=_positive, metavar="B")
    run.add_argument("--heads", nargs="+", default=[], type=_heads, metavar="HQ/HKV", help="such as 32/8")
    run.add_argument("--head-dim", nargs="+", default=[], type=_positive, metavar="D")
    run.add_argument(
        "--phase", nargs="+", default=[], choices=KERNEL_PHASES, help="what is timed; default: the suite's"
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there are GPUs")
    run.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: ./runs")
    run.add_argument("--seed", type=int, metavar="N", help="default: drawn afresh and recorded")
    run.add_argument("--timeout", type=_positive, metavar="SECONDS", help="per problem; default: the suite's")
    run.add_argument(
        "--max-seconds", type=float, metavar="SECONDS", help="begin nothing new after so long; default: no limit"
    )
    run.add_argument("--measure-seconds", type=float, metavar="SECONDS", help="per implementation, route and phase")
    run.add_argument("--warmup-seconds", type=float, metavar="SECONDS", help="likewise, before measuring")
    run.add_argument("--list-cells", action="store_true", help="print the cells and stop")
    commands.add_parser("list", help="backends with what they can do, and suites")
    again = commands.add_parser("report", help="Markdown from record files of one machine, on standard output")
    again.add_argument("files", nargs="+", type=Path, metavar="FILE")
    again.add_argument("--plots", type=Path, metavar="DIR", help="also draw charts there (needs matplotlib)")
    reached = commands.add_parser(
        "targets",
        help="records of 4 GPUs (rings) and of one (kernels) against the project's targets",
        description="Rings on 4 GPUs, with peers against what they took before, and kernels on one. "
        "Exit code 1: a target was missed or not measured.",
    )
    reached.add_argument(
        "--table",
        action="append",
        default=[],
        choices=[goals.name for goals in targets.GOALS],
        help="may be given again; default: those that the records say something about",
    )
    reached.add_argument("files", nargs="+", type=Path, metavar="FILE")
    commands.add_parser("env", help="the environment as it would be recorded")
    return parser


def _device(wanted: str | None) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _names(wanted: Sequence[str], suite: Suite) -> tuple[str, ...]:
    installed = implementations.installed_names()
    unknown = [name for name in wanted if not implementations.known(name)]
    if unknown:
        there = ", ".join((*installed, *implementations.BUILT_IN))
        raise UsageError(f"--implementations {' '.join(unknown)}: not installed; there are {there}")
    # What others are compared against comes first.
    chosen = wanted or suite.implementations or installed
    names = sorted(dict.fromkeys(chosen), key=lambda name: name != "native")
    if not names:
        raise UsageError("no backend is installed: pip install ring-core brings one called reference")
    return tuple(names)


def _timing(suite: Suite, options: argparse.Namespace) -> Suite:
    changes = {"measure_s": options.measure_seconds, "warmup_s": options.warmup_seconds}
    given = {name: seconds for name, seconds in changes.items() if seconds is not None}
    return dataclasses.replace(suite, timing=dataclasses.replace(suite.timing, **given))


def _world_sizes(wanted: Sequence[int]) -> tuple[int, ...]:
    given = launch.given_world_size()
    if given is None:
        return tuple(wanted)
    if any(size != given for size in wanted):
        raise UsageError(f"--world-size {' '.join(map(str, wanted))}: torchrun started {given} ranks")
    return (given,)


def _plan(options: argparse.Namespace) -> Plan:
    device = _device(options.device)
    suite: Suite = _timing(SUITES[options.suite or default_suite(device)], options)
    if options.timeout is not None:
        suite = dataclasses.replace(suite, timeout_s=options.timeout)
    if options.phase:
        suite = dataclasses.replace(suite, phases=tuple(phase for phase in KERNEL_PHASES if phase in options.phase))
    overrides = Overrides(
        layouts=tuple(options.layout),
        schedules=tuple(options.schedule),
        masks=tuple(options.mask),
        world_sizes=_world_sizes(options.world_size),
        seqlens=tuple(options.seqlen),
        dtypes=tuple(options.dtype),
        batches=tuple(options.batch),
        heads=tuple(options.heads),
        head_dims=tuple(options.head_dim),
    )
    cells = suite_cells(suite, overrides, all_ranks=launch.visible_ranks(device))
    if not cells:
        raise UsageError("no cell is left: the suite has none of these layouts, schedules and masks")
    names = _names(options.implementations, suite)
    return Plan(suite, cells, names, device, options.seed, options.max_seconds)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    plan = _plan(options)
    if options.list_cells:
        print("\n".join(cell.title for cell in plan.cells))
        return OK
    given = launch.GivenRanks(plan.device, plan.suite.timeout_s) if launch.under_torchrun() else None
    first = given is None or given.rank == 0
    where = environment.describe(plan.device, arguments) if first else {}
    with terminal.progress_bar(len(plan.cells), show=first) as progress:
        outcome = execute(plan, where, options.out, progress, given=given)
    if first:
        _conclude(outcome)
    return outcome.exit_code


def _conclude(outcome: Outcome) -> None:
    console = terminal.make_console()
    console.print(terminal.results_table(outcome.results))
    if any(result.phase == "bwd" for result in outcome.results):
        console.print(terminal.kernels_table(outcome.results))
    for line in dict.fromkeys(f"{r.implementation}: {r.status}: {r.reason}" for r in outcome.results if r.reason):
        console.print(line, markup=False, highlight=False)
    # soft_wrap: a path that is folded cannot be copied.
    console.print(f"records: {outcome.record_file}\nreport:  {outcome.report_file}", soft_wrap=True, markup=False)


def _list() -> int:
    console = terminal.make_console()
    console.print(terminal.backends_table(torch.device(_device(None))))
    peers = [name for name in implementations.installed_names() if name not in implementations.backend_names()]
    console.print(f"peers: {', '.join((*peers, *implementations.BUILT_IN))}", markup=False)
    console.print(terminal.suites_table())
    return OK


def _report(options: argparse.Namespace) -> int:
    loaded = report.merge([records.load(file) for file in options.files])
    sys.stdout.write(report.render(loaded))
    if options.plots is not None:
        for path in plots.draw(loaded, options.plots):
            print(f"plot: {path}", file=sys.stderr)
    return OK


def _targets(options: argparse.Namespace) -> int:
    text, met = targets.render_targets(report.merge([records.load(file) for file in options.files]), options.table)
    sys.stdout.write(text)
    return OK if met else FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (argparse itself exits with 2 on a bad command line)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    try:
        match options.command:
            case "run":
                return _run(options, arguments)
            case "list":
                return _list()
            case "report":
                return _report(options)
            case "targets":
                return _targets(options)
            case _:
                print(json.dumps(environment.describe(_device(None), arguments), indent=2))
                return OK
    except (UsageError, records.RecordError, plots.PlotsUnavailableError, FileNotFoundError) as error:
        print(f"ring-compare: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
