"""What tests of the cache start as processes of their own: `cached.py WHAT`, on one kind of kernel."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ring_cute import compile as command
from ring_cute import library
from ring_cute.compile import forwards

KIND = next(forwards(64, "bfloat16"))


def fill(*arguments: str) -> None:
    """The command, which knows one kind alone."""
    command.DIRECTIONS["forward"] = lambda head_dim, dtype: iter([KIND])
    sys.exit(command.main(["--head-dim", "64", "--dtype", "bfloat16", "--direction", "forward", *arguments]))


def load() -> None:
    """What a user's process does, timed, and what it has imported for it."""
    begin = time.perf_counter()
    kernel = library.load(KIND)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "type": type(kernel).__name__, "cutlass": "cutlass" in sys.modules}))


def unlinked(*compilers: str) -> None:
    """Compiled once, and kept with these folders as the PATH, one after another."""
    import os

    from ring_cute.hopper import compiling

    compiled = compiling.compile_kind(KIND)
    compiling.compile_kind = lambda kind: compiled
    found: list[dict[str, Any]] = []
    for path in compilers:
        os.environ["PATH"] = path
        made = library.build(KIND)
        library.load.cache_clear()
        found.append({"reason": made.reason, "kept": made.path is not None, "callable": library.load(KIND) is compiled})
    print(json.dumps(found))


def write(path: Path, number: int) -> int:
    """Keeps contents of one's own, and counts how often what is there, whoever wrote it, is whole."""
    for turn in range(40):
        library.keep(bytes([number]) * (10_000 * (1 + (number + turn) % 7)), path)
        library.check(path)
    return 40


if __name__ == "__main__":
    {"fill": fill, "load": load, "unlinked": unlinked}[sys.argv[1]](*sys.argv[2:])
