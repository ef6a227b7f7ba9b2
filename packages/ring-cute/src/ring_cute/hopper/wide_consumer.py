"""The consumers of the backward of wide heads, beyond 128: one has P and dv, the other dS and dk, of the same keys.

    warpgroup 0: four warps, few registers            warpgroups 1 (dv) and 2 (dk): the same 64 keys, many registers
    ┌───────────── load ───────────────┐              ┌─────────── dv ───────────┐      ┌──────────── dk ────────────┐
    │ K and V tile, then blocks of     │── full ────► │ P = exp2(K Q[n]ᵀ - lse)  │─ P ─►│ ds = P (V dO[n]ᵀ - delta)  │
    │ queries by TMA: Q and dO rings   │◄── empty ─── │ dv += P dO[n]            │◄ ds ─│ dk += ds Q[n]              │
    ├──────────── describe ────────────┤              │ dqᵀ = Kᵀ ds, half of D   │      │ dqᵀ = Kᵀ ds, the other half│
    │ lse, delta, edges of each block  │── full ────► │       64 columns at a time, to shared memory                  │
    ├────── add_queries, 2 warps ──────┤              │                          │      │                            │
    │ dq by TMA reduce-add to memory   │◄── full ──── │                          │      │                            │
    └──────────────────────────────────┘              └──────────────────────────┘      └────────────────────────────┘

All else is as in `backward`: the kernel itself, tiles, the walk, order, flags and departures.

Why so. dk and dv of 64 keys by 256 are 128 registers of each of 256 threads, whoever has them; those of 128 keys would
be all there are. K and V of 64 keys are 64 KiB at a head dim of 256, a stage of Q or dO is 32. Were keys or queries of
scores split between the warpgroups, products of 32 columns would read 24 bytes of operands for every 16 that the tensor
cores take; were D split for dv and dk, P and ds would come from shared memory. Where one consumer has all of P and dv,
and the other all of dP and dk, products have 64 columns or D, and P and ds are operands from registers. For 64 queries
by 64 keys by 256, in cycles of 128 bytes of shared memory: scores and dP 1024, dv and dk 512, dq 512, P 256, ds 64, dq
out and in 1024, loads 512: 3900, while the tensor cores take 2560. P goes from one consumer to the other in fp32, each
thread's to the same thread of the other (scores and dP are laid out alike), so that ds is rounded once.

dq is summed by twice as many tiles as with 128 keys. What that costs is what limits this kernel: sums keep the way into
the L2 busy to 91-94 % at 475 TFLOP/s (ncu, head dim 192). 80 keys (as FlashAttention-3) fit by transposing dv and dk,
whose products then read both operands from shared memory; a pair of CTAs that shares 128 keys halves it
(`paired_consumer`), where shared memory holds the peer's K as well: at 192, not at 256.

Shared memory: as in `backward`, but `k`, `v` (64, D); `ds` (BLOCK, 64 keys) twice; `dq` (BLOCK, 64 columns) in fp32,
two or more; and `p` in fp32, as threads have it (with a softcap, times the cap's derivative).

Barriers besides those of `backward`: `p_full`, one a warp: its threads' P is there. It needs no `p_empty`, since the
consumer of dv writes the next P only once it has seen ds, which the other made of this P. `ds_full`'s
writers are the four warps of one consumer. `v_empty` and `p_full` have arrivals of one consumer.

Order of a block, of which products that follow each other without a wait are under way together:

    dv: P[n] there │ dv, s[n+1] │ dO[n] free │ ds[n] there │ dq │ P[n+1] made, handed over │ dq goes │ dq │ dq goes
    dk: dP[n] there, P[n] there │ ds[n] made, stored │ dk, dq │ Q[n] free, dq goes │ dq, dP[n+1] │ dq goes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import warpgroup

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_consumer import CONSUMERS, END_BARRIER, WARPS, BackwardConsumer
from ring_cute.hopper.backward_producer import Share, next_stage
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
from ring_cute.hopper.backward_settings import BackwardKind
from ring_cute.hopper.softmax import keep, kept_operand, multiply, multiply_kept, to_operand

VALUES, QUERIES = 0, 1
"""What a consumer sums: dv, from P and dO; dk, from dS and Q."""


@dataclass(frozen=True)
class WideParts:
    """A consumer's products, their operands in shared memory, and what it holds in registers."""

    scores: Any
    sums: Any
    turned: Any
    first: Any  # K, or V: (64, D); None where all of it is in registers
    kept: Any  # the first columns of them, in registers
    by_kept: Any  # scores, of these
    second: Any  # Q, or dO, of each stage: with the first it makes scores, or dP
    factors: Any  # dO, or Q, of each stage: with P, or dS, it makes dv, or dk
    keys_turned: Any  # 64 columns of D by 64 keys, of each of its shares of dq and each part of the keys
    ds_read: Any  # (BLOCK, 64 keys), of each buffer, or what is there in pairs
    total: Any  # dv, or dk
    ds_at: Any  # where this thread writes, in bytes
    dq_at: Any


