"""The Hopper backward in Gluon: one launch over all key tiles of a table.

    default partition (4 warps, few registers)        one partition of two warpgroups (8 warps, many registers)
    ┌──────────── producer ────────────┐              ┌──────────────── consumers: 128 keys ─────────────┐
    │ K and V tile, then blocks of     │              │ s  = exp2(K Q[n]ᵀ - lse)      (keys, queries)     │
    │ queries by TMA: Q and lse in a   │── full ────► │ dv += s dO[n]                 s in registers      │
    │ ring of Q_STAGES, dO and delta   │              │ ds = s (V dO[n]ᵀ - delta)     ──► shared memory   │
    │ in one of DO_STAGES              │◄── empty ─── │ dqᵀ = Kᵀ ds ──► shared memory ──► TMA reduce-add  │
    │ (waits for the piece's arrival)  │              │ dk += ds Q[n]                 ds in registers     │
    └──────────────────────────────────┘              └───────────────────────────────────────────────────┘

A CTA owns a tile of 128 keys of one key head, warpgroup w rows 64 w to 64 w + 63 of it, and walks the queries that see
it, of every query head of the group (or of a part of the group, which then adds to dk and dv atomically). dk and dv
never leave the registers before the end. dq is summed in fp32 in global memory by every CTA that has a part of it.

Order of the products, each of which keeps the tensor cores busy while the line above it is worked off:

    S[n] and dP[n] are under way            exponentials of S[n]
    dv += P dO                              ds = P (dP - delta), to shared memory
    dq = ds K, S[n+1], dk += ds Q           dq to shared memory and away
    dP[n+1]

Barriers: `k_full`, `v_full` once; `q_full`/`q_empty`, `do_full`/`do_empty` one a stage. Block n of the tile is in stage
n % STAGES. Both warpgroups have read a stage when a CTA-wide barrier follows the wait for its last product; the stages
are given back right after such barriers: Q[n] after ds[n+1] is stored, dO[n] after dq[n] is.

Rows of queries and keys are read through descriptors that end where the segment does (see `ring_triton.hopper.kernel`):
beyond it they are zeros, whatever memory holds. lse and delta are read as they lie, and set to what takes no part. A
block may begin at any of their rows, but TMA reads from addresses that are multiples of 16 bytes and traps at others
(triton-lang/triton#9112): there are four copies of each, one for each place of a row in its 16 bytes.

After Shah et al. (arXiv:2407.08608) and Spector et al. (arXiv:2410.20399): transposed scores, dq by asynchronous
reduction.
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

from ring_triton.hopper.compat import thread_barrier, tma_load, tma_reduce_add, warpgroup_mma_init
from ring_triton.hopper.producer import await_piece


@gluon.jit
def _item(work, items, num_items, section, num_heads, head_batches, split):
    """What program number `work` is: heads come in sections whose rows fit the L2, tiles longest first within one."""
    nth = work // (num_items * section)
    rest = work - nth * (num_items * section)
    here = gl.minimum(section, head_batches - nth * section)
    item = rest // here
    head_batch = nth * section + rest - item * here
    part = head_batch % split
    head_batch = head_batch // split
    entry = items + item * 8
    batch = gl.load(entry + 4)
    batch = gl.where(batch < 0, head_batch // num_heads, batch)
    return entry, batch, head_batch % num_heads, part


@gluon.jit
def _advance(walk, w, block, first, step):
    """The next block: of this row of the walk, of the next row, or of the next query head's first row, whose rows begin
    `step` later."""
    block += 1
    if block == gl.load(walk + w * 12 + 3):
        block = 0
        then = gl.load(walk + w * 12 + 9)
        first += gl.where(then <= w, step, 0)
        w = then
    return w, block, first


@gluon.jit
def _producer(
    items, walk, num_items, section, num_heads, head_batches, split, members, group, piece_length, q_batch_rows,
    do_batch_rows, k_batch_rows, q_len_all, stat_pitch, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, flags,
    epoch, polls, ks, vs, qs, dos, lses, deltas, k_full, v_full, q_full, do_full,
    ROWS: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, FLAGS: gl.constexpr,
):  # fmt: skip
    FAR: gl.constexpr = 1 << 30
    entry, batch, head, part = _item(gl.program_id(0), items, num_items, section, num_heads, head_batches, split)
    start = gl.load(entry)
    count = gl.load(entry + 3)
    piece = gl.load(entry + 5)
    total = gl.load(entry + 6) * members
    if total > 0:
        if FLAGS:
            await_piece(flags, epoch, piece, polls)
        k_end = batch * k_batch_rows + piece * piece_length + gl.load(entry + 2) + count
        mbarrier.expect(k_full, k_desc.block_type.nbytes)
        tma_load(k_desc, [FAR, k_end, head, FAR - count, 0], k_full, ks.index(0))
        mbarrier.expect(v_full, v_desc.block_type.nbytes)
        tma_load(v_desc, [FAR, k_end, head, FAR - count, 0], v_full, vs.index(0))
        q_head = head * group + part * members
        w = start
        block = 0
        for n in range(total):
            q_start = gl.load(walk + w * 12)
            q_len = gl.load(walk + w * 12 + 1)
            i = gl.load(walk + w * 12 + 2) + block * ROWS
            end = q_start + q_len
            x = FAR - q_len + i
            stat = (batch * (num_heads * group) + q_head) * q_len_all + q_start + i
            stat += (stat & 3) * (stat_pitch - 1)  # of copy stat & 3, whose rows begin that much earlier
            stage = n % Q_STAGES
            if n >= Q_STAGES:
                _take(stage, 8)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + ROWS * 4)
            tma_load(q_desc, [FAR, batch * q_batch_rows + end, q_head, x, 0], q_full.index(stage), qs.index(stage))
            tma_load(lse_desc, [stat], q_full.index(stage), lses.index(stage))
            stage = n % DO_STAGES
            if n >= DO_STAGES:
                _take(stage, 12)
            mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes + ROWS * 4)
            tma_load(do_desc, [FAR, batch * do_batch_rows + end, q_head, x, 0], do_full.index(stage), dos.index(stage))
            tma_load(delta_desc, [stat], do_full.index(stage), deltas.index(stage))
            w, block, q_head = _advance(walk, w, block, q_head, 1)


@gluon.jit
def _give(stage, FIRST: gl.constexpr):
    """Every consumer warp: it has read this stage. Named barriers, as many as stages, from FIRST on."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 384; mov.u32 $0, 0;", "=r,r", [stage + FIRST], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _take(stage, FIRST: gl.constexpr):
    """Every producer warp: waits for all consumer warps to have read this stage."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 384; mov.u32 $0, 0;", "=r,r", [stage + FIRST], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _nothing():
    """A zero that the compiler does not know, nor when it is needed: what depends on it stays where it is."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _is_edge(row, block):
    """Whether some pair of this block takes no part; row: of the walk."""
    return (block < gl.load(row + 5)) | (block >= gl.load(row + 6))


