"""Launch settings of the backward, as data. No DSL is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, field

TILE_KEYS, WIDE_TILE_KEYS = 128, 64
"""Keys that a CTA owns of a tile: two consumer warpgroups of 64 each; beyond a head dim of 128 the same 64 for both, of
which one has dv and the other dk."""


@dataclass(frozen=True, slots=True)
class BackwardSettings:
    """How one kind of backward is launched."""

    block: int = 64
    """Queries a block; a multiple of 16."""
    q_stages: int = 2
    """Blocks of Q, with lse and delta, in shared memory."""
    do_stages: int = 2
    """Blocks of dO in shared memory."""
    dq_buffers: int = 2
    """Beyond a head dim of 128: buffers for dq on its way, of 64 columns; two, or one for each 64 columns."""
    k_columns: int = 0
    v_columns: int = 0
    """Beyond a head dim of 128: so many of D that the consumer of K, or of V, keeps in registers as well, so that
    scores, or dP, read less of shared memory."""
    cluster: int = 1
    """Beyond a head dim of 128: CTAs that own a tile together, two at most (`paired_consumer`)."""
    consumer_registers: int = 240
    producer_registers: int = 24
    """Per thread, after they are moved: a CTA starts with 168 each, so 2 x consumers' + producer's are at most 504."""
    reason: str = field(default="", compare=False)
    """Why these: what was measured."""


BACKWARD: dict[int, BackwardSettings] = {
    # padded head dim: dk and dv (128 x D), P and dP (128 x block) and dq (block x D) live in the registers of two
    # warpgroups; K, V, ds twice, dq in fp32 and the stages in 227 KiB
    64: BackwardSettings(
        block=128,
        reason="TFLOP/s causal, full at 4096, then at 16384: 497, 508, 552, 522; three stages of Q 494, 511, 534, 534; "
        "blocks of 96 465, 480, 507, 500, with three stages 468, 488, 507, 507",
    ),
    128: BackwardSettings(
        block=80,
        reason="TFLOP/s causal, full at 4096, then at 16384, with 32/8 heads: 607, 585, 605, 613, 590, 613; of 64 "
        "541, 569, 586, 583, 564, 570, with three stages of Q 542, 569, 594, 595, 588, 597, of both 542, 579, 589, "
        "590, 565, 561",
    ),
    # `wide_consumer`: dv or dk (64 x D), scores or dP (64 x block) and 64 columns of dq live in the registers of one
    # warpgroup each; K, V, the stages, ds twice, P in fp32 and buffers of dq in 227 KiB. `paired_consumer`: the peer's
    # K instead of V, half as much of ds and dq; V in registers beside dk and a single share of dq, of which 112 columns
    # of K leave no room for more beside dv and two (ptxas then waits for each product by itself). The load warp has
    # more to keep: with 24 registers it spills
    192: BackwardSettings(
        dq_buffers=3,
        k_columns=112,
        v_columns=192,
        cluster=2,
        consumer_registers=232,
        producer_registers=40,
        reason="the whole backward 450, 492, 535, 543; one stage of dO 438, 490, 535, 540, and three of Q 428, 476, "
        "521, 528; three, two and two buffers of dq 423, 466, 503, 509; half of V in registers, and one share of dq "
        "with dv, 433, 464, 508, 511 where with all of V, and two shares, it was 432, 472, 518, 522; one CTA a tile, "
        "two stages of both, 128 columns, the main kernel 442, 436, 456, 457",
    ),
    256: BackwardSettings(
        do_stages=1,
        reason="417, 428, 432, 446; one stage of each 392, 371, 420, 389, with four buffers of dq 391, 378, 423, 390: "
        "dO is free again before Q, whose second stage lets scores run ahead",
    ),
}
"""By head dim, rounded up to the next key. Measured on an H200, DSL 4.8.1, 2026-11-28 (192: 2026-11-29, 256:
2026-11-22): the main kernel alone (`gpu_probe_backward.py variants`)."""

_CAPPED = BackwardSettings(block=96, q_stages=3, reason="not measured yet; of 128 queries spills")
SHAPED: dict[tuple[int, bool, bool], BackwardSettings] = {
    (64, True, False): _CAPPED,
    (64, True, True): _CAPPED,
    (128, True, False): BackwardSettings(block=48, q_stages=3, reason="483 / 490 TFLOP/s; of 64 queries spills"),
    (128, False, True): BackwardSettings(q_stages=3, reason="597 / 626, plain 568 / 586; others not measured"),
    (128, True, True): BackwardSettings(q_stages=3, reason="539 / 557; of 80 queries spills"),
}
"""By padded head dim, softcap, ALiBi: where shaped scores take others. Measured causal / full, 16384 tokens, 32/8 heads
(`gpu_probe.py shaped`, the whole backward), 2026-11-28."""


def backward_head_dim(head_dim: int) -> int:
    """The columns of a tile in shared memory; those beyond the head dim are zeros that TMA fills in."""
    return next(width for width in BACKWARD if head_dim <= width)


def backward_settings_for(head_dim: int, *, softcap: bool = False, alibi: bool = False) -> BackwardSettings:
    """The settings for a head dim and scores."""
    width = backward_head_dim(head_dim)
    return SHAPED.get((width, softcap, alibi), BACKWARD[width])


def is_wide(head_dim: int) -> bool:
    """Whether two warpgroups' registers cannot hold dk and dv of 128 keys: `wide_consumer` divides them."""
    return head_dim > 128


