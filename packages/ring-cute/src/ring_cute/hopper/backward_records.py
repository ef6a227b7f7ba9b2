"""Which tile of keys a CTA computes next, and what there is to know of it, in shared memory.

A record is sixteen numbers: the first eight columns of `ring_core.key_tiles.ITEM`, batch entry and blocks (of all query
heads that the CTA walks) filled in, in the second the first of its rows of `backward_order.turns_of` where blocks take
turns; then the key head, the first query head, and "there is such a tile".

A row's blocks are walked from the last to the first. Under a causal mask tiles see queries up to the last one, from
different first ones on: so CTAs that begin at a time read the same rows at a time, and where dq is added in a fixed
order (`backward_order`) one need not wait until the one before has come to where it begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlass import Int32, cute

from ring_cute.hopper import ptx

RECORD_BITS = 1
RECORDS = 1 << RECORD_BITS
"""Tiles, this one and the next, whose records are kept."""
START, TURNS, TOKEN, KEYS, BATCH, PIECE, BLOCKS, HEAD, Q_HEAD, EXISTS = 0, 1, 2, 3, 4, 5, 6, 8, 9, 10
Q_START, Q_LEN, I_LO, NUMBER, WHOLE_FROM, WHOLE_TO, LOWER, UPPER, NEXT, DISTANCE, STRIDE = (
    0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
)  # fmt: skip
"""Columns of `ring_core.key_tiles.WALK`."""
WALK_COLUMNS = 12


@dataclass(frozen=True)
class KeyWork:
    """How tiles are numbered: heads come in sections whose rows fit the L2, tiles longest first within one."""

    items: Any  # (N * 8) int32
    walk: Any  # (M * 12) int32
    counter: Any  # (1) int32
    num_items: Any
    section: Any
    num_kv_heads: Any
    head_batches: Any  # batch entries x key heads x parts of a group
    total: Any
    split: Any  # parts that a group's query heads are dealt out in
    members: Any  # query heads of a part
    group: Any


@cute.jit
def publish(number: Int32, turn: Int32, lane: Int32, work, records, full, empty):
    """Tile number `number` as the record of the CTA's tile `turn`. By one warp."""
    nth = number // (work.num_items * work.section)
    rest = number - nth * (work.num_items * work.section)
    here = cute.math.max(cute.math.min(work.section, work.head_batches - nth * work.section), 1)
    item = rest // here
    head_batch = nth * work.section + rest - item * here
    part = head_batch % work.split
    head_batch = head_batch // work.split
    head = head_batch % work.num_kv_heads
    slot = turn & (RECORDS - 1)
    ptx.wait(empty + slot, ((turn >> RECORD_BITS) & 1) ^ 1)
    if lane < 16:
        value = Int32(0)
        if number < work.total:
            if lane < 8:
                value = work.items[item * 8 + lane]
            if lane == BATCH and value < 0:
                value = head_batch // work.num_kv_heads
            if lane == BLOCKS:
                value = value * work.members
            if lane == HEAD:
                value = head
            if lane == Q_HEAD:
                value = head * work.group + part * work.members
            if lane == EXISTS:
                value = Int32(1)
        records[lane, slot] = value
    cute.arch.sync_warp()
    ptx.arrive(full + slot, lane == 0)


@cute.jit
def begin(walk, records, slot):
    """A tile's first block: its row of the walk, its number in that row, and its query head."""
    w, block = records[START, slot], Int32(0)
    if records[BLOCKS, slot] > 0:
        block = walk[w * WALK_COLUMNS + NUMBER] - 1
    return w, block, records[Q_HEAD, slot]


@cute.jit
def following(walk, w, block, q_head):
    """The next block: the one before in this row of the walk, the last one of the next row, or of the next query head's
    first row."""
    block -= 1
    if block < 0:
        then = walk[w * WALK_COLUMNS + NEXT]
        if then <= w:
            q_head += 1
        w = then
        block = walk[w * WALK_COLUMNS + NUMBER] - 1
    return w, block, q_head
