"""Launch settings of the kernels, as data. No DSL is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

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
    """Per thread, after they are moved: 128 x (consumers x consumer's + producer's) are at most 65536."""
    consumers: int = 2
    """Consumer warpgroups of 64 rows each."""
    overlap: bool = False
    """Exponentials come before the wait for the sums that they overlap, with a branch in between that holds ptxas to
    it; otherwise only the maximum of the next scores does."""
    lazy: bool = True
    """O is multiplied for a larger maximum only once some row of a warp has grown by a factor of 256, until when its
    probabilities are of the older maximum and up to 256 (they are rounded relatively, and sums are fp32)."""
    query_columns: int = 0
    """So many columns of a consumer's queries stay in registers, so that scores read less of shared memory: of all
    that products of a block of 128 keys read at most a quarter, or 32 of the 128 bytes a clock while scores are
    computed. All of them: their buffer is free again at once."""
    cluster: int = 1
    """CTAs that share each load of keys: a tile has the rows of all of them."""
    turns: bool = False
    """Consumers issue a block's products in turn: so they are at different places of a block, one at its products while
    others are at their exponentials, into which they fall by themselves only now and then."""
    cache_hints: bool = False
    """L2 is told to keep keys and values rather than queries."""
    reason: str = field(default="", compare=False)
    """Why these: what was measured."""

    @property
    def own_rows(self) -> int:
        """Rows of a CTA."""
        return 64 * self.consumers

    @property
    def tile_rows(self) -> int:
        return self.own_rows * self.cluster

    @property
    def words(self) -> tuple[str, ...]:
        """Them as part of a file's name: the numbers, then what differs from the defaults."""
        changed = [
            f"{f.name}{getattr(self, f.name)}"
            for f in fields(self)[4:]
            if f.compare and getattr(self, f.name) != f.default
        ]
        numbers = f"b{self.block}x{self.stages}", f"r{self.consumer_registers}.{self.producer_registers}"
        return *numbers, *changed


FORWARD: dict[int, Settings] = {
    # padded head dim: S, P of 64 x block and O of 64 x head dim live in registers, two rings and Q in 227 KiB
    64: Settings(
        consumers=3,
        consumer_registers=160,
        turns=True,
        reason="TFLOP/s causal, full at 4096, 16384 and 32768: 449, 494, 515, 537, 534, 541; not in turn 410, 440, "
        "470, 479, 487, 489; in pairs 407, 465, 495, 521, 514, 529, these in turn 431, 480, 509, 534, 524, 541 "
        "(2026-11-29). Before there were turns two consumers made 440 / 441 at 16384, three 482 / 486, not lazy "
        "452 / 450, blocks of 192 445 / 447, one of eight exponentials by polynomial 460 / 463",
    ),
    128: Settings(
        reason="618 / 616 TFLOP/s causal / full at 16384, where a matrix product has 674 at the same 690 W; not lazy "
        "617 / 621, overlap 1 627 / 634, queries in registers 627 / 612, blocks of 160 609 / 623, of "
        "176 641 / 615, in turn: within the noise of one another. Exponentials by polynomial 606 / 611",
    ),
    192: Settings(
        block=112,
        turns=True,
        reason="TFLOP/s causal, full at 4096, then at 16384 in pairs: 592, 655, 699, 727; not in turn 583, 641, 694, "
        "719 (each by itself for a second, 2026-11-29). Before there were turns 669 / 700 at 16384, overlap 650 / 701, "
        "blocks of 96 667 / 710",
    ),
    256: Settings(
        block=80,
        query_columns=96,
        reason="causal, full at 4096, then at 16384, alone 639, 683, 691, 727, in pairs 592, 697, 715, 743; no column "
        "of the queries in registers 633, 672, 693, 726 and 595, 671, 712, 738; blocks of 64, 128 columns 633, 684, "
        "703, 738; in turn no difference (2026-11-29). Of 80 keys scores read 115 of 128 bytes a clock",
    ),
}
"""By head dim, rounded up to the next key. Measured on an H200 that its power limits, DSL 4.8.1, 2026-11-22
(`gpu_probe.py variants`)."""

PAIRED: dict[int, float] = {8192: 1.1, 4096: 1.01}
"""Two CTAs share keys (`cluster=2`), half as many bytes of L2 a product, where a query sees so many on average, and the
longer halves of pairs come to at most that much work; a state that is carried on must come and go by TMA. Under a
causal mask pairs have 1.03 times the work at 4096 tokens, 1.015 at 8192, 1.008 at 16384. TFLOP/s in pairs and alone, at
2048, 4096, 8192, 16384 and 32768 tokens:
128: causal 538 / 562, 573 / 585, 615 / 608, 650 / 625, 668 / 638, full 577 / 606, 616 / 639, 645 / 621, 664 / 631,
     668 / 638; with 32/8 heads 499 / 533, 579 / 587, 624 / 609, 653 / 630, 668 / 638, full 581 / 595, 615 / 589,
     642 / 617, 659 / 627, 676 / 642
192: causal 475 / 535, 570 / 604, 635 / 646, 697 / 656, 717 / 684, full 583 / 639, 655 / 648, 708 / 661, 725 / 697,
     751 / 707
256: causal 500 / 576, 578 / 652, 644 / 637, 687 / 658, 708 / 661, full 614 / 630, 670 / 684, 708 / 675, 728 / 704,
     741 / 711
On an H200, 2026-11-29 (`gpu_probe.py clusters`). What pairs save is power: where each runs by itself for a second they
are 2 to 7 % faster at 16384 tokens; among others, at a clock that all of them have made, from 5 % slower (head dim
256) to 4 % faster (128). Four steps of 8192 keys made 648 in pairs and 616 alone where one call made 675 and 649."""
PAIRED_HEAD_DIMS = (128, 192, 256)
"""Padded. At head dim 64, where three consumers share keys and take turns, pairs are 1 % faster at 16384 tokens where
each runs by itself, and in turn with others 0 to 7 % slower from 4096 to 32768 (`FORWARD`)."""

