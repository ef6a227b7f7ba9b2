"""Fills the cache of compiled kernels; needs the DSL and a C compiler, but no GPU.

    python -m ring_cute.compile --head-dim 128 --dtype bfloat16 --jobs 8

A process that finds its kernels there compiles nothing and does not import the DSL. The cache may be filled on another
machine of the same kind of processor, or when an image is built: set RING_CUTE_CACHE in both places.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from ring_cute import library
from ring_cute.backend import HEAD_DIMS
from ring_cute.hopper.backward_settings import BackwardKind, EndsKind, backward_settings_for
from ring_cute.settings import (
    FORWARD,
    PAIRED_HEAD_DIMS,
    ForwardKind,
    kind_for,
    padded_head_dim,
    settings_for,
    state_fits,
)

DTYPES = ("bfloat16", "float16")
MOST_JOBS = 8


def forwards(head_dim: int, dtype: str) -> Iterator[ForwardKind]:
    """What calls on contiguous tensors ask for: all of a call at once, keys that are still arriving, sinks, for long
    sequences too; a ring's steps, and those with sinks."""
    alone = settings_for(head_dim)
    pairs = [replace(alone, cluster=2)] if padded_head_dim(head_dim) in PAIRED_HEAD_DIMS else []
    for settings in (alone, *pairs):
        for sinks, flags in ((False, False), (False, True), (True, False)):
            yield kind_for(dtype, head_dim, settings, sinks=sinks, flags=flags)
        if settings == alone or state_fits(head_dim, settings):
            for sinks in (False, True):
                yield kind_for(dtype, head_dim, settings, state=True, sinks=sinks)


def backwards(head_dim: int, dtype: str) -> Iterator[BackwardKind | EndsKind]:
    """Final gradients of a call of one GPU; those that are added to, also by several CTAs where there are few tiles;
    those that leave as they are completed, of keys that are still arriving; and dq in a fixed order."""
    for dlse in (False, True):
        yield EndsKind("prepare", dtype, head_dim, dlse)
    yield EndsKind("finish", dtype, head_dim)
    settings = backward_settings_for(head_dim)
    for gradients, staged in (("final", False), ("added", False), ("shared", False), ("added", True)):
        yield BackwardKind(dtype, head_dim, gradients, staged, staged, settings)
    for gradients in ("final", "added"):
        yield BackwardKind(dtype, head_dim, gradients, False, False, settings, ordered=True)


DIRECTIONS: dict[str, Callable[[int, str], Iterator[Any]]] = {"forward": forwards, "backward": backwards}
"""The kinds of kernel that a head dim and a dtype come to."""


def shipped(
    head_dims: Sequence[int] = tuple(FORWARD),
    dtypes: Sequence[str] = DTYPES,
    directions: Sequence[str] = tuple(DIRECTIONS),
) -> Iterator[Any]:
    """What the command compiles: for each head dim, dtype and direction."""
    for direction in directions:
        for head_dim in head_dims:
            for dtype in dtypes:
                yield from DIRECTIONS[direction](head_dim, dtype)


@dataclass(frozen=True)
class _Line:
    """What became of a kind."""

    text: str
    kept: bool = True


def _fill(kind: Any, anew: bool) -> _Line:
    path = library.path_of(kind)
    if os.path.exists(path) and not anew:
        try:
            library.check(path)
        except library.DamagedError as error:
            print(f"{error}: it is compiled anew", flush=True)
        else:
            return _Line(f"{path.name}: there already")
    begin = time.monotonic()
    made = library.build(kind)
    seconds = time.monotonic() - begin
    if made.path is None:
        return _Line(f"{path.name}: compiled in {seconds:.1f} s, not kept: {made.reason}", kept=False)
    return _Line(f"{path.name}: compiled in {seconds:.1f} s, {made.path.stat().st_size / 1024:.0f} KiB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ring_cute.compile", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--head-dim", type=int, nargs="+", default=list(FORWARD), metavar="D", help="default: %(default)s")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    add("--direction", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS), help="default: all there are")
    add("--jobs", type=int, default=0, help=f"processes at a time; default: one a core, {MOST_JOBS} at most")
    add("--anew", action="store_true", help="compile also what is there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every kernel is in the cache; 1: some could not be kept; 2: wrong usage, or there is no DSL."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if wrong := [head_dim for head_dim in options.head_dim if head_dim not in HEAD_DIMS]:
        parser.error(f"there are no kernels of head dim {wrong[0]}, but of {HEAD_DIMS}")
    kinds = list(dict.fromkeys(shipped(options.head_dim, options.dtype, options.direction)))
    return fill(kinds, options.jobs, anew=options.anew)


def fill(kinds: Sequence[Any], jobs: int = 0, *, anew: bool = False) -> int:
    """Compiles what is not in the cache, `jobs` at a time, and prints what it did. Returns the command's exit code."""
    if not library.dsl_version():
        print(f"{library.DSL} is not installed: {library.GET_DSL}", file=sys.stderr)
        return 2
    print(f"cache {library.cache_folder()}: {len(kinds)} kernels, {library.DSL} {library.dsl_version()}", flush=True)
    jobs = min(jobs or min(os.cpu_count() or 1, MOST_JOBS), len(kinds))
    lines: list[_Line] = []
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for line in pool.map(_fill, kinds, [anew] * len(kinds)):
                lines.append(line)
                print(line.text, flush=True)
    else:
        for kind in kinds:
            lines.append(_fill(kind, anew))
            print(lines[-1].text, flush=True)
    lost = sum(not line.kept for line in lines)
    print(f"{len(lines) - lost} of {len(lines)} kernels are in the cache", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
