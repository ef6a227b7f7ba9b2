"""The forward in CuTe DSL: one launch over all tiles of a table.

    warpgroup 0: one warp, few registers              warpgroups 1 and 2: 64 rows each, many registers
    ┌──────────── producer ────────────┐              ┌──────────────── consumer ────────────────┐
    │ Q tile, then K and V blocks      │── full ────►│ S[n+1] = Q K[n+1]ᵀ   issued               │
    │ by TMA into two rings of STAGES  │              │ O += P[n] V[n]        issued               │
    │ (waits for arrival flags before  │◄── empty ───│ softmax of S[n+1] while O is summed        │
    │ a piece's first load)            │              │ P stays in registers                       │
    └──────────────────────────────────┘              └──────────────────────────────────────────┘

Shared memory: `q` (64, D) CONSUMERS x QUERIES buffers, `k` and `v` (BLOCK, D) STAGES each, `records` of tiles.

Barriers, of which phases follow from counts of tiles and blocks over the whole life of the CTA: `q_full`/`q_empty` one
per buffer of queries, `k_full`/`k_empty` and `v_full`/`v_empty` one per stage, `record_full`/`record_empty` one per
record. "full" takes one arrival and the bytes of the load, "empty" one of each warp that has read.

Every tile begins from nothing; where its strip continues, what earlier steps have left in (state, lse) is added at its
end, so that neither loading nor storing it holds up the products. Where they fit (QUERIES = 2) the queries have two
buffers, and a tile's output leaves by TMA through the one that its queries were in, which is given back in the next
tile's first block. TMA stores boxes of 64 rows: what has fewer leaves from registers.

A thread has rows r and r + 8 of its warp's 16, and columns 8 j + 2 (lane % 4) + {0, 1}: element c + 2 half + 4 j of S
or O. P has the same order, which is that of wgmma's first operand. A row's maximum is found over the quad in every
block, its sum only at the end.

Keys are read through a view whose bounds each load names (`ragged_view`): rows beyond a segment arrive as zeros,
whatever memory holds there, so 0 x NaN cannot occur. Rows of queries beyond a tile's last are computed and dropped.

After Shah et al. (arXiv:2407.08608): roles, register split, order of the two products.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import hopper_helpers

from ring_cute.hopper import ptx
from ring_cute.hopper.dsl import LayoutEnum, SmemAllocator
from ring_cute.hopper.producer import Loads, Shared, produce
from ring_cute.hopper.records import (
    BATCH,
    EDGES,
    ENDS,
    EXISTS,
    HEAD,
    J_LO,
    K_LEN,
    LOWER,
    NUMBER,
    Q_ROW,
    RECORD_BITS,
    RECORDS,
    RIGHT,
    ROWS,
    START,
    STOP,
    UPPER,
    WALK_COLUMNS,
    Work,
)
from ring_cute.hopper.softmax import mask, multiply, softmax, to_operand
from ring_cute.hopper.views import flat, ragged_view, rows_view
from ring_cute.settings import CONSUMERS, ForwardKind

WARPS = 4 * CONSUMERS
THREADS = 128 * (1 + CONSUMERS)
OUT_BARRIER, TURN_BARRIER = 1, 4
"""Named barriers: OUT_BARRIER + consumer, TURN_BARRIER + consumer."""


class HopperForward:
    """One kernel: `cute.compile(HopperForward(kind), …)`; `compiling.compile_forward` knows how."""

    def __init__(self, kind: ForwardKind) -> None:
        self.kind = kind
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.dim = kind.padded
        self.head_dim = kind.head_dim
        self.block = kind.settings.block
        self.stages = kind.settings.stages
        self.stage_bits = self.stages.bit_length() - 1
        self.queries = kind.queries
        assert self.stages == 1 << self.stage_bits, "phases are read off bits of a count"
        assert not kind.out_tma or self.queries > 1, "output leaves through the other buffer's neighbour"

    @cute.jit
    def __call__(
        self,
        q: Int64,
        k: Int64,
        v: Int64,
        out: Int64,
        lse: Int64,
        state: Int64,
        sinks: Int64,
        items: Int64,
        walk: Int64,
        counter: Int64,
        flags: Int64,
        epoch: Int64,
        scale: Float32,  # the softmax's times log2(e)
        batch: Int32,
        q_len: Int32,
        num_heads: Int32,
        num_kv_heads: Int32,
        q_b: Int64,
        q_s: Int64,
        q_h: Int64,
        k_s: Int64,
        k_h: Int64,
        v_s: Int64,
        v_h: Int64,
        out_b: Int64,
        out_s: Int64,
        out_h: Int64,
        lse_b: Int64,
        lse_h: Int64,
        state_b: Int64,
        state_s: Int64,
        state_h: Int64,
        num_items: Int32,
        section: Int32,
        head_batches: Int32,
        total: Int32,
        k_batch_rows: Int32,
        polls: Int32,
        grid: Int32,
        stream: Any,
    ):
        """Addresses, sizes and strides in elements; q, out, state (B, Sq, Hq, D), lse (B, Hq, Sq), k, v (…, Hkv, D)."""
        sizes = (batch, q_len, num_heads)
        q_layout = hopper_helpers.make_smem_layout_a(
            LayoutEnum.ROW_MAJOR, (64, self.block, self.dim), self.dtype, CONSUMERS * self.queries
        )
        atom = warpgroup.make_smem_layout_atom(
            hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, self.dim), self.dtype
        )
        k_layout = cute.tile_to_shape(atom, (self.block, self.dim, self.stages), (0, 1, 2))
        load, keys = cpasync.CopyBulkTensorTileG2SOp(), cute.select(k_layout, mode=[0, 1])
        rows, box = cute.select(q_layout, mode=[0, 1]), (64, self.dim)
        q_atom, q_tma = cpasync.make_tiled_tma_atom(
            load, rows_view(q, self.dtype, self.head_dim, sizes, (q_b, q_s, q_h)), rows, box
        )
        k_atom, k_tma = cpasync.make_tiled_tma_atom(
            load,
            ragged_view(k, self.dtype, self.head_dim, num_kv_heads, k_s, k_h),
            keys,
            (self.block, self.dim),
        )
        v_atom, v_tma = cpasync.make_tiled_tma_atom(
            load,
            ragged_view(v, self.dtype, self.head_dim, num_kv_heads, v_s, v_h),
            keys,
            (self.block, self.dim),
        )
        if cutlass.const_expr(self.kind.out_tma):
            out_atom, out_tma = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(),
                rows_view(out, self.dtype, self.head_dim, sizes, (out_b, out_s, out_h)),
                rows,
                box,
            )
        else:
            out_atom, out_tma = q_atom, q_tma
        scores = hopper_helpers.make_trivial_tiled_mma(
            self.dtype, self.dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, self.block)
        )
        sums = hopper_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (64, self.dim),
            warpgroup.OperandSource.RMEM,
        )

        queries, stages = CONSUMERS * self.queries, self.stages

        @cute.struct
        class Storage:
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            records: cute.struct.Align[cute.struct.MemRange[Int32, 16 * RECORDS], 64]
            q_full: cute.struct.MemRange[Int64, queries]
            q_empty: cute.struct.MemRange[Int64, queries]
            k_full: cute.struct.MemRange[Int64, stages]
            k_empty: cute.struct.MemRange[Int64, stages]
            v_full: cute.struct.MemRange[Int64, stages]
            v_empty: cute.struct.MemRange[Int64, stages]
            record_full: cute.struct.MemRange[Int64, RECORDS]
            record_empty: cute.struct.MemRange[Int64, RECORDS]

        self.storage = Storage
        self.kernel(
            q_atom, q_tma, k_atom, k_tma, v_atom, v_tma, out_atom, out_tma, q_layout, k_layout, scores, sums,
            flat(out, Int32), flat(lse, Float32), flat(state, Int64), flat(sinks, Float32),
            flat(items, Int32), flat(walk, Int32), flat(counter, Int32), flat(flags, cutlass.Uint32),
            flat(epoch, cutlass.Uint32), scale, num_heads, num_kv_heads, out_b, out_s, out_h, lse_b, lse_h,
            state_b, state_s, state_h, num_items, section, head_batches, total, k_batch_rows, polls,
        ).launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        q_atom: cute.CopyAtom,
        q_tma: cute.Tensor,
        k_atom: cute.CopyAtom,
        k_tma: cute.Tensor,
        v_atom: cute.CopyAtom,
        v_tma: cute.Tensor,
        out_atom: cute.CopyAtom,
        out_tma: cute.Tensor,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
        scores: cute.TiledMma,
        sums: cute.TiledMma,
        out: cute.Tensor,
        lse: cute.Tensor,
        state: cute.Tensor,
        sinks: cute.Tensor,
        items: cute.Tensor,
        walk: cute.Tensor,
        counter: cute.Tensor,
        flags: cute.Tensor,
        epoch: cute.Tensor,
        scale: Float32,
        num_heads: Int32,
        num_kv_heads: Int32,
        out_b: Int64,
        out_s: Int64,
        out_h: Int64,
        lse_b: Int64,
        lse_h: Int64,
        state_b: Int64,
        state_s: Int64,
        state_h: Int64,
        num_items: Int32,
        section: Int32,
        head_batches: Int32,
        total: Int32,
        k_batch_rows: Int32,
        polls: Int32,
    ):
        storage = SmemAllocator().allocate(self.storage)
        shared = Shared(
            q=storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            k=storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            v=storage.v.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            records=storage.records.get_tensor(cute.make_layout((16, RECORDS))),
            q_full=storage.q_full.data_ptr(),
            q_empty=storage.q_empty.data_ptr(),
            k_full=storage.k_full.data_ptr(),
            k_empty=storage.k_empty.data_ptr(),
            v_full=storage.v_full.data_ptr(),
            v_empty=storage.v_empty.data_ptr(),
            record_full=storage.record_full.data_ptr(),
            record_empty=storage.record_empty.data_ptr(),
        )
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            cpasync.prefetch_descriptor(q_atom)
            cpasync.prefetch_descriptor(k_atom)
            cpasync.prefetch_descriptor(v_atom)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(CONSUMERS * self.queries):
                    cute.arch.mbarrier_init(shared.q_full + i, 1)
                    cute.arch.mbarrier_init(shared.q_empty + i, 4)
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(shared.k_full + i, 1)
                    cute.arch.mbarrier_init(shared.k_empty + i, WARPS)
                    cute.arch.mbarrier_init(shared.v_full + i, 1)
                    cute.arch.mbarrier_init(shared.v_empty + i, WARPS)
                for i in cutlass.range_constexpr(RECORDS):
                    cute.arch.mbarrier_init(shared.record_full + i, 1)
                    cute.arch.mbarrier_init(shared.record_empty + i, WARPS)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.kind.settings.producer_registers)
            if warp == 0:
                work = Work(
                    items, walk, counter, num_items, section, num_heads, head_batches, total,
                    num_heads // num_kv_heads, k_batch_rows,
                )  # fmt: skip
                loads = Loads(q_atom, q_tma, k_atom, k_tma, v_atom, v_tma)
                produce(
                    work, loads, shared, flags, epoch, polls, self.block, self.stages, self.queries, self.kind.flags
                )
        else:
            cute.arch.setmaxregister_increase(self.kind.settings.consumer_registers)
            self.consume(
                shared, walk, out_atom, out_tma, scores, sums, out, lse, state, sinks, scale, out_b, out_s, out_h,
                lse_b, lse_h, state_b, state_s, state_h,
            )  # fmt: skip

    @cute.jit
    def consume(
        self, shared, walk, out_atom, out_tma, scores, sums, out, lse, state, sinks, scale, out_b, out_s, out_h,
        lse_b, lse_h, state_b, state_s, state_h,
    ):  # fmt: skip
        """A consumer warpgroup, for all of the CTA's tiles."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4
        cid = warp >> 2
        lane = cute.arch.lane_idx()
        leader = lane == 0
        row = (warp & 3) * 16 + (lane >> 2)  # of the consumer's 64, and this + 8
        column = 2 * (lane & 3)
        records = shared.records

        # operands in shared memory are the same for all threads
        queries = scores.make_fragment_A(scores.get_slice(0).partition_A(shared.q))
        keys = scores.make_fragment_B(scores.get_slice(0).partition_B(shared.k))
        turned = cute.make_tensor(shared.v.iterator, cute.select(shared.v.layout, mode=[1, 0, 2]))  # (D, BLOCK, STAGES)
        values = sums.make_fragment_B(sums.get_slice(0).partition_B(turned))
        s = cute.make_rmem_tensor(scores.partition_shape_C((64, self.block)), Float32)
        p = cute.make_rmem_tensor(sums.partition_shape_A((64, self.block)), self.dtype)
        o = cute.make_rmem_tensor(sums.partition_shape_C((64, self.dim)), Float32)
        m = cute.make_rmem_tensor(2, Float32)
        norm = cute.make_rmem_tensor(2, Float32)
        decay = cute.make_rmem_tensor(2, Float32)

        blocks, tiles, turn = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(self.kind.settings.ping_pong):  # noqa: SIM102  # a constant, and a value
            if cid == 1:
                self.your_turn(cid)
        ptx.wait(shared.record_full, 0)
        going = records[EXISTS, 0] != 0
        while going:
            slot = turn & (RECORDS - 1)
            start, stop = records[START, slot], records[STOP, slot]
            for half in cutlass.range_constexpr(2):
                m[half] = -Float32.inf
                norm[half] = Float32(0.0)
            if cutlass.const_expr(self.kind.sinks):  # noqa: SIM102  # a constant, and a value
                if (records[ENDS, slot] & 1) != 0:
                    sink = sinks[records[HEAD, slot]] * ptx.LOG2_E
                    for half in cutlass.range_constexpr(2):
                        m[half] = sink
                        if column == 0 and sink > -Float32.inf:  # sums are over the quad
                            norm[half] = Float32(1.0)
            o.fill(0.0)
            if stop > start:
                at = cid * self.queries + (tiles & (self.queries - 1))
                query = queries[None, None, None, at]
                ptx.wait(shared.q_full + at, (tiles >> (self.queries - 1)) & 1)
                # the first block has no values to sum before it
                number, right, edges = records[NUMBER, slot], records[RIGHT, slot], records[EDGES, slot]
                k_len, j_lo = records[K_LEN, slot], records[J_LO, slot]
                lower, upper = records[LOWER, slot], records[UPPER, slot]
                j = j_lo
                if right > 0:
                    j = j_lo + (number - 1) * self.block
                stage = blocks & (self.stages - 1)
                ptx.wait(shared.k_full + stage, (blocks >> self.stage_bits) & 1)
                if cutlass.const_expr(self.kind.settings.ping_pong):
                    self.my_turn(cid)
                multiply(scores, query, keys[None, None, None, stage], s, False)
                if cutlass.const_expr(self.kind.settings.ping_pong):
                    self.your_turn(cid)
                warpgroup.wait_group(0)
                ptx.arrive(shared.k_empty + stage, leader)
                mask(s, cid * 64 + row, column, j, k_len, lower, upper)
                softmax(s, m, norm, decay, scale, True)
                if cutlass.const_expr(self.queries > 1):
                    if cutlass.const_expr(self.kind.out_tma):
                        cute.arch.cp_async_bulk_wait_group(0, read=True)  # what the tile before left there
                        cute.arch.sync_warp()  # whichever lane sent it
                    ptx.arrive(shared.q_empty + cid * self.queries + ((tiles + 1) & (self.queries - 1)), leader)
                to_operand(s, p)
                blocks += 1
                done = Int32(1)
                for w in cutlass.range(start, stop, unroll=1):
                    if w > start:
                        entry = w * WALK_COLUMNS
                        k_len, j_lo, number = walk[entry + 1], walk[entry + 2], walk[entry + 3]
                        right, edges = walk[entry + 4], walk[entry + 5]
                        lower, upper = walk[entry + 6], walk[entry + 7]
                    for t in cutlass.range(done, edges, unroll=1):
                        nth = t - right
                        if t < right:
                            nth = number - 1 - t
                        self.attend(
                            shared, scores, sums, query, keys, values, s, p, o, m, norm, decay, scale, cid, leader,
                            cid * 64 + row, column, blocks, j_lo + nth * self.block, k_len, lower, upper, True,
                        )  # fmt: skip
                        blocks += 1
                    for _ in cutlass.range(cute.math.max(done, edges), number, unroll=1):
                        self.attend(
                            shared, scores, sums, query, keys, values, s, p, o, m, norm, decay, scale, cid, leader,
                            cid * 64 + row, column, blocks, Int32(0), k_len, lower, upper, False,
                        )  # fmt: skip
                        blocks += 1
                    done = Int32(0)
                if cutlass.const_expr(self.queries == 1):
                    ptx.arrive(shared.q_empty + cid, leader)  # all scores are computed
                before = (blocks - 1) & (self.stages - 1)
                ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
                multiply(sums, p, values[None, None, None, before], o, True)
                warpgroup.wait_group(0)
                ptx.arrive(shared.v_empty + before, leader)
                tiles += 1
            self.finish(
                shared, slot, cid, row, column, tiles, o, m, norm, sums, out_atom, out_tma, out, lse, state,
                out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
            )  # fmt: skip
            cute.arch.sync_warp()  # all lanes have read the record
            ptx.arrive(shared.record_empty + slot, leader)
            turn += 1
            slot = turn & (RECORDS - 1)
            ptx.wait(shared.record_full + slot, (turn >> RECORD_BITS) & 1)
            going = records[EXISTS, slot] != 0
        if cutlass.const_expr(self.kind.out_tma):
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # buffers are read while the CTA lives

    @cute.jit
    def attend(
        self, shared, scores, sums, query, keys, values, s, p, o, m, norm, decay, scale, cid, leader, row, column,
        blocks, j, k_len, lower, upper, masked: cutlass.Constexpr,
    ):  # fmt: skip
        """Scores of this block, then the sum over the values of the block before, whose P is at hand."""
        stage, before = blocks & (self.stages - 1), (blocks - 1) & (self.stages - 1)
        ptx.wait(shared.k_full + stage, (blocks >> self.stage_bits) & 1)
        if cutlass.const_expr(self.kind.settings.ping_pong):
            self.my_turn(cid)
        multiply(scores, query, keys[None, None, None, stage], s, False)
        ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
        multiply(sums, p, values[None, None, None, before], o, True)
        if cutlass.const_expr(self.kind.settings.ping_pong):
            self.your_turn(cid)
        warpgroup.wait_group(1)
        ptx.arrive(shared.k_empty + stage, leader)
        if cutlass.const_expr(masked):
            mask(s, row, column, j, k_len, lower, upper)
        softmax(s, m, norm, decay, scale, masked)
        if cutlass.const_expr(self.kind.settings.overlap):
            # over already, but a branch: ptxas would otherwise wait for the sums before the exponentials they overlap
            ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
        warpgroup.wait_group(0)
        ptx.arrive(shared.v_empty + before, leader)
        for j in cutlass.range_constexpr(0, cute.size(o), 4):
            for e in cutlass.range_constexpr(4):
                o[j + e] = o[j + e] * decay[e // 2]
        to_operand(s, p)

    @cute.jit
    def finish(
        self, shared, slot, cid, row, column, tiles, o, m, norm, sums, out_atom, out_tma, out, lse, state,
        out_b, out_s, out_h, lse_b, lse_h, state_b, state_s, state_h,
    ):  # fmt: skip
        """A tile's end: what earlier steps have left is added, and all of it goes where it belongs."""
        records = shared.records
        q_row, count, batch = records[Q_ROW, slot], records[ROWS, slot], records[BATCH, slot]
        ends, head = records[ENDS, slot], records[HEAD, slot]
        lse_at = Int64(batch) * lse_b + Int64(head) * lse_h + q_row + cid * 64
        state_at = Int64(batch) * state_b + Int64(head) * state_h + Int64(q_row + cid * 64) * state_s + column
        factor = cute.make_rmem_tensor(2, Float32)
        for half in cutlass.range_constexpr(2):
            own = row + 8 * half
            inside = cid * 64 + own < count
            total = ptx.quad_sum(norm[half])
            if cutlass.const_expr(self.kind.state):  # noqa: SIM102  # a constant, and a value
                if (ends & 1) == 0 and inside:
                    earlier = lse[lse_at + own] * ptx.LOG2_E
                    if earlier > -Float32.inf:  # otherwise state may hold anything
                        both = cute.arch.fmax(m[half], earlier)
                        weight, kept = ptx.exp2(earlier - both), ptx.exp2(m[half] - both)
                        m[half] = both
                        total = total * kept + weight
                        pairs = self.pairs_of_a_row(state, state_at + own * state_s)
                        loaded = cute.make_rmem_tensor(self.head_dim // 8, Int64)
                        for n in cutlass.range_constexpr(self.head_dim // 8):
                            loaded[n] = pairs[n]
                        added = cute.recast_tensor(loaded, Float32)
                        for e in cutlass.range_constexpr(0, cute.size(o), 4):
                            for c in cutlass.range_constexpr(2):
                                x = o[e + 2 * half + c] * kept
                                if cutlass.const_expr(2 * e < self.head_dim):
                                    x = ptx.fma(added[e // 2 + c], weight, x)
                                o[e + 2 * half + c] = x
            factor[half] = Float32(0.0)
            value = -Float32.inf
            if total > 0.0:
                factor[half] = cute.arch.rcp_approx(total)
                value = (m[half] + ptx.log2(total)) * ptx.LN_2
            if column == 0 and inside:
                lse[lse_at + own] = value
        for j in cutlass.range_constexpr(0, cute.size(o), 4):
            for e in cutlass.range_constexpr(4):
                o[j + e] = o[j + e] * factor[e // 2]
        if cutlass.const_expr(self.kind.state):
            if (ends & 2) != 0:
                self.write_out(
                    shared, slot, cid, row, column, tiles, o, sums, out_atom, out_tma, out, out_b, out_s, out_h
                )
            else:
                for half in cutlass.range_constexpr(2):
                    own = row + 8 * half
                    if cid * 64 + own < count:
                        pairs = self.pairs_of_a_row(state, state_at + own * state_s)
                        sums_in_pairs = cute.recast_tensor(o, Int64)
                        for n in cutlass.range_constexpr(self.head_dim // 8):
                            pairs[n] = sums_in_pairs[2 * n + half]
        else:
            self.write_out(shared, slot, cid, row, column, tiles, o, sums, out_atom, out_tma, out, out_b, out_s, out_h)

    @cute.jit
    def write_out(
        self, shared, slot, cid, row, column, tiles, o, sums, out_atom, out_tma, out, out_b, out_s, out_h
    ):  # fmt: skip
        """A tile's final rows, by TMA where all 64 are inside, else from registers."""
        records = shared.records
        q_row, count, batch, head = records[Q_ROW, slot], records[ROWS, slot], records[BATCH, slot], records[HEAD, slot]
        rounded = cute.make_rmem_tensor(sums.partition_shape_C((64, self.dim)), self.dtype)
        to_operand(o, rounded)
        from_registers = count > cid * 64
        if cutlass.const_expr(self.kind.out_tma):  # noqa: SIM102  # a constant, and a value
            # otherwise a box would reach into the next tile's rows, or there are no queries whose buffer is free
            if count >= cid * 64 + 64 and records[STOP, slot] > records[START, slot]:
                from_registers = False
                # through the queries' buffer: all scores are computed, and this tile holds it until the next one
                at = cid * self.queries + ((tiles - 1) & (self.queries - 1))
                store = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), self.dtype)
                tiled = cute.make_tiled_copy_C(store, sums)
                thread = tiled.get_slice(cute.arch.thread_idx()[0] & 127)
                buffer = shared.q[None, None, at]
                # every warp's products have read their queries before any warp overwrites them
                cute.arch.barrier(barrier_id=OUT_BARRIER + cid, number_of_threads=128)
                cute.copy(tiled, thread.retile(rounded), thread.partition_D(buffer))
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=OUT_BARRIER + cid, number_of_threads=128)
                rows = cute.domain_offset((q_row + cid * 64, 0), out_tma[None, None, head, batch])
                source, target = cpasync.tma_partition(
                    out_atom,
                    0,
                    cute.make_layout(1),
                    cute.group_modes(buffer, 0, 2),
                    cute.group_modes(cute.local_tile(rows, (64, self.dim), (0, 0)), 0, 2),
                )
                if (cute.arch.make_warp_uniform(cute.arch.warp_idx()) & 3) == 0:
                    with cute.arch.elect_one():  # of loads the DSL elects a lane by itself, of stores not
                        cute.copy(out_atom, source, target)
                        cute.arch.cp_async_bulk_commit_group()
        if from_registers:
            out_at = Int64(batch) * out_b + Int64(head) * out_h + Int64(q_row + cid * 64) * out_s + column
            words = cute.recast_tensor(rounded, Int32)
            for half in cutlass.range_constexpr(2):
                own = row + 8 * half
                if cid * 64 + own < count:
                    pairs = self.pairs_of_a_row(out, out_at + own * out_s)
                    for n in cutlass.range_constexpr(self.head_dim // 8):
                        pairs[n] = words[2 * n + half]

    def pairs_of_a_row(self, memory, offset):
        """A thread's share of a row that begins at `offset` elements, in words of two: every fourth."""
        return cute.make_tensor(memory.iterator + (offset >> 1), cute.make_layout(self.head_dim // 8, stride=4))

    @cute.jit
    def my_turn(self, cid):
        cute.arch.barrier(barrier_id=TURN_BARRIER + cid, number_of_threads=256)

    @cute.jit
    def your_turn(self, cid):
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - cid, number_of_threads=256)