@gluon.jit
def _probabilities(s, lse, scale, row, block, count, SL: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr):
    """exp2(s scale - lse), 0 where a pair takes no part: lower <= key - query <= upper, key < count, query < q_len."""
    p = gl.exp2(s * scale - lse[None, :])
    if _is_edge(row, block):
        here = _nothing()  # or registers hold rows and columns over the whole loop
        i = gl.load(row + 2) + block * ROWS
        keys = gl.arange(0, KEYS, layout=gl.SliceLayout(1, SL)) + here
        queries = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SL)) + here
        first = keys - (gl.load(row + 8) + i)
        last = gl.minimum(keys - (gl.load(row + 7) + i), gl.load(row + 1) - i - 1)
        last = gl.where(keys < count, last, -1)
        p = gl.where((queries[None, :] >= first[:, None]) & (queries[None, :] <= last[:, None]), p, 0.0)
    return p


@gluon.jit
def _add_queries(dq, dq_s, dq_desc, row, block, first, SWAP: gl.constexpr, ROWS: gl.constexpr):
    """Sends a block's dq, whose segment's head begins at row `first` of the accumulator, on its way to be added."""
    FAR: gl.constexpr = 1 << 30
    if SWAP:
        dq_s.permute((1, 0)).store(dq)
    else:
        dq_s.store(dq)
    fence_async_shared()
    q_len = gl.load(row + 1)
    x = FAR - q_len + gl.load(row + 2) + block * ROWS
    tma_reduce_add(dq_desc, [FAR, first + gl.load(row) + q_len, x, 0], dq_s)  # after a barrier: dq_s is complete


