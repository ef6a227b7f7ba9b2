"""Which tile a CTA computes next, and what there is to know of it, in shared memory.

A record is a row of `items`, sixteen numbers: `ring_core.tiles.ITEM` with batch entry, head and "there is such a tile"
filled in, then the first columns of `ring_core.tiles.WALK` of the tile's first segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Int32, cute

from ring_cute.hopper import ptx

RECORD_BITS = 2
RECORDS = 1 << RECORD_BITS
"""Tiles, this one and those before and after it, whose records are kept."""
START, STOP, Q_ROW, ROWS, BATCH, ENDS, HEAD, EXISTS = range(8)
K_LEN, J_LO, NUMBER, RIGHT, EDGES, LOWER, UPPER = range(9, 16)
DISTANCE, STRIDE = 10, 11
"""Columns of `ring_core.tiles.WALK` that records have no room for."""
WALK_COLUMNS = 12


@dataclass(frozen=True)
class Work:
    """How tiles are numbered: heads come in sections whose keys fit the L2, tiles longest first within one."""

    items: Any  # (N * 16) int32
    walk: Any  # (M * 12) int32
    counter: Any  # (1) int32
    num_items: Any
    section: Any
    num_heads: Any
    head_batches: Any
    total: Any
    group: Any
    k_batch_rows: Any


@cute.jit
def publish(number: Int32, turn: Int32, lane: Int32, work, records, full, empty):
    """Tile number `number` as the record of the CTA's tile `turn`. By one warp."""
    nth = number // (work.num_items * work.section)
    rest = number - nth * (work.num_items * work.section)
    here = cute.math.max(cute.math.min(work.section, work.head_batches - nth * work.section), 1)
    item = rest // here
    head_batch = nth * work.section + rest - item * here
    slot = turn & (RECORDS - 1)
    ptx.wait(empty + slot, ((turn >> RECORD_BITS) & 1) ^ 1)
    if lane < 16:
        value = Int32(0)
        if number < work.total:
            value = work.items[item * 16 + lane]
            if lane == BATCH and value < 0:
                value = head_batch // work.num_heads
            if lane == HEAD:
                value = head_batch % work.num_heads
            if lane == EXISTS:
                value = Int32(1)
        records[lane, slot] = value
    cute.arch.sync_warp()
    ptx.arrive(full + slot, lane == 0)


@cute.jit
def ask(lane: Int32, work):
    """The number of the next tile that nobody has, less the grid's first ones. By one warp."""
    asked = Int32(0)
    if lane == 0:
        asked = cute.arch.atomic_add(work.counter.iterator, Int32(1), sem="relaxed", scope="gpu")
        if asked == work.total - 1:  # every CTA asks until it is refused: the last to ask
            cute.arch.atomic_exch(work.counter.iterator, Int32(0), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(asked, 0)


@cute.jit
def ask_once(lane, work, cluster: cutlass.Constexpr):
    """Once for all of the cluster."""
    asked = Int32(0)
    if cutlass.const_expr(cluster > 1):
        if cute.arch.block_idx_in_cluster() == 0:
            asked = ask(lane, work)
    else:
        asked = ask(lane, work)
    return asked


@cute.jit
def tell(asked, turn, lane, shared, cluster: cutlass.Constexpr, bits: cutlass.Constexpr = RECORD_BITS):
    """What the cluster's first CTA was told, of its tile `turn`, to all of them. bits: of the number of records."""
    if cutlass.const_expr(cluster > 1):
        slots = 1 << bits
        sent = turn - 1  # numbers before this one: the first tile's is known
        slot = sent & (slots - 1)
        if cute.arch.block_idx_in_cluster() == 0:
            # its place is free once all have finished the tile whose record makes room for this one's
            ptx.wait(shared.record_empty + (turn & (slots - 1)), ((turn >> bits) & 1) ^ 1)
            if lane > 0 and lane < cluster:
                ptx.send(asked, shared.numbers.iterator + slot, shared.number_full + slot, lane)
        else:
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(shared.number_full + slot, 4)
            ptx.wait(shared.number_full + slot, (sent >> bits) & 1)
            asked = shared.numbers[slot]
    return asked
