"""The Hopper forward in Gluon: one launch over all tiles of a table.

    default partition (4 warps, few registers)        one partition per 64 rows (4 warps, many registers)
    ┌──────────── producer ────────────┐              ┌──────────────── consumer ────────────────┐
    │ Q tile, then K and V blocks      │── full ────►│ S[n+1] = Q K[n+1]ᵀ   issued               │
    │ by TMA into two rings of STAGES  │              │ O += P[n] V[n]        issued               │
    │ (waits for arrival flags before  │◄── empty ───│ softmax of S[n+1] while O is summed        │
    │ a piece's first load)            │              │ P stays in registers                       │
    └──────────────────────────────────┘              └──────────────────────────────────────────┘

Every tile begins from nothing; where its strip continues, what earlier steps have left in (state, lse) is added at its
end, so that neither loading nor storing it holds up the products:

    tile n:  first block │ blocks ...                              │ last sums │ merge, write to `os`
    `os`:    stored n-1  │ tile n's state arrives by TMA, waits                │ (read) stored by TMA while n+1 begins

(AHEAD: 32 KiB a consumer at head dim 128, which is all that is left; beyond that the state is loaded and stored from
registers at the end. TMA stores boxes of 64 rows: what has fewer leaves from registers too.)

Where they fit (QUERIES = 2), the queries have two buffers a consumer, and a tile's output leaves by TMA through the one
that its queries were in, which is given back in the next tile's first block.

Barriers: `record_full`/`record_empty` one per slot of `records`, `q_full`/`q_empty` one per consumer and buffer, with
AHEAD `o_full`/`o_empty` one per consumer, `k_full`/`k_empty` and `v_full`/`v_empty` one per stage. Tiles and blocks are
counted over the whole life of the CTA; slot, stage and phase follow from the count.

Keys and values are read through a descriptor whose bounds are the segment's own (the ragged view of
`triton.tools.ragged_tma`): rows beyond a segment arrive as zeros whatever memory holds there, so 0 x NaN cannot occur
and nothing has to be cleared. Rows of queries beyond a tile's last are read, computed and dropped.

Which tile next: CTA p takes tile p and then what an atomic counter says, which the last CTA to ask sets back to 0. The
producer asks while a tile is computed, and leaves what there is to know of the next one in `records` in shared memory,
so that nobody waits for global memory between two tiles.

After Shah et al. (arXiv:2407.08608): roles, register split, order of the two products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ring_triton.hopper.compat import tma_store
from ring_triton.hopper.producer import producer
from ring_triton.hopper.records import RECORDS, all_columns, column


@gluon.jit
def _mask(s, rows, columns, j, k_len, lower, upper):
    """-inf where row r does not see key j + column."""
    first = rows + (lower - j)
    last = gl.minimum(rows + (upper - j), k_len - 1 - j)
    seen = (columns[None, :] >= first[:, None]) & (columns[None, :] <= last[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _softmax(s, m, norm, scale, MASKED: gl.constexpr):
    """One step of the online softmax in base 2: probabilities, the factor for what was summed before, m, norm."""
    new = gl.maximum(m, gl.max(s, 1) * scale)
    base = new
    if MASKED:
        base = gl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing yet
    p = gl.exp2(s * scale - base[:, None])
    decay = gl.exp2(m - base)
    return p, decay, new, norm * decay + gl.sum(p, 1)


@gluon.jit
def _block(
    q, ks, vs, k_full, k_empty, v_full, v_empty, blocks, p, m, norm, o, zero, scale, rows, columns,
    j, k_len, lower, upper, OL: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, CID: gl.constexpr,
    MASKED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Scores of this block, then the sum over the values of the block before, whose probabilities `p` are at hand."""
    stage = blocks % STAGES
    mbarrier.wait(k_full.index(stage), (blocks // STAGES) & 1)
    if PING_PONG:
        _my_turn(CID)
    scores = warpgroup_mma(q, ks.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    before = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((blocks - 1) // STAGES) & 1)
    sums = warpgroup_mma(p, vs.index(before), o, is_async=True)
    if PING_PONG:
        _your_turn(CID)
    s = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        s = _mask(s, rows, columns, j, k_len, lower, upper)
    p32, decay, m, norm = _softmax(s, m, norm, scale, MASKED)
    if OVERLAP > 1:
        p = gl.convert_layout(p32.to(q.dtype), gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2))
    if OVERLAP > 0:
        # over already, but a branch: ptxas would otherwise wait for the sums before the exponentials they overlap
        mbarrier.wait(v_full.index(before), ((blocks - 1) // STAGES) & 1)
    o = warpgroup_mma_wait(0, [sums])
    mbarrier.arrive(v_empty.index(before), count=1)
    o = o * gl.convert_layout(decay, gl.SliceLayout(1, OL))[:, None]
    if OVERLAP < 2:
        p = gl.convert_layout(p32.to(q.dtype), gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2))
    return p, m, norm, o


@gluon.jit
def _my_turn(CID: gl.constexpr):
    if CID == 0:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _your_turn(CID: gl.constexpr):
    if CID == 0:
        gl.inline_asm_elementwise("bar.arrive 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _earlier_lse(tile, lse, lse_b, lse_h, rows):
    """What earlier steps have left of a tile's rows, in base 2; -inf where it begins here."""
    record = all_columns(tile)
    q_row, count, batch = column(record, 2), column(record, 3), column(record, 4)
    ends, head = column(record, 5), column(record, 6)
    at = lse + batch.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h + q_row + rows
    return gl.load(at, mask=(rows < count) & ((ends & 1) == 0), other=-float("inf")) * 1.4426950408889634


@gluon.jit
def _attend_tile(
    tile, blocks, tiles, turn, walk, out, lse, state, sinks, scale,
    out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
    qs, ks, vs, os, o_desc, out_desc, q_full, q_empty, k_full, k_empty, v_full, v_empty, o_full, o_empty,
    CID: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, STATE: gl.constexpr, AHEAD: gl.constexpr, OUT_TMA: gl.constexpr, SINKS: gl.constexpr,
    PING_PONG: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """A consumer's part of the CTA's tile number `turn`: its 64 rows; returns blocks and tiles walked so far."""
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    record = all_columns(tile)
    start, stop = column(record, 0), column(record, 1)
    rows = CID * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SL))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SL))
    # every tile begins empty but for the sink of its strip; what earlier steps have left is added at its end
    start_m = -float("inf")
    if SINKS:
        sink = gl.load(sinks + column(record, 6)) * 1.4426950408889634
        start_m = gl.where((column(record, 5) & 1) != 0, sink, -float("inf"))
    m = gl.full([64], start_m, gl.float32, layout=gl.SliceLayout(1, SL))
    norm = gl.where(m == -float("inf"), 0.0, 1.0)
    earlier = gl.full([64], -float("inf"), gl.float32, layout=gl.SliceLayout(1, SL))
    o = gl.zeros([64, D], gl.float32, layout=OL)
    if stop > start:
        q_at = CID * QUERIES + tiles % QUERIES
        q = qs.index(q_at)
        zero = gl.zeros([64, BLOCK], gl.float32, layout=SL)
        mbarrier.wait(q_full.index(q_at), (tiles // QUERIES) & 1)
        # the first block has no values to sum before it
        stage = blocks % STAGES
        j = column(record, 10) + gl.where(column(record, 12) > 0, column(record, 11) - 1, 0) * BLOCK
        mbarrier.wait(k_full.index(stage), (blocks // STAGES) & 1)
        if PING_PONG:
            _my_turn(CID)
        scores = warpgroup_mma(q, ks.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if PING_PONG:
            _your_turn(CID)
        s = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = _mask(s, rows, columns, j, column(record, 9), column(record, 14), column(record, 15))
        p32, _decay, m, norm = _softmax(s, m, norm, scale, True)
        if AHEAD or QUERIES > 1:
            tma.store_wait(0)  # what the tile before left in its buffers
        if QUERIES > 1:
            mbarrier.arrive(q_empty.index(CID * QUERIES + (tiles + 1) % QUERIES), count=1)
        if AHEAD:
            mbarrier.arrive(o_empty.index(CID), count=1)
        p = gl.convert_layout(p32.to(q.dtype), gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2))
        blocks += 1
        for n in range(stop - start):
            row = all_columns(tile)
            k_len, j_lo, number, right = column(row, 9), column(row, 10), column(row, 11), column(row, 12)
            edges, lower, upper = column(row, 13), column(row, 14), column(row, 15)
            if n > 0:
                entry = walk + (start + n) * 12
                k_len, j_lo, number = gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)
                right, edges = gl.load(entry + 4), gl.load(entry + 5)
                lower, upper = gl.load(entry + 6), gl.load(entry + 7)
            # not carried: Triton (3.6, 3.7) takes a carried value for unused if only bounds of inner loops use it, and
            # then keeps its first value (github.com/triton-lang/triton/pull/9036)
            done = gl.where(n == 0, 1, 0)
            for t in range(done, edges):
                j = j_lo + gl.where(t < right, number - 1 - t, t - right) * BLOCK
                p, m, norm, o = _block(
                    q, ks, vs, k_full, k_empty, v_full, v_empty, blocks, p, m, norm, o, zero, scale, rows, columns,
                    j, k_len, lower, upper, OL, STAGES, PING_PONG, CID, True, OVERLAP,
                )  # fmt: skip
                blocks += 1
            for _ in range(gl.maximum(done, edges), number):
                p, m, norm, o = _block(
                    q, ks, vs, k_full, k_empty, v_full, v_empty, blocks, p, m, norm, o, zero, scale, rows, columns,
                    0, k_len, lower, upper, OL, STAGES, PING_PONG, CID, False, OVERLAP,
                )  # fmt: skip
                blocks += 1
        if QUERIES == 1:
            mbarrier.arrive(q_empty.index(CID), count=1)  # all scores are computed
        if AHEAD:
            earlier = _earlier_lse(tile, lse, lse_b, lse_h, rows)  # on its way during the last sums
        before = (blocks - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((blocks - 1) // STAGES) & 1)
        sums = warpgroup_mma(p, vs.index(before), o, is_async=True)
        o = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(v_empty.index(before), count=1)
        tiles += 1
    else:
        if AHEAD:
            tma.store_wait(0)
            mbarrier.arrive(o_empty.index(CID), count=1)
            earlier = _earlier_lse(tile, lse, lse_b, lse_h, rows)
    record = all_columns(tile)  # again, so that none of it takes registers meanwhile
    q_row, count, batch = column(record, 2), column(record, 3), column(record, 4)
    ends, head = column(record, 5), column(record, 6)
    o_rows = CID * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    o_columns = gl.arange(0, D, layout=gl.SliceLayout(0, OL))
    o_mask = (o_rows < count)[:, None]
    if HEAD_DIM != D:
        o_mask = o_mask & (o_columns < HEAD_DIM)[None, :]
    out_at = out + batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h + q_row.to(gl.int64) * out_s
    out_at = (out_at + o_rows * out_s)[:, None] + o_columns[None, :]
    if STATE:
        state_at = state + batch.to(gl.int64) * state_b + head.to(gl.int64) * state_h + q_row.to(gl.int64) * state_s
        state_at = (state_at + o_rows * state_s)[:, None] + o_columns[None, :]
    lse_at = lse + batch.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h + q_row
    if STATE:
        if AHEAD:
            mbarrier.wait(o_full.index(CID), turn & 1)
        else:
            earlier = _earlier_lse(tile, lse, lse_b, lse_h, rows)
        if (ends & 1) == 0:
            both = gl.maximum(m, earlier)
            base = gl.where(both == -float("inf"), 0.0, both)  # a row that has seen nothing in any step
            weight, own = gl.exp2(earlier - base), gl.exp2(m - base)
            m = both
            norm = norm * own + weight
            # rows that earlier steps saw nothing of may hold anything
            kept = gl.convert_layout(weight > 0.0, gl.SliceLayout(1, OL))[:, None]
            if AHEAD:
                added = gl.where(kept, os.index(CID).load(OL), 0.0)
            else:
                added = gl.load(state_at, mask=o_mask & kept, other=0.0)
            o = o * gl.convert_layout(own, gl.SliceLayout(1, OL))[:, None]
            o += added * gl.convert_layout(weight, gl.SliceLayout(1, OL))[:, None]
    unseen = norm == 0.0
    gl.store(
        lse_at + rows,
        gl.where(unseen, -float("inf"), (m + gl.log2(norm)) * 0.6931471805599453),
        mask=rows < count,
    )
    o = o * gl.convert_layout(gl.where(unseen, 0.0, 1.0 / norm), gl.SliceLayout(1, OL))[:, None]
    final = True
    if STATE:
        final = (ends & 2) != 0
    whole = count >= CID * 64 + 64  # otherwise a box would reach into the next tile's rows
    if final:
        sent = False
        if OUT_TMA:  # noqa: SIM102  # a constant, and a value
            if whole & (stop > start):
                # through the queries' buffer: all scores are computed, and this tile holds it until the next one
                q = qs.index(CID * QUERIES + (tiles - 1) % QUERIES)
                q.store(o.to(out.dtype.element_ty))
                fence_async_shared()
                tma_store(out_desc, [batch, head, q_row + CID * 64, 0], q)
                sent = True
        if not sent:
            gl.store(out_at, o.to(out.dtype.element_ty), mask=o_mask)
    elif AHEAD:
        if whole:
            os.index(CID).store(o)
            fence_async_shared()
            tma_store(o_desc, [batch, head, q_row + CID * 64, 0], os.index(CID))
        else:
            gl.store(state_at, o, mask=o_mask)
    elif STATE:
        gl.store(state_at, o, mask=o_mask)
    return blocks, tiles


@gluon.jit
def _consumer(
    walk, out, lse, state, sinks, scale, out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
    qs, ks, vs, os, o_desc, out_desc, q_full, q_empty, k_full, k_empty, v_full, v_empty, o_full, o_empty,
    records, record_full, record_empty,
    CID: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, STATE: gl.constexpr, AHEAD: gl.constexpr, OUT_TMA: gl.constexpr, SINKS: gl.constexpr,
    PING_PONG: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    blocks = 0
    tiles = 0
    turn = 0
    if PING_PONG and CID == 1:
        _your_turn(CID)
    going = True
    while going:
        slot = turn % RECORDS
        mbarrier.wait(record_full.index(slot), (turn // RECORDS) & 1)
        going = column(all_columns(records.index(slot)), 7) != 0
        if going:
            blocks, tiles = _attend_tile(
                records.index(slot), blocks, tiles, turn, walk, out, lse, state, sinks, scale,
                out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
                qs, ks, vs, os, o_desc, out_desc, q_full, q_empty, k_full, k_empty, v_full, v_empty, o_full, o_empty,
                CID, BLOCK, D, HEAD_DIM, STAGES, QUERIES, STATE, AHEAD, OUT_TMA, SINKS, PING_PONG, OVERLAP,
            )  # fmt: skip
        mbarrier.arrive(record_empty.index(slot), count=1)
        turn += 1
    if AHEAD or OUT_TMA:
        tma.store_wait(0)  # buffers are read while the CTA lives


@gluon.jit(
    do_not_specialize=[
        "num_items", "section", "num_heads", "head_batches", "total", "group", "k_batch_rows", "polls",
        "lse_b", "lse_h",
    ],
    do_not_specialize_on_alignment=["counter", "flags", "epoch"],  # words inside larger tensors
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, out_desc, out, lse, state, sinks, items, walk, counter, flags, epoch, scale,
    num_items, section, num_heads, head_batches, total, group, k_batch_rows, polls,
    out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
    BLOCK: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, STATE: gl.constexpr, AHEAD: gl.constexpr, OUT_TMA: gl.constexpr, SINKS: gl.constexpr,
    FLAGS: gl.constexpr,
    PING_PONG: gl.constexpr, OVERLAP: gl.constexpr, CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """q_desc, with AHEAD o_desc of the state, with OUT_TMA out_desc (B, Hq, Sq, D), boxes of 64 rows; k_desc, v_desc
    ragged (far, end, Hkv, key, D), boxes of BLOCK keys; scale is the softmax's times log2(e)."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], q_desc.dtype)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], q_desc.dtype)
    qs = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS * QUERIES, 64, D], ROWS)
    ks = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK, D], KEYS)
    vs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK, D], KEYS)
    # of one element where nothing is brought ahead: partitions take it all the same
    O_WIDE: gl.constexpr = D if AHEAD else 16
    O_TALL: gl.constexpr = 64 if AHEAD else 8
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([O_TALL, O_WIDE], gl.float32)
    os = gl.allocate_shared_memory(gl.float32, [CONSUMERS, O_TALL, O_WIDE], SUMS)
    o_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    o_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS * QUERIES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS * QUERIES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    records = gl.allocate_shared_memory(gl.int32, [RECORDS, 16], FLAT)
    record_full = gl.allocate_shared_memory(gl.int64, [RECORDS, 1], BARRIER)
    record_empty = gl.allocate_shared_memory(gl.int64, [RECORDS, 1], BARRIER)
    for i in gl.static_range(CONSUMERS * QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(o_full.index(i), count=1)
        mbarrier.init(o_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(RECORDS):
        mbarrier.init(record_full.index(i), count=1)
        mbarrier.init(record_empty.index(i), count=CONSUMERS)
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (producer, (
                items, walk, num_items, section, num_heads, head_batches, total, group, k_batch_rows, counter,
                q_desc, k_desc, v_desc, o_desc, flags, epoch, polls, qs, ks, vs, os, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, o_full, o_empty, records, record_full, record_empty,
                BLOCK, STAGES, CONSUMERS, QUERIES, FLAGS, AHEAD,
            )),
            (_consumer, (
                walk, out, lse, state, sinks, scale, out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
                qs, ks, vs, os, o_desc, out_desc, q_full, q_empty, k_full, k_empty, v_full, v_empty, o_full, o_empty,
                records, record_full, record_empty,
                C0, BLOCK, D, HEAD_DIM, STAGES, QUERIES, STATE, AHEAD, OUT_TMA, SINKS, PING_PONG, OVERLAP,
            )),
            (_consumer, (
                walk, out, lse, state, sinks, scale, out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
                qs, ks, vs, os, o_desc, out_desc, q_full, q_empty, k_full, k_empty, v_full, v_empty, o_full, o_empty,
                records, record_full, record_empty,
                C1, BLOCK, D, HEAD_DIM, STAGES, QUERIES, STATE, AHEAD, OUT_TMA, SINKS, PING_PONG, OVERLAP,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
