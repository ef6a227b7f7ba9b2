"""Compiles the backward's kernels for sm_90a without a GPU and holds what comes out to account, as `cute_compiling`
does for the forward's: `python cute_compiling_backward.py [GROUP…]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cute_compiling import Compiled, compile_kind

from ring_cute.compile import backwards
from ring_cute.hopper.backward_settings import (
    BACKWARD,
    TILE_KEYS,
    WIDE_TILE_KEYS,
    BackwardKind,
    BackwardSettings,
    backward_settings_for,
)
from ring_cute.settings import SHARED_BYTES


def shaped(head_dim: int, dtype: str) -> Iterator[BackwardKind]:
    """Kinds of shaped scores that `backward_launch` would ask for."""
    for asked in ({"softcap": True}, {"alibi": True}, {"softcap": True, "alibi": True}):
        settings = backward_settings_for(head_dim, **asked)
        for gradients in ("final", "shared", "added"):
            staged = gradients == "added"
            yield BackwardKind(dtype, head_dim, gradients, staged, staged, settings, **asked)


ALONE = BackwardSettings(dq_buffers=3, k_columns=128, v_columns=128)
"""Of head dim 192, a tile of one CTA."""
GROUPS: dict[str, list[Any]] = {
    **{f"backward-{head_dim}": [*backwards(head_dim, "bfloat16")] for head_dim in BACKWARD},
    "backward-padded": [*backwards(40, "float16")],
    "backward-wide-padded": [*backwards(200, "float16")],
    "backward-paired-padded": [*backwards(136, "float16")],
    "backward-variants": [
        BackwardKind("bfloat16", 192, gradients, False, False, settings)
        for settings in (ALONE, replace(backward_settings_for(192), do_stages=1, k_columns=0))
        for gradients in ("final", "shared")
    ],
    **{f"backward-shaped-{head_dim}": [*shaped(head_dim, "bfloat16")] for head_dim in BACKWARD},
}


def problems(compiled: Compiled, kind: Any) -> list[str]:
    """What is wrong with a compiled kernel."""
    wrong = {
        f"{compiled.stack} bytes of stack, {compiled.spilled} moves to and from it": compiled.stack > 0,
        f"{compiled.spilled} moves to and from local memory": compiled.spilled > 0,
        f"{compiled.local} bytes of local memory": compiled.local > 0,
        f"{compiled.registers} registers": not 0 < compiled.registers <= 168,
        "not for sm_90a": ".target sm_90a" not in compiled.ptx,
    }
    if isinstance(kind, BackwardKind):
        products, needed = _products_and_waits(kind)
        loads = 4 * (kind.padded // 64)  # boxes are 64 columns wide: K, V, Q, dO
        sums = len(re.findall(r"\bUTMAREDG\b", compiled.sass))
        # where registers do not suffice ptxas waits for each product by itself, and says so to nobody
        waits = len(re.findall(r"\bWARPGROUP\.DEPBAR", compiled.sass))
        wrong |= {
            f"{compiled.hgmma} wgmma instructions, fewer than {products}": compiled.hgmma < products,
            f"{waits} waits for wgmma, not {needed}: products are serialized": waits != needed,
            "products that are not wgmma": bool(re.search(r"\bHMMA\b", compiled.sass)),
            f"{compiled.loads} TMA loads, fewer than {loads}": compiled.loads < loads,
            f"{sums} TMA reductions of dq": sums < kind.padded // 64,
            f"{kind.shared_bytes} bytes of shared memory": kind.shared_bytes > SHARED_BYTES,
        }
    return [message for message, is_so in wrong.items() if is_so]


def _products_and_waits(kind: BackwardKind) -> tuple[int, int]:
    """The fewest wgmma instructions, and the waits for them that were written."""
    depth, queries = -(-kind.head_dim // 16), kind.settings.block // 16
    if not kind.wide:
        # of a consumer's first block: scores and dP over the head dim, dk and dv over the queries; of the loop's these
        # and dq, over the tile's keys, of the block before; then that of the last
        return 4 * depth + 4 * queries + 2 * (TILE_KEYS // 16), 10
    shares = kind.padded // 64
    if kind.paired:
        # scores and dP before the loop and in it; dv and dk in the loop and of the last block; dq, over the tile's
        # keys, of the block before it, and of the last one. Of each consumer's dq all is waited for together
        return 4 * depth + 4 * queries + 3 * shares * (2 * WIDE_TILE_KEYS // 16), 2 * (1 + 3 + 2 + 1)
    # scores and dP before the loop and in it; dv, dk and dq of each 64 columns in the loop and for the last block
    return 4 * depth + 4 * queries + 2 * shares * (WIDE_TILE_KEYS // 16), 6 + 2 * shares


def main() -> int:
    failed = 0
    for group in sys.argv[1:] or GROUPS:
        for kind in GROUPS[group]:
            got = compile_kind(kind)
            wrong = problems(got, kind)
            failed += bool(wrong)
            what = f"{getattr(kind, 'step', 'backward')} {getattr(kind, 'gradients', '')}".strip()
            what += "".join(f" {word}" for word in ("flags", "softcap", "alibi") if getattr(kind, word, False))
            print(
                f"D {kind.head_dim} {kind.dtype} {what}: {got.registers} registers, {got.stack} B stack, "
                f"{getattr(kind, 'shared_bytes', 0)} B shared, {got.hgmma} wgmma, {got.loads} TMA loads, "
                f"compiled in {got.seconds:.1f} s {wrong or ''}",
                flush=True,
            )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
