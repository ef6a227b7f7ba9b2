"""The producer of the Hopper forward (`kernel`): loads, arrival flags, and which tile is next."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ring_triton.hopper.compat import tma_load
from ring_triton.hopper.records import RECORDS, all_columns, ask, column, publish


@gluon.jit
def await_piece(flags, epoch, piece, polls):
    """Returns once piece has arrived, is poisoned (the largest value) or `polls` looks were in vain."""
    want = gl.load(epoch).to(gl.uint32, bitcast=True)
    seen = gl.inline_asm_elementwise(
        "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [flags + piece], dtype=gl.uint32, is_pure=False, pack=1
    )
    looks = 0
    while (seen < want) & (looks < polls):
        seen = gl.inline_asm_elementwise(
            "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [flags + piece], dtype=gl.uint32, is_pure=False, pack=1
        )
        looks += 1
    # the copy engine's writes, acquired by the generic proxy, must be visible to the async proxy (TMA)
    gl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_state(ends, q_row, batch, head, o_desc, os, o_full, o_empty, turn, CONSUMERS: gl.constexpr):
    """The state of a tile that continues; the buffer alone for one that begins here. After two blocks of the tile, not
    before: a buffer comes back in the first one."""
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(o_empty.index(c), turn & 1)
        if (ends & 1) == 0:
            mbarrier.expect(o_full.index(c), o_desc.block_type.nbytes)
            tma_load(o_desc, [batch, head, q_row + c * 64, 0], o_full.index(c), os.index(c))
        else:
            mbarrier.arrive(o_full.index(c), count=1)


@gluon.jit
def _load_q(
    q_row, batch, head, q_desc, qs, q_full, q_empty, tiles, CONSUMERS: gl.constexpr, QUERIES: gl.constexpr
):  # fmt: skip
    buffer = tiles % QUERIES
    for c in gl.static_range(CONSUMERS):
        at = c * QUERIES + buffer
        if QUERIES == 1:
            mbarrier.wait(q_empty.index(at), (tiles & 1) ^ 1)
        elif tiles > 0:  # given back during the tile before
            mbarrier.wait(q_empty.index(at), ((tiles - 1) // QUERIES) & 1)
        mbarrier.expect(q_full.index(at), q_desc.block_type.nbytes)
        tma_load(q_desc, [batch, head, q_row + c * 64, 0], q_full.index(at), qs.index(at))


@gluon.jit
def producer(
    items, walk, num_items, section, num_heads, head_batches, total, group, k_batch_rows, counter,
    q_desc, k_desc, v_desc, o_desc, flags, epoch, polls, qs, ks, vs, os, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, o_full, o_empty, records, record_full, record_empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, QUERIES: gl.constexpr,
    FLAGS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    FAR: gl.constexpr = 1 << 30
    grid = gl.num_programs(0)
    blocks = 0
    tiles = 0
    turn = 0
    publish(
        gl.program_id(0), 0, items, num_items, section, num_heads, head_batches, total, records, record_full,
        record_empty,
    )  # fmt: skip
    going = gl.program_id(0) < total
    while going:
        record = all_columns(records.index(turn % RECORDS))
        start, stop, q_row = column(record, 0), column(record, 1), column(record, 2)
        batch, ends, head = column(record, 4), column(record, 5), column(record, 6)
        first = blocks
        asked = 0
        if stop > start:
            if QUERIES > 1:
                _load_q(q_row, batch, head, q_desc, qs, q_full, q_empty, tiles, CONSUMERS, QUERIES)
            for w in range(start, stop):
                entry = walk + w * 12
                k_row, k_len, j_lo = gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
                count, right = gl.load(entry + 3), gl.load(entry + 4)
                if FLAGS:
                    await_piece(flags, epoch, gl.load(entry + 8), polls)
                end = batch * k_batch_rows + k_row + k_len
                for t in range(count):
                    # after two blocks there is time: the next tile, and a buffer that comes back in the first block
                    if blocks - first == 2:
                        asked = ask(counter, total)
                        if AHEAD:
                            _load_state(ends, q_row, batch, head, o_desc, os, o_full, o_empty, turn, CONSUMERS)
                    if blocks - first == 3:
                        publish(
                            asked + grid, turn + 1, items, num_items, section, num_heads, head_batches, total,
                            records, record_full, record_empty,
                        )  # fmt: skip
                    block = gl.where(t < right, count - 1 - t, t - right)
                    x = FAR - k_len + j_lo + block * BLOCK
                    stage = blocks % STAGES
                    phase = (blocks // STAGES) & 1
                    mbarrier.wait(k_empty.index(stage), phase ^ 1)
                    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                    tma_load(k_desc, [FAR, end, head // group, x, 0], k_full.index(stage), ks.index(stage))
                    if QUERIES == 1:  # noqa: SIM102  # a constant, and a value
                        if blocks == first:  # the last tile's scores free a stage of K before they free Q
                            _load_q(q_row, batch, head, q_desc, qs, q_full, q_empty, tiles, CONSUMERS, QUERIES)
                    mbarrier.wait(v_empty.index(stage), phase ^ 1)
                    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                    tma_load(v_desc, [FAR, end, head // group, x, 0], v_full.index(stage), vs.index(stage))
                    blocks += 1
            tiles += 1
        if blocks - first <= 2:
            asked = ask(counter, total)
            if AHEAD:
                _load_state(ends, q_row, batch, head, o_desc, os, o_full, o_empty, turn, CONSUMERS)
        if blocks - first <= 3:
            publish(
                asked + grid, turn + 1, items, num_items, section, num_heads, head_batches, total, records,
                record_full, record_empty,
            )  # fmt: skip
        going = asked + grid < total
        turn += 1
