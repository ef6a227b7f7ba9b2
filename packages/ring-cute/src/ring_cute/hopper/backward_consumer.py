"""The consumers of the backward (`backward`): products, and what is done to their results in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import warpgroup

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_producer import (
    APART,
    EDGE,
    FIRST_OFFSET,
    LAST_OFFSET,
    SLOPE,
    STEP,
    Share,
    next_stage,
)
from ring_cute.hopper.backward_records import (
    BATCH,
    BLOCKS,
    EXISTS,
    HEAD,
    KEYS,
    PIECE,
    RECORD_BITS,
    RECORDS,
    TOKEN,
)
from ring_cute.hopper.backward_settings import TILE_KEYS, BackwardKind, tile_keys_of
from ring_cute.hopper.scores import HIDDEN, Place, below, capped_probabilities, sloped_probabilities
from ring_cute.hopper.softmax import multiply, sums_product, to_operand

CONSUMERS = 2
WARPS = 4 * CONSUMERS
END_BARRIER = 1
"""A named barrier of both consumers."""


@dataclass(frozen=True)
class Parts:
    """A consumer's products, their operands in shared memory, and what it holds in registers."""

    scores: Any
    sums: Any
    turned: Any
    keys: Any  # its 64 keys
    values: Any
    queries: Any  # of each stage
    douts: Any
    queries_turned: Any
    douts_turned: Any
    keys_turned: Any  # its 64 columns of D by each consumer's keys
    ds_read: Any  # its share of a block's rows by all keys, of each buffer
    dk: Any
    dv: Any
    ds_at: Any  # where this thread writes, in bytes
    dq_at: Any