def tile_keys_of(head_dim: int, settings: BackwardSettings) -> int:
    """Keys that a tile owns."""
    return WIDE_TILE_KEYS * settings.cluster if is_wide(head_dim) else TILE_KEYS


def senders_of(head_dim: int, settings: BackwardSettings) -> int:
    """Warps that send dq on its way, of different columns or rows: each counts whose turn it is by itself."""
    return 2 * settings.cluster if is_wide(head_dim) else 1


@dataclass(frozen=True, slots=True)
class BackwardKind:
    """What a compiled backward is for: one kernel each."""

    dtype: str
    """ "float16" or "bfloat16"."""
    head_dim: int
    gradients: str
    """What becomes of dk and dv: "final", written in the inputs' dtype; "added" to fp32 that one CTA owns; "shared",
    added to fp32 that several CTAs add to."""
    flags: bool
    departures: bool
    settings: BackwardSettings
    ordered: bool = False
    """dq is summed in a fixed order."""
    softcap: bool = False
    alibi: bool = False

    @property
    def shaped(self) -> bool:
        """Scores are more than products times a scale (`hopper.scores`)."""
        return self.softcap or self.alibi

    @property
    def padded(self) -> int:
        return backward_head_dim(self.head_dim)

    @property
    def wide(self) -> bool:
        """See `is_wide`."""
        return is_wide(self.head_dim)

    @property
    def paired(self) -> bool:
        """Whether two CTAs own a tile together."""
        return self.settings.cluster > 1

    @property
    def shared_bytes(self) -> int:
        """Of buffers: K, V, stages of Q and dO, ds twice, dq; where it is wide, P."""
        s = self.settings
        if self.paired:  # K of both; ds of its keys, and of the peer's for half of the queries, of which dq is
            keys_and_stages = self.padded * (2 * WIDE_TILE_KEYS + (s.q_stages + s.do_stages) * s.block)
            p_ds_dq = s.block * (4 * WIDE_TILE_KEYS + 2 * 3 * WIDE_TILE_KEYS + 2 * 64 * s.dq_buffers)
            return 2 * keys_and_stages + p_ds_dq + 8 * s.block * s.q_stages
        keys = 2 * tile_keys_of(self.head_dim, s)
        keys_and_stages = self.padded * (keys + (s.q_stages + s.do_stages) * s.block)
        if self.wide:
            p_ds_dq = 4 * s.block * (2 * WIDE_TILE_KEYS + 64 * s.dq_buffers)
            return 2 * keys_and_stages + p_ds_dq + 8 * s.block * s.q_stages
        return 2 * keys_and_stages + 4 * s.block * TILE_KEYS + 4 * s.block * self.padded + 8 * s.block * s.q_stages


@dataclass(frozen=True, slots=True)
class EndsKind:
    """What a compiled `prepare` or `finish` is for."""

    step: str
    """ "prepare" or "finish"."""
    dtype: str
    head_dim: int
    dlse: bool = False