_FEWER_COLUMNS = Settings(
    block=80,
    query_columns=64,
    reason="96 columns of the queries spill; 582 / 598 TFLOP/s, not lazy 584 / 602, blocks of 64 with 128 columns "
    "574 / 585; with ALiBi 579 / 575, not lazy 548 / 552, blocks of 64 566 / 546",
)
_TWO = Settings(
    consumer_registers=232,
    producer_registers=40,
    reason="three consumers of 160 registers spill, two have the room: 257 / 255 TFLOP/s, not lazy 256 / 253, in turn "
    "235 / 236, blocks of 192 249 / 247; with 24 registers DSL 4.7's producer spills",
)
SHAPED: dict[tuple[int, bool, bool], Settings] = {
    (64, True, False): _TWO,
    (64, True, True): replace(
        _TWO, lazy=False, reason="252 / 251 TFLOP/s, lazy 230 / 244, in turn 238 / 236, blocks of 192 218 / 217"
    ),
    (128, True, False): Settings(lazy=False, reason="lazy spills where steps accumulate; 438 TFLOP/s, plain 635"),
    (128, True, True): Settings(
        block=112, lazy=False, reason="128 spills where steps accumulate; 425 TFLOP/s; ALiBi alone, as plain, 548"
    ),
    (256, True, False): _FEWER_COLUMNS,
    (256, True, True): _FEWER_COLUMNS,
}
"""By padded head dim, softcap, ALiBi: where shaped scores take others. Measured causal / full, 16384 tokens, 32/8
heads, 16/16 at head dim 256 (`gpu_probe.py shaped` and `shaped_variants`; 128 causal only)."""


NARROWER: dict[int, dict[str, Any]] = {128: {"consumer_registers": 232, "producer_registers": 40}}
"""What differs where a tile, of that width, is wider than the head dim. 128: the producer of a ring's steps spills with
24 registers (head dims 72 to 104); consumers, which sum fewer columns, need fewer than 232."""


def padded_head_dim(head_dim: int) -> int:
    """The columns of a tile in shared memory; those beyond the head dim are zeros that TMA fills in, and nothing is
    computed of them."""
    return next(width for width in FORWARD if head_dim <= width)


def settings_for(head_dim: int, *, softcap: bool = False, alibi: bool = False) -> Settings:
    """The settings for a head dim and scores."""
    width = padded_head_dim(head_dim)
    chosen = SHAPED.get((width, softcap, alibi), FORWARD[width])
    return replace(chosen, **NARROWER.get(width, {})) if head_dim < width else chosen


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
    settings: Settings
    state_tma: bool = False
    """A tile's state arrives while it is computed, and leaves while the next one is, by TMA and through shared memory
    of its own, where final rows leave through as well; otherwise at the tile's end, from and to registers."""
    softcap: bool = False
    alibi: bool = False

    @property
    def shaped(self) -> bool:
        """Scores are more than products times a scale (`hopper.scores`)."""
        return self.softcap or self.alibi

    @property
    def padded(self) -> int:
        return padded_head_dim(self.head_dim)

    @property
    def out_tma(self) -> bool:
        """Output of whole tiles leaves by TMA, through the state's buffer or the queries'."""
        return self.state_tma or self.queries > 1

    @property
    def begins_early(self) -> bool:
        """The next tile's first scores are under way while a tile ends: there are registers for them, as there are not
        where its state comes and goes from registers."""
        return self.state_tma or not self.state

    @property
    def queries_ahead(self) -> bool:
        """The next tile's queries have a place of their own, and come while this one is computed; otherwise they come
        when all of its scores are."""
        return self.queries > 1 or self.settings.query_columns >= self.padded

    @property
    def queries(self) -> int:
        """Buffers for a consumer's queries: two, where shared memory holds them beside the rings."""
        return query_buffers(self.head_dim, self.settings, self.state_tma)

    @property
    def shared_bytes(self) -> int:
        s = self.settings
        return 2 * self.padded * (2 * s.stages * s.block + (self.queries + 2 * self.state_tma) * s.own_rows)


def query_buffers(head_dim: int, settings: Settings, state_tma: bool = False) -> int:
    """See `ForwardKind.queries`."""
    return 2 if _fits(head_dim, settings, 2 + 2 * state_tma) else 1


def state_fits(head_dim: int, settings: Settings) -> bool:
    """Whether shared memory holds a tile's state, in fp32, beside rings and queries."""
    return _fits(head_dim, settings, 3)


def _fits(head_dim: int, settings: Settings, tiles: int) -> bool:
    rows = 2 * settings.stages * settings.block + tiles * settings.own_rows
    return 2 * rows * padded_head_dim(head_dim) <= SHARED_BYTES


def kind_for(
    dtype: str,
    head_dim: int,
    settings: Settings | None = None,
    *,
    state: bool = False,
    sinks: bool = False,
    flags: bool = False,
    state_tma: bool = True,
    softcap: bool = False,
    alibi: bool = False,
) -> ForwardKind:
    """The kernel for a call; state_tma: whether TMA can address its state at all."""
    chosen = settings or settings_for(head_dim, softcap=softcap, alibi=alibi)
    ahead = state and state_tma and state_fits(head_dim, chosen)
    if ahead and query_buffers(head_dim, chosen, True) == 1:  # free for the next tile's as soon as they are read
        chosen = replace(chosen, query_columns=padded_head_dim(head_dim))
    return ForwardKind(dtype, head_dim, state, sinks, flags, chosen, ahead, softcap, alibi)
