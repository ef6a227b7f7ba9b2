"""Launch settings of the Hopper forward, as data.

As many CTAs as processors ask a counter for tiles. One CTA a tile (D 64: 422 / 423 TFLOP/s causal / full at 16384) and
every n-th tile for a CTA (D 128: 531 / 594) were slower than that, 443 / 441 and 597 / 604, and are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CONSUMERS = 2
"""Consumer warpgroups of 64 rows each: what `kernel.forward_kernel` spells out."""
TILE_ROWS = 64 * CONSUMERS


@dataclass(frozen=True, slots=True)
class Settings:
    """How one kind of call is launched."""

    block: int
    """Keys a block."""
    stages: int
    """Blocks of K, and of V, in shared memory."""
    registers: int
    """Per thread of a consumer; the producer has what is left of 504 a lane of three warpgroups."""
    ping_pong: bool
    """Consumers issue their products in turns."""
    overlap: int = 1
    """What is done while O is being summed: 0 the maximum of the next scores, 1 their exponentials too, 2 and the
    conversion to P, which costs P's registers twice. Read off the SASS: see `kernel._block`."""
    reason: str = field(default="", compare=False)
    """Why these: what was measured."""


FORWARD: dict[int, Settings] = {
    # padded head dim: S and P of 64 x block, O of 64 x head dim live in registers, two rings and Q in 227 KiB
    64: Settings(
        block=128,
        stages=2,
        registers=240,
        ping_pong=False,
        overlap=0,
        reason="443 / 441 TFLOP/s causal / full at 16384; overlap 1: 429 / 422; ping-pong: 439 / 438; blocks of 64: "
        "384; 3 stages: 425 / 421",
    ),
    128: Settings(
        block=128,
        stages=2,
        registers=240,
        ping_pong=False,
        overlap=0,
        reason="536 / 549 TFLOP/s causal / full at 4096, 597 / 604 at 16384; overlap 1: 532 / 548, 580 / 589; "
        "ping-pong: 518 / 557, 598 / 604; blocks of 64: 467 / 490, 523 / 528",
    ),
    256: Settings(
        block=64,
        stages=2,
        registers=240,
        ping_pong=False,
        reason="not measured",
    ),
}
"""By head dim, rounded up to the next key. Measured on an H200, triton 3.6, 2026-11-21 (`gpu_probe.py variants`)."""


def padded_head_dim(head_dim: int) -> int:
    """The head dim that is computed with; columns beyond the true one are zeros that TMA fills in."""
    return next(width for width in FORWARD if head_dim <= width)


def settings_for(head_dim: int) -> Settings:
    """The settings for a head dim."""
    return FORWARD[padded_head_dim(head_dim)]