@gluon.jit
def _block(
    n, total, p, dp, dk_sum, dv_sum, ks, vs, qs, dos, lses, deltas, ds_s, dq_s, dq_desc, q_full, do_full, zero, zero_q,
    scale, row, block, first, next_row, next_block, count,
    SL: gl.constexpr, DL: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr, Q_STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, DQ: gl.constexpr, SWAP: gl.constexpr, ORDER: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Block n, whose P and dP are known, and P and dP of block n + 1 unless it is the last."""
    dtype: gl.constexpr = qs.dtype
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=DL, k_width=2)
    q_stage = n % Q_STAGES
    do_stage = n % DO_STAGES
    k = ks.index(n >> 30)  # 0, but not known to be: or registers hold 32 descriptors over the whole loop
    v = vs.index(n >> 30)
    dv_sum = warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT), dos.index(do_stage), dv_sum, is_async=True)
    delta = deltas.index(do_stage).load(gl.SliceLayout(0, SL))
    ds = (p.to(gl.float32) * (dp - delta[None, :])).to(dtype)
    ds_left = gl.convert_layout(ds, LEFT)
    if DQ:
        ds_s.store(ds)
        fence_async_shared()
        tma.store_wait(0)  # and a barrier: ds is complete, dq_s free
        if SWAP:
            dq_sum = warpgroup_mma(k.permute((1, 0)), ds_s, zero_q, use_acc=False, is_async=True)
        else:
            dq_sum = warpgroup_mma(ds_s.permute((1, 0)), k, zero_q, use_acc=False, is_async=True)
        # over by now: P's registers are free again, and so is dO
        dv_sum = warpgroup_mma_init(warpgroup_mma_wait(1, [dv_sum]))
    else:
        dv_sum = warpgroup_mma_init(warpgroup_mma_wait(0, [dv_sum]))
    if n + DO_STAGES < total:
        _give(do_stage, 12)
    if ORDER == 0 or LAST:
        dk_sum = warpgroup_mma(ds_left, qs.index(q_stage), dk_sum, is_async=True)
    if not LAST:
        next_q = (n + 1) % Q_STAGES
        mbarrier.wait(q_full.index(next_q), ((n + 1) // Q_STAGES) & 1)
        s_sum = warpgroup_mma(k, qs.index(next_q).permute((1, 0)), zero, use_acc=False, is_async=True)
    if ORDER == 1 and not LAST:
        dk_sum = warpgroup_mma(ds_left, qs.index(q_stage), dk_sum, is_async=True)
    if DQ:
        dq = warpgroup_mma_wait(1 if LAST else 2, [dq_sum])
        _add_queries(dq, dq_s, dq_desc, row, block, first, SWAP, ROWS)
    if not LAST:
        next_do = (n + 1) % DO_STAGES
        mbarrier.wait(do_full.index(next_do), ((n + 1) // DO_STAGES) & 1)
        dp_sum = warpgroup_mma(v, dos.index(next_do).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1 if ORDER == 0 else 2, [s_sum])
        lse = lses.index(next_q).load(gl.SliceLayout(0, SL))
        p = _probabilities(s, lse, scale, next_row, next_block, count, SL, KEYS, ROWS).to(p.dtype)
        dp, dk_total = warpgroup_mma_wait(0, [dp_sum, dk_sum])
        dk_sum = warpgroup_mma_init(dk_total)
        if n + Q_STAGES < total:
            _give(q_stage, 8)
    return p, dp, dk_sum, dv_sum


@gluon.jit
def _block_alone(
    n, total, dk_sum, dv_sum, ks, vs, qs, dos, lses, deltas, ds_s, dq_s, dq_desc, q_full, do_full, zero, zero_q,
    scale, row, block, first, count,
    SL: gl.constexpr, DL: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr, Q_STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, DQ: gl.constexpr, SWAP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Block n from beginning to end: nothing of the next one is begun."""
    dtype: gl.constexpr = qs.dtype
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=DL, k_width=2)
    q_stage = n % Q_STAGES
    do_stage = n % DO_STAGES
    k = ks.index(n >> 30)
    v = vs.index(n >> 30)
    mbarrier.wait(q_full.index(q_stage), (n // Q_STAGES) & 1)
    s_sum = warpgroup_mma(k, qs.index(q_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(do_stage), (n // DO_STAGES) & 1)
    dp_sum = warpgroup_mma(v, dos.index(do_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, [s_sum])
    lse = lses.index(q_stage).load(gl.SliceLayout(0, SL))
    p = _probabilities(s, lse, scale, row, block, count, SL, KEYS, ROWS)
    if PACKED:
        p = p.to(dtype)
    dv_sum = warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT), dos.index(do_stage), dv_sum, is_async=True)
    delta = deltas.index(do_stage).load(gl.SliceLayout(0, SL))
    dp = warpgroup_mma_wait(1, [dp_sum])
    ds = (p.to(gl.float32) * (dp - delta[None, :])).to(dtype)
    ds_left = gl.convert_layout(ds, LEFT)
    if DQ:
        ds_s.store(ds)
        fence_async_shared()
        tma.store_wait(0)  # and a barrier: ds is complete, dq_s free
        if SWAP:
            dq_sum = warpgroup_mma(k.permute((1, 0)), ds_s, zero_q, use_acc=False, is_async=True)
        else:
            dq_sum = warpgroup_mma(ds_s.permute((1, 0)), k, zero_q, use_acc=False, is_async=True)
    dk_sum = warpgroup_mma(ds_left, qs.index(q_stage), dk_sum, is_async=True)
    if DQ:
        dq = warpgroup_mma_wait(1, [dq_sum])
    else:
        dv_sum = warpgroup_mma_init(warpgroup_mma_wait(1, [dv_sum]))
    if n + DO_STAGES < total:
        _give(do_stage, 12)
    if DQ:
        _add_queries(dq, dq_s, dq_desc, row, block, first, SWAP, ROWS)
    dk_total, dv_total = warpgroup_mma_wait(0, [dk_sum, dv_sum])
    if n + Q_STAGES < total:
        _give(q_stage, 8)
    return warpgroup_mma_init(dk_total), warpgroup_mma_init(dv_total)


@gluon.jit
def _leave(base, stride, x, count, DL: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr,
           ATOMIC: gl.constexpr):  # fmt: skip
    """Adds x (KEYS, D) to `count` rows of global memory; writes it, where they are not in fp32 but final."""
    rows = gl.arange(0, KEYS, layout=gl.SliceLayout(1, DL))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, DL))
    at = base + rows[:, None] * stride + columns[None, :]
    mask = (rows < count)[:, None]
    if HEAD_DIM != D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    if base.dtype.element_ty != gl.float32:
        gl.static_assert(not ATOMIC, "sums of several programs are in fp32")
        gl.store(at, x.to(base.dtype.element_ty), mask=mask)
    elif ATOMIC:
        gl.atomic_add(at, x, mask=mask, sem="relaxed")
    else:
        gl.store(at, gl.load(at, mask=mask, other=0.0) + x, mask=mask)


@gluon.jit
def _consumer(
    items, walk, num_items, section, num_heads, head_batches, split, members, group, q_len_all, dq_desc, dk, dv,
    departures, score_scale, scale, dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h,
    ks, vs, qs, dos, lses, deltas, ds_s, dq_s, k_full, v_full, q_full, do_full,
    KEYS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, Q_STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, DQ: gl.constexpr, SWAP: gl.constexpr, ORDER: gl.constexpr, PACKED: gl.constexpr,
    ATOMIC: gl.constexpr, DEPARTURES: gl.constexpr,
):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, ROWS, 16])
    DL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, D, 16])
    QM: gl.constexpr = D if SWAP else ROWS
    QN: gl.constexpr = ROWS if SWAP else D
    QL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[4, 2] if QM == 64 else [8, 1],
        instr_shape=[16, QN // 2 if QM == 64 else QN, 16],
    )
    entry, batch, head, part = _item(gl.program_id(0), items, num_items, section, num_heads, head_batches, split)
    start = gl.load(entry)
    count = gl.load(entry + 3)
    total = gl.load(entry + 6) * members
    if total > 0:
        zero = gl.zeros([KEYS, ROWS], gl.float32, layout=SL)
        zero_q = gl.zeros([QM, QN], gl.float32, layout=QL)
        dk_sum = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, layout=DL))
        dv_sum = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, layout=DL))
        w = start
        block = 0
        first = (batch * (num_heads * group) + head * group + part * members) * q_len_all
        thread_barrier()  # the compiler knows from here on that the barriers' initial values are written
        mbarrier.wait(k_full, 0)
        if ORDER == 2:
            mbarrier.wait(v_full, 0)
            for n in range(total):
                dk_sum, dv_sum = _block_alone(
                    n, total, dk_sum, dv_sum, ks, vs, qs, dos, lses, deltas, ds_s, dq_s, dq_desc, q_full, do_full,
                    zero, zero_q, score_scale, walk + w * 12, block, first, count,
                    SL, DL, KEYS, ROWS, Q_STAGES, DO_STAGES, DQ, SWAP, PACKED,
                )  # fmt: skip
                w, block, first = _advance(walk, w, block, first, q_len_all)
        else:
            mbarrier.wait(q_full.index(0), 0)
            s_sum = warpgroup_mma(ks.index(0), qs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full, 0)
            mbarrier.wait(do_full.index(0), 0)
            dp_sum = warpgroup_mma(vs.index(0), dos.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, [s_sum])
            lse = lses.index(0).load(gl.SliceLayout(0, SL))
            p = _probabilities(s, lse, score_scale, walk + w * 12, block, count, SL, KEYS, ROWS)
            if PACKED:
                p = p.to(qs.dtype)
            dp = warpgroup_mma_wait(0, [dp_sum])
            for n in range(total - 1):
                this_w = w
                this_block = block
                this_first = first
                w, block, first = _advance(walk, w, block, first, q_len_all)
                p, dp, dk_sum, dv_sum = _block(
                    n, total, p, dp, dk_sum, dv_sum, ks, vs, qs, dos, lses, deltas, ds_s, dq_s, dq_desc, q_full,
                    do_full, zero, zero_q, score_scale, walk + this_w * 12, this_block, this_first, walk + w * 12,
                    block, count, SL, DL, KEYS, ROWS, Q_STAGES, DO_STAGES, DQ, SWAP, ORDER, False,
                )  # fmt: skip
            p, dp, dk_sum, dv_sum = _block(
                total - 1, total, p, dp, dk_sum, dv_sum, ks, vs, qs, dos, lses, deltas, ds_s, dq_s, dq_desc, q_full,
                do_full, zero, zero_q, score_scale, walk + w * 12, block, first, walk, 0, count,
                SL, DL, KEYS, ROWS, Q_STAGES, DO_STAGES, DQ, SWAP, ORDER, True,
            )  # fmt: skip
        dk_total, dv_total = warpgroup_mma_wait(0, [dk_sum, dv_sum])
        if DQ:
            tma.store_wait(0)  # dq_s is read while the CTA lives
        # worked out again, or registers hold it all over the loop
        work = gl.program_id(0) + _nothing()
        entry, batch, head, part = _item(work, items, num_items, section, num_heads, head_batches, split)
        token = gl.load(entry + 2)
        count = gl.load(entry + 3)
        piece = gl.load(entry + 5)
        place = piece.to(gl.int64) * dv_c + batch.to(gl.int64) * dv_b + token.to(gl.int64) * dv_s + head * dv_h
        _leave(dv + place, dv_s, dv_total, count, DL, KEYS, D, HEAD_DIM, ATOMIC)
        place = piece.to(gl.int64) * dk_c + batch.to(gl.int64) * dk_b + token.to(gl.int64) * dk_s + head * dk_h
        _leave(dk + place, dk_s, dk_total * scale, count, DL, KEYS, D, HEAD_DIM, ATOMIC)
    if DEPARTURES:
        thread_barrier()  # every thread's additions come before the count
        gl.atomic_add(departures + gl.load(entry + 5), gl.load(entry + 3), sem="release", scope="sys")


