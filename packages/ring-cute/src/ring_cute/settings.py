"""Launch settings of the kernels, as data. No DSL is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, field

CONSUMERS = 2
"""Consumer warpgroups of 64 rows each."""
TILE_ROWS = 64 * CONSUMERS
SHARED_BYTES = 226 << 10
"""Of buffers in shared memory; a kilobyte is left for barriers and records."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How one kind of forward is launched."""

    block: int = 128
    """Keys a block."""
    stages: int = 2
    """Blocks of K, and of V, in shared memory; a power of two."""
    consumer_registers: int = 240
    producer_registers: int = 24
    """Per thread, after they are moved: 128 x (2 x consumers' + producer's) are at most 65536."""
    ping_pong: bool = False
    """Consumers issue their products in turns."""
    overlap: bool = False
    """Exponentials come before the wait for the sums that they overlap, with a branch in between that holds ptxas to
    it; otherwise only the maximum of the next scores does."""
    reason: str = field(default="", compare=False)
    """Why these: what was measured."""


FORWARD: dict[int, Settings] = {
    # padded head dim: S, P of 64 x block and O of 64 x head dim live in registers, two rings and Q in 227 KiB
    64: Settings(reason="not measured yet; ring-triton's best"),
    128: Settings(reason="not measured yet; ring-triton's best"),
}
"""By head dim, rounded up to the next key."""


def padded_head_dim(head_dim: int) -> int:
    """The head dim that is computed with; columns beyond the true one are zeros that TMA fills in."""
    return next(width for width in FORWARD if head_dim <= width)


def settings_for(head_dim: int) -> Settings:
    """The settings for a head dim."""
    return FORWARD[padded_head_dim(head_dim)]


@dataclass(frozen=True, slots=True)
class ForwardKind:
    """What a compiled forward is for: one kernel each."""

    dtype: str
    """ "float16" or "bfloat16"."""
    head_dim: int
    state: bool
    """Strips may begin or end in another table: (state, lse) are read and written."""
    sinks: bool
    flags: bool
    out_tma: bool
    """Output of whole tiles leaves by TMA, through the queries' buffer."""
    settings: Settings

    @property
    def padded(self) -> int:
        return padded_head_dim(self.head_dim)

    @property
    def queries(self) -> int:
        """Buffers for a consumer's queries: two, where shared memory holds them beside the rings."""
        return query_buffers(self.head_dim, self.settings)

    @property
    def shared_bytes(self) -> int:
        return 2 * self.padded * (2 * self.settings.stages * self.settings.block + self.queries * TILE_ROWS)


def query_buffers(head_dim: int, settings: Settings) -> int:
    """See `ForwardKind.queries`."""
    rings, rows = 4 * settings.stages * settings.block, 4 * TILE_ROWS
    return 2 if (rings + rows) * padded_head_dim(head_dim) <= SHARED_BYTES else 1