class BackwardConsumer:
    """A warpgroup's part of `backward.HopperBackward`."""

    def __init__(self, kind: BackwardKind) -> None:
        self.kind = kind
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.dim = kind.padded
        self.head_dim = kind.head_dim
        self.block = kind.settings.block
        self.q_stages = kind.settings.q_stages
        self.do_stages = kind.settings.do_stages
        self.row_parts = 2 if self.dim == 64 else 1  # its share of dq: half of the rows, or of the columns
        self.dq_rows = self.block // self.row_parts
        self.tile_keys = tile_keys_of(kind.head_dim, kind.settings)
        self.key_parts, self.value_parts = self.tile_keys // 64, self.tile_keys // 64
        self.ds_shape = (self.block, self.tile_keys, 2)
        self.ds_bytes = 2 * self.block * self.tile_keys
        self.dq_buffers, self.v_readers = CONSUMERS, WARPS
        by_rows = self.row_parts > 1
        self.shares = [[Share(c, 0 if by_rows else c, c if by_rows else 0) for c in range(CONSUMERS)]]
        """Of dq, for each warp that sends some of them, in the order in which they come."""
        assert self.block % (16 * self.row_parts) == 0, "a product's depth is 16"

    @cute.jit
    def consume(
        self, shared, scores, sums, turned, dk_out, dv_out, departures, score_scale, scale,
        dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h, terms,
    ):  # fmt: skip
        """A consumer warpgroup, for all of the CTA's tiles."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4
        cid = warp >> 2
        lane = cute.arch.lane_idx()
        leader = lane == 0
        row = (warp & 3) * 16 + (lane >> 2)  # of the consumer's 64 keys, and this + 8
        column = 2 * (lane & 3)
        records = shared.records

        # operands in shared memory are the same for all threads
        flip = lambda x: cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, 2]))  # noqa: E731
        one = scores.get_slice(0)
        keys = scores.make_fragment_A(one.partition_A(shared.k))[None, None, None, cid]
        values = scores.make_fragment_A(one.partition_A(shared.v))[None, None, None, cid]
        queries = scores.make_fragment_B(one.partition_B(shared.q))
        douts = scores.make_fragment_B(one.partition_B(shared.do))
        queries_turned = sums.make_fragment_B(sums.get_slice(0).partition_B(flip(shared.q)))  # (D, BLOCK, stages)
        douts_turned = sums.make_fragment_B(sums.get_slice(0).partition_B(flip(shared.do)))
        one = turned.get_slice(0)
        k_turned = flip(shared.k)  # (D, 64, consumers)
        keys_turned = []
        for half in cutlass.range_constexpr(2):
            columns = cute.local_tile(
                k_turned[None, None, half], (64, 64), (cid if cutlass.const_expr(self.row_parts == 1) else 0, 0)
            )
            keys_turned.append(turned.make_fragment_A(one.partition_A(columns)))
        mine = cute.local_tile(  # (rows, keys, buffers)
            shared.ds, (self.dq_rows, TILE_KEYS, 2), (cid if cutlass.const_expr(self.row_parts == 2) else 0, 0, 0)
        )
        ds_read = turned.make_fragment_B(one.partition_B(mine))

        narrow = sums_product(self.dtype, self.head_dim)
        dk = cute.make_rmem_tensor(narrow.partition_shape_C((64, self.head_dim)), Float32)
        dv = cute.make_rmem_tensor(narrow.partition_shape_C((64, self.head_dim)), Float32)

        # where a thread writes: ds (its row of a matrix of stmatrix), dq (the first number); both in bytes
        query = lane & 7
        chunk = 2 * (warp & 3) + ((lane >> 3) & 1)
        ds_at = cid * self.block * 128 + (query + 8 * (lane >> 4)) * 128 + ((chunk ^ query) << 4)
        chunk = 4 * (warp & 1) + (lane >> 4)
        dq_at = (cid * 2 + ((warp & 3) >> 1)) * self.dq_rows * 128 + column * 128
        dq_at += ((chunk ^ column) << 4) + ((lane >> 2) & 3) * 4

        tiles, turn, blocks = Int32(0), Int32(0), Int32(0)
        q_stage, q_phase, do_stage, do_phase = Int32(0), Int32(0), Int32(0), Int32(0)
        ptx.wait(shared.record_full, 0)
        going = records[EXISTS, 0] != 0
        while going:
            slot = turn & (RECORDS - 1)
            total, count = records[BLOCKS, slot], records[KEYS, slot]
            if total > 0:
                dk.fill(0.0)
                dv.fill(0.0)
                ptx.wait(shared.k_full, tiles & 1)
                parts = Parts(
                    scores, narrow, turned, keys, values, queries, douts, queries_turned, douts_turned, keys_turned,
                    ds_read, dk, dv, ds_at, dq_at,
                )  # fmt: skip
                thread = (cid, leader, cid * 64 + row, column)
                state = (q_stage, q_phase, do_stage, do_phase, blocks)
                ptx.wait(shared.v_full, tiles & 1)
                state = self.consume_block(shared, parts, thread, state, score_scale, terms, count, True)
                for _ in cutlass.range(total - 1, unroll=1):
                    state = self.consume_block(shared, parts, thread, state, score_scale, terms, count, False)
                ptx.arrive(shared.v_empty, leader)
                dq = self.multiply_shared(shared, parts, state[4] - 1)
                warpgroup.wait_group(0)
                ptx.arrive(shared.k_empty, leader)
                self.leave_dq(shared, parts, dq, cid, state[4] - 1, leader)
                q_stage, q_phase, do_stage, do_phase, blocks = state
                tiles += 1
                piece, batch, head = (
                    Int64(records[PIECE, slot]),
                    Int64(records[BATCH, slot]),
                    Int64(records[HEAD, slot]),
                )
                token = Int64(records[TOKEN, slot] + cid * 64)
                dv_at = piece * dv_c + batch * dv_b + token * dv_s + head * dv_h + column
                dk_at = piece * dk_c + batch * dk_b + token * dk_s + head * dk_h + column
                self.leave(dv_out, dv, dv_at, dv_s, row, count - cid * 64)
                for e in cutlass.range_constexpr(cute.size(dk) // 4):
                    for c in cutlass.range_constexpr(4):
                        dk[4 * e + c] = dk[4 * e + c] * scale
                self.leave(dk_out, dk, dk_at, dk_s, row, count - cid * 64)
            if cutlass.const_expr(self.kind.departures):
                # every thread's additions come before the count
                cute.arch.barrier(barrier_id=END_BARRIER, number_of_threads=128 * CONSUMERS)
                if warp == 0 and leader:
                    ptx.add_release_sys(departures.iterator + records[PIECE, slot], count)
            cute.arch.sync_warp()  # all lanes have read the record
            ptx.arrive(shared.record_empty + slot, leader)
            turn += 1
            slot = turn & (RECORDS - 1)
            ptx.wait(shared.record_full + slot, (turn >> RECORD_BITS) & 1)
            going = records[EXISTS, slot] != 0

    def block_scores(self, scores):
        """Registers for scores: new ones, or what they held before a product would stay alive until then."""
        return cute.make_rmem_tensor(scores.partition_shape_C((64, self.block)), Float32)

    def operand(self, sums):
        """Registers for P or ds as an operand."""
        return cute.make_rmem_tensor(sums.partition_shape_A((64, self.block)), self.dtype)

    @cute.jit
    def consume_block(self, shared, parts, thread, state, scale, terms, count, first: cutlass.Constexpr):
        """A block but for its dq, and dq of the block before, if this is not a tile's first."""
        cid, leader, row, column = thread
        q_stage, q_phase, do_stage, do_phase, blocks = state
        buffer = blocks & 1
        s, dp = self.block_scores(parts.scores), self.block_scores(parts.scores)
        ptx.wait(shared.q_full + q_stage, q_phase)
        self.start_differences(shared, dp, q_stage, column)
        multiply(parts.scores, parts.keys, parts.queries[None, None, None, q_stage], s, False, self.head_dim)
        ptx.wait(shared.do_full + do_stage, do_phase)
        multiply(parts.scores, parts.values, parts.douts[None, None, None, do_stage], dp, True, self.head_dim)
        if cutlass.const_expr(not self.kind.softcap):  # there registers are short
            lse = self.of_queries(shared.lse, q_stage, column)  # on its way while scores are
        warpgroup.wait_group(1)
        if cutlass.const_expr(self.kind.softcap):
            lse = self.of_queries(shared.lse, q_stage, column)
        p16, ds16 = self.operand(parts.sums), self.operand(parts.sums)
        self.probabilities(shared, lse, s, p16, q_stage, scale, terms, row, column, count)
        ptx.wait(shared.ds_empty + buffer, ((blocks >> 1) & 1) ^ 1)
        warpgroup.wait_group(0)
        self.make_differences(shared, parts, s, dp, ds16, blocks)
        cute.arch.sync_warp()
        ptx.arrive(shared.ds_full + buffer, leader)
        if cutlass.const_expr(not self.kind.softcap):
            to_operand(s, p16)
        multiply(parts.sums, p16, parts.douts_turned[None, None, None, do_stage], parts.dv, True)
        if cutlass.const_expr(not first):
            dq = self.multiply_shared(shared, parts, blocks - 1)
        warpgroup.wait_group(0 if cutlass.const_expr(first) else 1)
        ptx.arrive(shared.do_empty + do_stage, leader)
        multiply(parts.sums, ds16, parts.queries_turned[None, None, None, q_stage], parts.dk, True)
        if cutlass.const_expr(not first):
            warpgroup.wait_group(1)
            self.leave_dq(shared, parts, dq, cid, blocks - 1, leader)
        warpgroup.wait_group(0)
        ptx.arrive(shared.q_empty + q_stage, leader)
        q_stage, q_phase = next_stage(q_stage, q_phase, self.q_stages)
        do_stage, do_phase = next_stage(do_stage, do_phase, self.do_stages)
        return q_stage, q_phase, do_stage, do_phase, blocks + 1

    @cute.jit
    def multiply_shared(self, shared, parts, block):
        """dq of a block, once both consumers' ds are there: issued, one group."""
        ptx.wait(shared.ds_full + (block & 1), (block >> 1) & 1)
        return self.multiply_dq(parts, block & 1)

    @cute.jit
    def leave_dq(self, shared, parts, dq, cid, block, leader):
        """dq of a block, which is made, on its way; its ds may be overwritten."""
        ptx.arrive(shared.ds_empty + (block & 1), leader)
        self.store_dq(shared, parts.dq_at, dq, cid, block, leader)

    @cute.jit
    def make_differences(self, shared, parts, s, dp, ds16, blocks):
        """ds from P and dP - delta, in registers and in shared memory."""
        for j in cutlass.range_constexpr(cute.size(dp) // 4):
            for e in cutlass.range_constexpr(4):
                dp[4 * j + e] = s[4 * j + e] * dp[4 * j + e]
        to_operand(dp, ds16)
        self.store_ds(shared, ds16, parts.ds_at, blocks & 1)
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def of_queries(self, stats, stage, column):
        """lse or delta of a thread's queries of a block: two of each eight."""
        own = cute.make_rmem_tensor(self.block // 4, Float32)
        for j in cutlass.range_constexpr(self.block // 8):
            for c in cutlass.range_constexpr(2):
                own[2 * j + c] = stats[8 * j + column + c, stage]
        return own

    @cute.jit
    def probabilities(self, shared, lse, s, p16, stage, scale, terms, row, column, count):
        """s becomes exp2(s scale - lse), 0 where a pair takes no part. With softcap that, rounded, is p16, and s it
        times the cap's derivative."""
        place, bound = None, None
        if cutlass.const_expr(self.kind.alibi):
            place = Place(shared.slopes[SLOPE, stage], None, shared.slopes[STEP, stage])
            bound = shared.bounds[APART, stage]
        if cutlass.const_expr(self.kind.softcap):
            below(s, scale)
            self.hide(shared, s, stage, row, column, count, HIDDEN)
            capped_probabilities(lse, s, p16, terms.cap, place, bound, row, column)
        else:
            if cutlass.const_expr(self.kind.alibi):
                sloped_probabilities(lse, s, scale, place, bound, row, column)
            else:
                for j in cutlass.range_constexpr(cute.size(s) // 4):
                    for c in cutlass.range_constexpr(2):
                        for half in cutlass.range_constexpr(2):
                            e = 4 * j + 2 * half + c
                            s[e] = ptx.exp2(ptx.fma(s[e], scale, -lse[2 * j + c]))
            self.hide(shared, s, stage, row, column, count, 0.0)

    @cute.jit
    def hide(self, shared, s, stage, row, column, count, value: cutlass.Constexpr):
        """That value where a pair of the block takes no part."""
        if shared.bounds[EDGE, stage] != 0:
            for half in cutlass.range_constexpr(2):
                own = row + 8 * half
                first = own - shared.bounds[FIRST_OFFSET, stage] - column
                last = own - shared.bounds[LAST_OFFSET, stage] - column
                if own >= count:
                    last = Int32(-8)
                for j in cutlass.range_constexpr(cute.size(s) // 4):
                    for c in cutlass.range_constexpr(2):
                        here, e = 8 * j + c, 4 * j + 2 * half + c
                        s[e] = cutlass.select_((first <= here) & (last >= here), s[e], Float32(value))

    @cute.jit
    def start_differences(self, shared, dp, stage, column):
        """-delta, to which dP is added; all of it is there before products are issued, or ptxas waits for these."""
        for j in cutlass.range_constexpr(cute.size(dp) // 4):
            for c in cutlass.range_constexpr(2):
                x = shared.delta[8 * j + column + c, stage]
                for half in cutlass.range_constexpr(2):
                    dp[4 * j + 2 * half + c] = ptx.late(x)

    @cute.jit
    def store_ds(self, shared, ds16, at, buffer):
        """A thread's ds, queries by keys."""
        words = cute.recast_tensor(ds16, Int32)
        start = ptx.shared_address(shared.ds.iterator) + at + buffer * self.ds_bytes
        for j in cutlass.range_constexpr(self.block // 16):
            ptx.store_matrices_turned(start + j * 2048, *(words[4 * j + e] for e in range(4)))

    @cute.jit
    def multiply_dq(self, parts, buffer):
        """dqᵀ = Kᵀ ds over both consumers' keys: issued, one group."""
        atom = cute.make_mma_atom(parts.turned.op)
        dq = cute.make_rmem_tensor(parts.turned.partition_shape_C((64, self.dq_rows)), Float32)
        warpgroup.fence()
        for part in cutlass.range_constexpr(TILE_KEYS // 16):
            atom.set(warpgroup.Field.ACCUMULATE, part > 0)
            k = parts.keys_turned[part // 4][None, None, part % 4]
            cute.gemm(atom, dq, k, parts.ds_read[None, None, part, buffer], dq)
        warpgroup.commit_group()
        return dq

    @cute.jit
    def store_dq(self, shared, at, dq, buffer, uses, leader):
        """A thread's share of dq to a buffer that has been used so many times, and word of it to the warp that sends
        it on."""
        ptx.wait(shared.dq_empty + buffer, (uses & 1) ^ 1)
        # the swizzle of the other three of four numbers is that of the first but for a bit
        start = ptx.opaque(at) + ptx.shared_address(shared.dq.iterator)
        for half in cutlass.range_constexpr(2):
            for c in cutlass.range_constexpr(2):
                here = (start ^ (16 * c + 32 * half)) + 128 * c
                for j in cutlass.range_constexpr(self.dq_rows // 8):
                    ptx.store_shared(here + 1024 * j, dq[4 * j + 2 * half + c])
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        ptx.arrive(shared.dq_full + buffer, leader)

    @cute.jit
    def leave(self, memory, x, at, stride, row, count):
        """A thread's share of dk or dv to its rows of global memory, `count` of them."""
        for half in cutlass.range_constexpr(2):
            own = row + 8 * half
            if own < count:
                pairs = cute.make_tensor(
                    memory.iterator + ((at + own * stride) >> 1), cute.make_layout(self.head_dim // 8, stride=4)
                )
                if cutlass.const_expr(self.kind.gradients == "final"):
                    for n in cutlass.range_constexpr(self.head_dim // 8):
                        pairs[n] = ptx.pack(x[4 * n + 2 * half], x[4 * n + 2 * half + 1], self.dtype)
                else:
                    if cutlass.const_expr(self.kind.gradients == "added"):
                        earlier = cute.make_rmem_tensor(self.head_dim // 8, Int64)
                        for n in cutlass.range_constexpr(self.head_dim // 8):
                            earlier[n] = pairs[n]
                        sums = cute.recast_tensor(earlier, Float32)
                        for n in cutlass.range_constexpr(self.head_dim // 8):
                            for c in cutlass.range_constexpr(2):
                                sums[2 * n + c] = sums[2 * n + c] + x[4 * n + 2 * half + c]
                            pairs[n] = earlier[n]
                    else:
                        for n in cutlass.range_constexpr(self.head_dim // 8):
                            ptx.add_pair(pairs.iterator + 4 * n, x[4 * n + 2 * half], x[4 * n + 2 * half + 1])