@gluon.jit(
    do_not_specialize=[
        "num_items", "section", "num_heads", "head_batches", "split", "members", "group", "piece_length",
        "q_batch_rows", "do_batch_rows", "k_batch_rows", "q_len_all", "stat_pitch", "polls",
    ],
    do_not_specialize_on_alignment=["flags", "epoch", "departures"],  # words inside larger tensors
)  # fmt: skip
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk, dv, items, walk, flags, epoch, departures,
    score_scale, scale, num_items, section, num_heads, head_batches, split, members, group, piece_length, q_batch_rows,
    do_batch_rows, k_batch_rows, q_len_all, stat_pitch, polls, dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h,
    KEYS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, Q_STAGES: gl.constexpr,
    DO_STAGES: gl.constexpr, DQ: gl.constexpr, SWAP: gl.constexpr, ORDER: gl.constexpr, PACKED: gl.constexpr,
    ATOMIC: gl.constexpr, FLAGS: gl.constexpr, DEPARTURES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """q_desc, do_desc, k_desc, v_desc: ragged (far, end, heads, row, D), boxes of ROWS and KEYS rows; dq_desc: ragged
    (far, end, row, D) fp32; lse_desc, delta_desc: flat fp32, four copies of (B Hq Sq) `stat_pitch` apart, copy c
    without its first c rows, lse times log2(e) and +inf where a row has seen nothing; score_scale is the softmax's
    scale times log2(e); num_heads: key heads; members: query heads that a program walks."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], q_desc.dtype)
    KEY_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], q_desc.dtype)
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], q_desc.dtype)
    SUMS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], gl.float32)
    ks = gl.allocate_shared_memory(q_desc.dtype, [1, KEYS, D], KEY_TILE)
    vs = gl.allocate_shared_memory(q_desc.dtype, [1, KEYS, D], KEY_TILE)
    qs = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES, ROWS, D], QUERIES)
    dos = gl.allocate_shared_memory(q_desc.dtype, [DO_STAGES, ROWS, D], QUERIES)
    lses = gl.allocate_shared_memory(gl.float32, [Q_STAGES, ROWS], lse_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [DO_STAGES, ROWS], delta_desc.layout)
    ds_s = gl.allocate_shared_memory(q_desc.dtype, [KEYS, ROWS], SCORES)
    dq_s = gl.allocate_shared_memory(gl.float32, [ROWS, D], SUMS)
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], BARRIER)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(i), count=1)
    gl.warp_specialize(
        [
            (_consumer, (
                items, walk, num_items, section, num_heads, head_batches, split, members, group, q_len_all, dq_desc, dk,
                dv, departures, score_scale, scale, dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h,
                ks, vs, qs, dos, lses, deltas, ds_s, dq_s, k_full, v_full, q_full, do_full,
                KEYS, ROWS, D, HEAD_DIM, Q_STAGES, DO_STAGES, DQ, SWAP, ORDER, PACKED, ATOMIC, DEPARTURES,
            )),
            (_producer, (
                items, walk, num_items, section, num_heads, head_batches, split, members, group, piece_length,
                q_batch_rows, do_batch_rows, k_batch_rows, q_len_all, stat_pitch, q_desc, k_desc, v_desc, do_desc,
                lse_desc, delta_desc, flags, epoch, polls, ks, vs, qs, dos, lses, deltas, k_full, v_full, q_full,
                do_full, ROWS, Q_STAGES, DO_STAGES, FLAGS,
            )),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