class WideConsumer(BackwardConsumer):
    """A warpgroup's part of `backward.HopperBackward`, where heads are wide."""

    def __init__(self, kind: BackwardKind) -> None:
        super().__init__(kind)
        assert self.block == 64, "a row of ds has 64 keys, and as many queries are a buffer of dq"
        self.columns_kept = (kind.settings.k_columns, kind.settings.v_columns)
        self.cluster = kind.settings.cluster
        self.dq_rows, self.dq_buffers, self.v_readers = self.block, kind.settings.dq_buffers, WARPS // CONSUMERS
        assert self.dq_buffers in (CONSUMERS, self.dim // 64), "one for each consumer, or for each share"
        columns = range(self.dim // 64)
        first = -(-len(columns) // 2)
        self.shares = [[], []]  # each consumer's, by a warp of their own
        for role, own in ((VALUES, columns[:first]), (QUERIES, columns[first:])):
            for nth, c in enumerate(own):
                alone = kind.settings.dq_buffers > CONSUMERS  # a buffer for each share
                self.shares[role].append(Share(c, c, 0) if alone else Share(role, c, 0, nth, len(own)))
        # With one share this consumer frees Q behind the next dP, whose dO comes behind the next Q.
        assert self.q_stages > 1 or len(self.shares[QUERIES]) > 1, "the next Q has a stage of its own"

    def first_key(self) -> Any:
        """Of the tile's keys the first one of this CTA."""
        return Int32(0)

    def own_keys(self, count: Any) -> Any:
        """Of the tile's so many keys those of this CTA."""
        return count

    def turned_keys(self, keys: Any, turned: Any, columns: int) -> list[Any]:
        """K as dq's first operand: 64 columns of D by 64 keys, of each part of the keys."""
        flipped = cute.make_tensor(keys.iterator, cute.select(keys.layout, mode=[1, 0, 2]))
        parts = [cute.local_tile(flipped[None, None, n], (64, 64), (columns, 0)) for n in range(self.key_parts)]
        return [turned.make_fragment_A(turned.get_slice(0).partition_A(part)) for part in parts]

    @cute.jit
    def consume(
        self, shared, scores, sums, turned, dk_out, dv_out, departures, score_scale, scale,
        dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h, terms,
    ):  # fmt: skip
        """A consumer warpgroup, for all of the CTA's tiles."""
        both = (shared, scores, sums, turned)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) < 8:
            self.consume_wide(*both, dv_out, departures, score_scale, scale, (dv_c, dv_b, dv_s, dv_h), terms, VALUES)
        else:
            self.consume_wide(*both, dk_out, departures, score_scale, scale, (dk_c, dk_b, dk_s, dk_h), terms, QUERIES)

    @cute.jit
    def consume_wide(
        self, shared, scores, sums, turned, out, departures, score_scale, scale, strides, terms,
        role: cutlass.Constexpr,
    ):  # fmt: skip
        """The one that sums these. strides: of out, piece, batch entry, token and head."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) & 3
        lane = cute.arch.lane_idx()
        leader = lane == 0
        row = warp * 16 + (lane >> 2)  # of the CTA's 64 keys, and this + 8
        column = 2 * (lane & 3)
        records, first_key = shared.records, self.first_key()

        # operands in shared memory are the same for all threads
        flip = lambda x: cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, 2]))  # noqa: E731
        one = scores.get_slice(0)
        stationary = shared.k if cutlass.const_expr(role == VALUES) else shared.v
        moving = shared.q if cutlass.const_expr(role == VALUES) else shared.do
        other = shared.do if cutlass.const_expr(role == VALUES) else shared.q
        first = None
        if cutlass.const_expr(stationary is not None):
            first = scores.make_fragment_A(one.partition_A(stationary))[None, None, None, 0]
        by_kept, kept = kept_operand(self.dtype, self.block, self.columns_kept[role])
        second = scores.make_fragment_B(one.partition_B(moving))
        factors = sums.make_fragment_B(sums.get_slice(0).partition_B(flip(other)))  # (D, BLOCK, stages)
        keys_turned = [self.turned_keys(shared.k, turned, share.columns) for share in self.shares[role]]
        ds_read = turned.make_fragment_B(turned.get_slice(0).partition_B(shared.ds))
        total = cute.make_rmem_tensor(sums.partition_shape_C((64, self.dim)), Float32)

        # where a thread writes: ds (its row of a matrix of stmatrix), dq (the first number); both in bytes
        query = lane & 7
        chunk = 2 * warp + ((lane >> 3) & 1)
        ds_at = (query + 8 * (lane >> 4)) * 128 + ((chunk ^ query) << 4)
        chunk = 4 * (warp & 1) + (lane >> 4)
        dq_at = (warp >> 1) * self.dq_rows * 128 + column * 128
        dq_at += ((chunk ^ column) << 4) + ((lane >> 2) & 3) * 4

        tiles, turn, blocks = Int32(0), Int32(0), Int32(0)
        q_stage, q_phase, do_stage, do_phase = Int32(0), Int32(0), Int32(0), Int32(0)
        ptx.wait(shared.record_full, 0)
        going = records[EXISTS, 0] != 0
        while going:
            slot = turn & (RECORDS - 1)
            number, count = records[BLOCKS, slot], records[KEYS, slot]
            if number > 0:
                total.fill(0.0)
                do_stage, do_phase = self.take_values(shared, by_kept, kept, tiles, do_stage, do_phase, lane, role)
                if cutlass.const_expr(role == VALUES):
                    ptx.wait(shared.k_full, tiles & 1)
                    if cutlass.const_expr(kept is not None):
                        keep(by_kept, kept, shared.k[None, None, 0], cute.arch.thread_idx()[0] & 127)
                parts = WideParts(
                    scores,
                    sums,
                    turned,
                    first,
                    kept,
                    by_kept,
                    second,
                    factors,
                    keys_turned,
                    ds_read,
                    total,
                    ds_at,
                    dq_at,
                )
                thread = (warp, lane, first_key + row, column)
                state = (q_stage, q_phase, do_stage, do_phase, blocks)
                if cutlass.const_expr(role == VALUES):
                    state = self.sum_values(shared, parts, thread, state, number, tiles, score_scale, terms, count)
                else:
                    state = self.sum_queries(shared, parts, thread, state, number, tiles)
                q_stage, q_phase, do_stage, do_phase, blocks = state
                tiles += 1
                piece, batch, head = (
                    Int64(records[PIECE, slot]),
                    Int64(records[BATCH, slot]),
                    Int64(records[HEAD, slot]),
                )
                by_piece, by_batch, by_token, by_head = strides
                token = Int64(records[TOKEN, slot] + first_key)
                at = piece * by_piece + batch * by_batch + token * by_token + head * by_head
                if cutlass.const_expr(role == QUERIES):
                    for e in cutlass.range_constexpr(cute.size(total) // 4):
                        for c in cutlass.range_constexpr(4):
                            total[4 * e + c] = total[4 * e + c] * scale
                self.leave(out, total, at + column, by_token, row, count - first_key)
            if cutlass.const_expr(self.kind.departures):
                # every thread's additions come before the count
                cute.arch.barrier(barrier_id=END_BARRIER, number_of_threads=128 * CONSUMERS)
                if 4 * role + warp == 0 and leader:
                    ptx.add_release_sys(departures.iterator + records[PIECE, slot], self.own_keys(count))
            cute.arch.sync_warp()  # all lanes have read the record
            ptx.arrive_everywhere(shared.record_empty + slot, lane, self.cluster)
            turn += 1
            slot = turn & (RECORDS - 1)
            ptx.wait(shared.record_full + slot, (turn >> RECORD_BITS) & 1)
            going = records[EXISTS, slot] != 0

    @cute.jit
    def take_values(self, shared, by_kept, kept, tiles, do_stage, do_phase, lane, role: cutlass.Constexpr):
        """Until a tile's V is there, for the consumer that reads it; some columns of it to registers."""
        if cutlass.const_expr(role == QUERIES):
            ptx.wait(shared.v_full, tiles & 1)
            if cutlass.const_expr(kept is not None):
                keep(by_kept, kept, shared.v[None, None, 0], cute.arch.thread_idx()[0] & 127)
        return do_stage, do_phase

    # the consumer that has dv

    @cute.jit
    def sum_values(self, shared, parts, thread, state, number, tiles, scale, terms, count):
        """dv of a tile, of so many blocks, and the first share of their dq."""
        p16 = self.first_p(shared, parts, thread, state, scale, terms, count)
        for _ in cutlass.range(number - 1, unroll=1):
            state = self.values_block(shared, parts, p16, thread, state, scale, terms, count, False)
        return self.values_block(shared, parts, p16, thread, state, scale, terms, count, True)

    @cute.jit
    def first_p(self, shared, parts, thread, state, scale, terms, count):
        """P of a tile's first block, handed over, and as an operand."""
        q_stage, q_phase, _, _, blocks = state
        ptx.wait(shared.q_full + q_stage, q_phase)
        s, p16 = self.block_scores(parts.scores), self.operand(parts.sums)
        self.multiply_scores(parts, q_stage, s)
        warpgroup.wait_group(0)
        self.make_p(shared, s, p16, thread, q_stage, blocks, scale, terms, count)
        return p16

    @cute.jit
    def values_block(self, shared, parts, p16, thread, state, scale, terms, count, last: cutlass.Constexpr):
        """A block whose P is in p16; and P of the next one, unless this is the last."""
        _, lane, _, _ = thread
        leader = lane == 0
        q_stage, q_phase, do_stage, do_phase, blocks = state
        next_q, next_q_phase = next_stage(q_stage, q_phase, self.q_stages)
        next_do, next_do_phase = next_stage(do_stage, do_phase, self.do_stages)
        ptx.wait(shared.do_full + do_stage, do_phase)
        multiply(parts.sums, p16, parts.factors[None, None, None, do_stage], parts.total, True)
        s = self.block_scores(parts.scores)
        if cutlass.const_expr(not last):
            ptx.wait(shared.q_full + next_q, next_q_phase)
            self.multiply_scores(parts, next_q, s)
        warpgroup.wait_group(0 if cutlass.const_expr(last) else 1)
        ptx.arrive(shared.do_empty + do_stage, leader)
        ptx.wait(shared.ds_full + (blocks & 1), (blocks >> 1) & 1)
        shares = self.shares[VALUES]
        for n in cutlass.range_constexpr(len(shares)):
            dq = self.multiply_share(parts, n, blocks & 1)
            if cutlass.const_expr(n == 0 and not last):
                warpgroup.wait_group(1)
                self.make_p(shared, s, p16, thread, next_q, blocks + 1, scale, terms, count)
            warpgroup.wait_group(0)
            if cutlass.const_expr(n == len(shares) - 1):
                ptx.arrive(shared.ds_empty + (blocks & 1), leader)
                if cutlass.const_expr(last):
                    ptx.arrive(shared.k_empty, leader)
            self.store_share(shared, parts, dq, shares[n], blocks, leader)
        return next_q, next_q_phase, next_do, next_do_phase, blocks + 1

    @cute.jit
    def make_p(self, shared, s, p16, thread, stage, blocks, scale, terms, count):
        """P from scores: for the other consumer in fp32, thread for thread (with softcap times the cap's derivative),
        and here as an operand."""
        warp, lane, row, column = thread
        lse = self.of_queries(shared.lse, stage, column)
        self.probabilities(shared, lse, s, p16, stage, scale, terms, row, column, count)
        self.await_room(shared, warp, blocks)
        four = cute.make_rmem_tensor(4, Float32)
        for j in cutlass.range_constexpr(cute.size(s) // 4):
            for e in cutlass.range_constexpr(4):
                four[e] = s[4 * j + e]
            cute.autovec_copy(four, shared.p[None, warp * 32 + lane, j])
        cute.arch.sync_warp()
        ptx.arrive(shared.p_full + warp, lane == 0)
        ptx.arrive_everywhere(shared.q_empty + stage, lane, self.cluster)
        if cutlass.const_expr(not self.kind.softcap):
            to_operand(s, p16)

    def await_room(self, shared, warp, blocks):
        """Until the P before has been read: it has, where this consumer has seen its ds."""

    # the consumer that has dk

    @cute.jit
    def sum_queries(self, shared, parts, thread, state, number, tiles):
        """dk of a tile, of so many blocks, and the other share of their dq."""
        dp = self.first_dp(shared, parts, thread, state, tiles)
        for _ in cutlass.range(number - 1, unroll=1):
            state = self.queries_block(shared, parts, dp, thread, state, False)
        return self.queries_block(shared, parts, dp, thread, state, True)

    @cute.jit
    def first_dp(self, shared, parts, thread, state, tiles):
        """dP - delta of a tile's first block; K is there as well then."""
        q_stage, q_phase, do_stage, do_phase, _ = state
        dp = self.block_scores(parts.scores)
        ptx.wait(shared.q_full + q_stage, q_phase)  # delta comes with it
        self.start_differences(shared, dp, q_stage, thread[3])
        ptx.wait(shared.do_full + do_stage, do_phase)
        self.multiply_scores(parts, do_stage, dp, True)
        ptx.wait(shared.k_full, tiles & 1)  # for dq
        warpgroup.wait_group(0)
        return dp

    @cute.jit
    def queries_block(self, shared, parts, dp, thread, state, last: cutlass.Constexpr):
        """A block whose dP is in dp; and dP of the next one, unless this is the last."""
        warp, lane, _, column = thread
        leader = lane == 0
        q_stage, q_phase, do_stage, do_phase, blocks = state
        next_q, next_q_phase = next_stage(q_stage, q_phase, self.q_stages)
        next_do, next_do_phase = next_stage(do_stage, do_phase, self.do_stages)
        ptx.arrive(shared.do_empty + do_stage, leader)
        if cutlass.const_expr(last):
            ptx.arrive(shared.v_empty, leader)
        ds16 = self.operand(parts.sums)
        ptx.wait(shared.p_full + warp, blocks & 1)
        self.take_p(shared, dp, warp * 32 + lane)
        to_operand(dp, ds16)
        ptx.wait(shared.ds_empty + (blocks & 1), ((blocks >> 1) & 1) ^ 1)
        self.store_ds(shared, ds16, parts.ds_at, blocks & 1)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        ptx.arrive(shared.ds_full + (blocks & 1), leader)  # P has been read, too
        multiply(parts.sums, ds16, parts.factors[None, None, None, q_stage], parts.total, True)
        ptx.wait(shared.ds_full + (blocks & 1), (blocks >> 1) & 1)
        next_dp = self.block_scores(parts.scores)
        shares = self.shares[QUERIES]
        for n in cutlass.range_constexpr(len(shares)):
            ahead = n == len(shares) - 1 and not last
            if cutlass.const_expr(ahead):
                ptx.wait(shared.q_full + next_q, next_q_phase)  # delta comes with it
                self.start_differences(shared, next_dp, next_q, column)
            dq = self.multiply_share(parts, n, blocks & 1)
            if cutlass.const_expr(ahead):
                ptx.wait(shared.do_full + next_do, next_do_phase)
                self.multiply_scores(parts, next_do, next_dp, True)
            warpgroup.wait_group(1 if cutlass.const_expr(ahead) else 0)
            if cutlass.const_expr(n == 0):
                ptx.arrive(shared.q_empty + q_stage, leader)
            if cutlass.const_expr(n == len(shares) - 1):
                ptx.arrive(shared.ds_empty + (blocks & 1), leader)
                if cutlass.const_expr(last):
                    ptx.arrive(shared.k_empty, leader)
            self.store_share(shared, parts, dq, shares[n], blocks, leader)
        if cutlass.const_expr(not last):
            warpgroup.wait_group(0)
            for e in cutlass.range_constexpr(cute.size(dp)):
                dp[e] = next_dp[e]
        return next_q, next_q_phase, next_do, next_do_phase, blocks + 1

    @cute.jit
    def take_p(self, shared, dp, thread):
        """dP - delta becomes ds."""
        four = cute.make_rmem_tensor(4, Float32)
        for j in cutlass.range_constexpr(cute.size(dp) // 4):
            cute.autovec_copy(shared.p[None, thread, j], four)
            for e in cutlass.range_constexpr(4):
                dp[4 * j + e] = four[e] * dp[4 * j + e]

    # both

    @cute.jit
    def multiply_scores(self, parts, stage, s, add: cutlass.Constexpr = False):
        """Scores of a block, or dP, added to what is there: issued, one group."""
        second = parts.second[None, None, None, stage]
        multiply_kept(parts.scores, parts.by_kept, parts.kept, parts.first, second, s, add, self.head_dim)

    @cute.jit
    def multiply_share(self, parts, n: cutlass.Constexpr, buffer):
        """64 columns of dqᵀ = Kᵀ ds: issued, one group."""
        dq = cute.make_rmem_tensor(parts.turned.partition_shape_C((64, self.dq_rows)), Float32)
        multiply(parts.turned, parts.keys_turned[n][0], parts.ds_read[None, None, None, buffer], dq, False)
        return dq

    @cute.jit
    def store_share(self, shared, parts, dq, share: cutlass.Constexpr, blocks, leader):
        """64 columns of dq to their buffer."""
        at = parts.dq_at + share.buffer * (self.dq_rows * 64 * 4)
        self.store_dq(shared, at, dq, share.buffer, blocks * share.shares + share.nth, leader)
