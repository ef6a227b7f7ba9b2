"""Which tile a CTA of the Hopper forward computes next, and what there is to know of it, in shared memory.

A record is a row of `items`, sixteen numbers: `schedule.ITEM` with batch entry (4), head (6) and "there is such a tile"
(7) filled in, then the first columns of `schedule.WALK` of the tile's first segment.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

RECORDS = gl.constexpr(4)
"""Tiles, this one and those before and after it, whose records are kept."""


@gluon.jit
def publish(work, turn, items, num_items, section, num_heads, head_batches, total, records, record_full, record_empty):
    """Tile number `work` as a record in shared memory: its row of `items` with batch entry, head and whether there is
    such a tile filled in. Heads come in sections whose keys fit the L2, tiles longest first within one."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    nth = work // (num_items * section)
    rest = work - nth * (num_items * section)
    here = gl.maximum(gl.minimum(section, head_batches - nth * section), 1)
    item = rest // here
    head_batch = nth * section + rest - item * here
    number = gl.arange(0, 16, layout=LANES)
    record = gl.load(items + item * 16 + number, mask=(number >= 0) & (work < total), other=0)
    record = gl.where((number == 4) & (record < 0), head_batch // num_heads, record)
    record = gl.where(number == 6, head_batch % num_heads, record)
    record = gl.where(number == 7, (work < total).to(gl.int32), record)
    slot = turn % RECORDS
    mbarrier.wait(record_empty.index(slot), ((turn // RECORDS) & 1) ^ 1)
    records.index(slot).store(record)
    mbarrier.arrive(record_full.index(slot), count=1)


@gluon.jit
def ask(counter, total):
    """The number of the next tile that nobody has, less the grid's first ones."""
    asked = gl.atomic_add(counter, 1, sem="relaxed")
    if asked == total - 1:  # every CTA asks until it is refused: the last to ask
        gl.atomic_xchg(counter, 0, sem="relaxed")
    return asked


@gluon.jit
def all_columns(record):
    """A record in shared memory, whole in every thread."""
    return record.load(gl.BlockedLayout([16], [32], [4], [0]))


@gluon.jit
def column(record, number: gl.constexpr):
    """One of them, which costs nothing."""
    here = gl.arange(0, 16, layout=gl.BlockedLayout([16], [32], [4], [0])) == number
    return gl.sum(gl.where(here, record, 0), 0)
