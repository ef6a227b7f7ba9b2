"""Fills the cache of compiled kernels: `python -m ring_cute.compile [HEAD_DIM…]`. Needs the DSL, but no GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from ring_cute.settings import FORWARD, ForwardKind, kind_for


def shipped(head_dims: tuple[int, ...] = tuple(FORWARD)) -> Iterator[ForwardKind]:
    """What calls on contiguous tensors ask for."""
    for head_dim in head_dims:
        for dtype in ("bfloat16", "float16"):
            for state, sinks, flags in (
                (False, False, False),
                (True, False, False),
                (False, False, True),
                (False, True, False),
                (True, True, False),
            ):
                yield kind_for(dtype, head_dim, state=state, sinks=sinks, flags=flags)


def main() -> None:
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
    from ring_cute import library

    for kind in shipped(tuple(map(int, sys.argv[1:])) or tuple(FORWARD)):
        if library.find(kind) is None:
            begin = time.monotonic()
            library.build(kind)
            print(f"{library.path_of(kind)}: {time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
