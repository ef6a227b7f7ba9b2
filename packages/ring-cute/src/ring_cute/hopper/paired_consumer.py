"""The consumers of the backward of wide heads in pairs of CTAs, 128 keys a tile, 64 each: dq leaves half as often.

    CTA 0 of the cluster, keys 0-63 of the tile                        CTA 1, keys 64-127
    ┌─────────── dv ───────────┐    ┌──────────── dk ────────────┐     ┌──── dk ────┐  ┌──── dv ────┐
    │ P = exp2(K Q[n]ᵀ - lse)  │─P─►│ ds = P (V dO[n]ᵀ - delta)  │     │            │  │            │
    │ dv += P dO[n]            │    │ dk += ds Q[n]              │     │    as in   │  │    as in   │
    │                          │    │ ds of queries 32-63 ───────┼────►│    CTA 0   │  │    CTA 0   │
    │                          │    │    ┌───────────────────────┼─────┤ ds of 0-31 │  │            │
    │ dqᵀ = Kᵀ ds of block     │◄───┼────┴► of queries 0-31, all │     │ dq of      │  │ dq of      │
    │ n - 1, columns 0-127     │    │ 128 keys: columns 128-191  │     │ 32-63      │  │ 32-63      │
    └──────────────────────────┘    └────────────────────────────┘     └────────────┘  └────────────┘

All else is as in `wide_consumer`, and warpgroup 0 as in `backward`. Both CTAs walk the same blocks of 64 queries, and
each loads half of a block for both. Of a block's dq each makes 32 rows, over the keys of both, of which it keeps K; V
only of its own. So it sends the peer ds of the other 32 rows, 4 KiB a block, and gets as much. dq is that of the block
before, so that nobody waits for the exchange; that of a tile's last block is made at its end, and in its first block a
dq of nothing is made and dropped.

V stays in registers of the consumer of dk, all of it, which has one share of dq for that: it comes through dO's stages,
as a block before the tile's first, that the consumer of dv only passes on. A tile's Q, V and dO are loaded before its
K, which the tile before gives back last. Which tile is next asks the first CTA, and tells the other (`records.tell`). A
CTA without keys, where a tile has 64 or fewer, takes part all the same: its K and V are zeros, its pairs hidden.

Shared memory: as in `wide_consumer`, but no `v`; `k` (64, D) twice, its own keys and the peer's; `ds` (32 queries, 64
keys) three times a buffer: queries 0-31 and 32-63 of its own keys, of which it reads those that its dq is of and sends
the others, and what the peer sends; `dq` (32 queries, 64 columns) in fp32; `numbers`, of tiles, as in `forward`.

Barriers, count and who arrives; all others are those of `wide_consumer`:

    ds_full    a buffer   4  the warps of dk, each of which expects a quarter of the peer's bytes; these bytes
    ds_empty   a buffer  16  the warps of both CTAs that have made dq of this buffer: each warp at both CTAs' barriers
    p_full     a warp     1  that warp of dv: P is there
    p_empty    a warp     1  that warp of dk: its P is in registers. dv no longer sees ds before it makes the next P
    record_empty         22  the 8 consumer warps, describe and two add_queries, of both CTAs, at both
    number_full           1  the second CTA's load warp, which expects the number; its four bytes

`q_full` and `do_full` expect the peer's half of a block as well; `q_empty` and `do_empty` count the 16 warps of both,
each at both CTAs' barriers, as `ds_empty` does. `v_full` and `v_empty` are not used.

Why two CTAs' counts cannot be mixed up. Use u + 1 of a buffer of ds, whose bytes the peer sends and whose readers
arrive here, begins on both sides only when `ds_empty` there has seen all 16 warps read use u, for which each has waited
for `ds_full`: phases of both CTAs are never more than one apart, and bytes that come before their `expect` only make
the count negative for a while. The copy to the peer reads `ds` here; that it has done so says `ds_empty` as well: who
arrives there had what was copied. Tiles without a block touch no buffer; their records count as others do.

Order of a block, of which products that follow each other without a wait are under way together:

    dv: P[n] there │ dv, ds[n-1] there, dq[n-1] │ dO[n] free │ s[n+1] │ dq goes │ P[n+1] made, P[n] read, handed over
    dk: dP[n] there, ds[n-1] there │ dq[n-1] │ P[n] there, read │ ds[n] made, stored, sent │ dk │ dq goes │ Q[n] free │
        -delta, of Q[n+1], and dO[n+1] there │ dP[n+1]

Q[n] is free before dO[n+1] is waited for, so that Q[n+2] is there when P[n+1] is. Nobody waits in a circle: loads are
waited for in the order in which they come; in block n dk waits for what dv and the peer do in it or before; dv for no
more of it than that dk has read P[n], which dk does without waiting for anything that dv does later.

For 64 queries by 64 keys by 192, in cycles of 128 bytes of shared memory: scores and dP 768, dv and dk 384, dq 576, P
256, ds 128, dq out and in 384, loads 384: 2880, less 16 for each 16 columns of K or V in registers, so 2576; the tensor
cores take 1920. It takes some 3000 of them (ncu, at full clock).
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import warpgroup

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_producer import next_stage
from ring_cute.hopper.backward_settings import BackwardKind
from ring_cute.hopper.softmax import keep, multiply, to_operand
from ring_cute.hopper.wide_consumer import QUERIES, VALUES, WideConsumer

EXCHANGE_BARRIER = 2
"""A named barrier of the consumer that makes ds."""
OWN, PEER = 0, 1
"""Parts of K, and of the keys that dq is summed over."""
FROM_PEER = 2
"""Of a buffer's three parts of ds that which the peer sends; the other two are halves of the queries."""
PARTS = 3


class PairedConsumer(WideConsumer):
    """A warpgroup's part of `backward.HopperBackward`, where two CTAs own a tile."""

    def __init__(self, kind: BackwardKind) -> None:
        super().__init__(kind)
        assert self.cluster == 2, "each has half of a block's queries"
        assert self.q_stages > 1, "scores are a block ahead of dk"
        assert kind.settings.v_columns == self.dim, "V has no place but registers"
        self.key_parts, self.value_parts = 2, 0
        self.dq_rows = self.block // 2
        self.ds_shape = (self.dq_rows, 64, 2 * PARTS)
        self.part_bytes = 2 * self.dq_rows * 64
        self.ds_bytes = PARTS * self.part_bytes

    def first_key(self) -> Any:
        return cute.arch.block_idx_in_cluster() * 64

    def own_keys(self, count: Any) -> Any:
        return cute.math.max(cute.math.min(count - self.first_key(), 64), 0)

    @cute.jit
    def take_values(self, shared, by_kept, kept, tiles, do_stage, do_phase, lane, role: cutlass.Constexpr):
        """V, which comes as if it were a block of dO, to registers of the consumer of dk, all of it."""
        ptx.wait(shared.do_full + do_stage, do_phase)
        if cutlass.const_expr(role == QUERIES):
            keep(by_kept, kept, shared.do[None, None, do_stage], cute.arch.thread_idx()[0] & 127)
            cute.arch.sync_warp()
        ptx.arrive_everywhere(shared.do_empty + do_stage, lane, self.cluster)
        return next_stage(do_stage, do_phase, self.do_stages)

    # the consumer that has dv

    @cute.jit
    def sum_values(self, shared, parts, thread, state, number, tiles, scale, terms, count):
        """dv of a tile, of so many blocks, and the first shares of their dq."""
        p16 = self.first_p(shared, parts, thread, state, scale, terms, count)
        for n in cutlass.range(number - 1, unroll=1):
            state = self.values_block(shared, parts, p16, thread, state, scale, terms, count, n > 0, False)
        state = self.values_block(shared, parts, p16, thread, state, scale, terms, count, number > 1, True)
        self.last_shares(shared, parts, VALUES, state[4] - 1, thread[1])
        return state

    @cute.jit
    def values_block(
        self, shared, parts, p16, thread, state, scale, terms, count, follows, last: cutlass.Constexpr
    ):  # fmt: skip
        """A block whose P is in p16, but for its dq; dq of the block before, which this one follows unless it is the
        tile's first; and P of the next one, unless this is the last."""
        _, lane, _, _ = thread
        q_stage, q_phase, do_stage, do_phase, blocks = state
        next_q, next_q_phase = next_stage(q_stage, q_phase, self.q_stages)
        next_do, next_do_phase = next_stage(do_stage, do_phase, self.do_stages)
        ptx.wait(shared.do_full + do_stage, do_phase)
        multiply(parts.sums, p16, parts.factors[None, None, None, do_stage], parts.total, True)
        shares = self.multiply_shares(shared, parts, VALUES, blocks - 1, follows)
        warpgroup.wait_group(len(shares))
        ptx.arrive_everywhere(shared.do_empty + do_stage, lane, self.cluster)
        s = self.block_scores(parts.scores)
        if cutlass.const_expr(not last):
            ptx.wait(shared.q_full + next_q, next_q_phase)
            self.multiply_scores(parts, next_q, s)
        warpgroup.wait_group(0 if cutlass.const_expr(last) else 1)
        if follows:
            self.leave_shares(shared, parts, VALUES, shares, blocks - 1, lane)
        if cutlass.const_expr(not last):
            warpgroup.wait_group(0)
            self.make_p(shared, s, p16, thread, next_q, blocks + 1, scale, terms, count)
        return next_q, next_q_phase, next_do, next_do_phase, blocks + 1

    def await_room(self, shared, warp, blocks):
        ptx.wait(shared.p_empty + warp, (blocks & 1) ^ 1)

    # the consumer that has dk

    @cute.jit
    def sum_queries(self, shared, parts, thread, state, number, tiles):
        """dk of a tile, of so many blocks, and the last share of their dq."""
        dp = self.first_dp(shared, parts, thread, state, tiles)
        for n in cutlass.range(number - 1, unroll=1):
            state = self.queries_block(shared, parts, dp, thread, state, n > 0, False)
        state = self.queries_block(shared, parts, dp, thread, state, number > 1, True)
        self.last_shares(shared, parts, QUERIES, state[4] - 1, thread[1])
        return state

    @cute.jit
    def queries_block(self, shared, parts, dp, thread, state, follows, last: cutlass.Constexpr):
        """A block whose dP is in dp, but for its dq; dq of the block before, which this one follows unless it is the
        tile's first; and dP of the next one, unless this is the last."""
        warp, lane, _, column = thread
        leader = lane == 0
        q_stage, q_phase, do_stage, do_phase, blocks = state
        next_q, next_q_phase = next_stage(q_stage, q_phase, self.q_stages)
        next_do, next_do_phase = next_stage(do_stage, do_phase, self.do_stages)
        ptx.arrive_everywhere(shared.do_empty + do_stage, lane, self.cluster)
        shares = self.multiply_shares(shared, parts, QUERIES, blocks - 1, follows)
        ds16 = self.operand(parts.sums)
        ptx.wait(shared.p_full + warp, blocks & 1)
        self.take_p(shared, dp, warp * 32 + lane)
        cute.arch.sync_warp()
        ptx.arrive(shared.p_empty + warp, leader)
        to_operand(dp, ds16)
        self.share_ds(shared, parts, ds16, warp, leader, blocks)
        multiply(parts.sums, ds16, parts.factors[None, None, None, q_stage], parts.total, True)
        warpgroup.wait_group(1)
        if follows:
            self.leave_shares(shared, parts, QUERIES, shares, blocks - 1, lane)
        warpgroup.wait_group(0)
        ptx.arrive_everywhere(shared.q_empty + q_stage, lane, self.cluster)
        if cutlass.const_expr(not last):
            next_dp = self.block_scores(parts.scores)
            ptx.wait(shared.q_full + next_q, next_q_phase)  # delta comes with it
            self.start_differences(shared, next_dp, next_q, column)
            ptx.wait(shared.do_full + next_do, next_do_phase)
            self.multiply_scores(parts, next_do, next_dp, True)
            warpgroup.wait_group(0)
            for e in cutlass.range_constexpr(cute.size(dp)):
                dp[e] = next_dp[e]
        return next_q, next_q_phase, next_do, next_do_phase, blocks + 1

    @cute.jit
    def share_ds(self, shared, parts, ds16, warp, leader, blocks):
        """A block's ds to shared memory, and the peer's half of the queries on its way there."""
        buffer = blocks & 1
        ptx.wait(shared.ds_empty + buffer, ((blocks >> 1) & 1) ^ 1)
        self.store_ds(shared, ds16, parts.ds_at, buffer)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=EXCHANGE_BARRIER, number_of_threads=128)  # all of ds is there, and visible
        peer = cute.arch.block_idx_in_cluster() ^ 1
        start = ptx.shared_address(shared.ds.iterator) + buffer * self.ds_bytes
        ptx.send_bytes(
            start + peer * self.part_bytes, start + FROM_PEER * self.part_bytes, self.part_bytes,
            shared.ds_full + buffer, peer, (warp == 0) & leader,
        )  # fmt: skip
        ptx.arrive_expecting(shared.ds_full + buffer, self.part_bytes // 4, leader)

    # both

    @cute.jit
    def multiply_shares(self, shared, parts, role: cutlass.Constexpr, block, there):
        """This consumer's columns of a block's dq, once both CTAs' ds are there: issued, one group each. Before a
        tile's first block, which has none, of whatever lies in the buffer: nobody looks at it, and a branch around
        products makes ptxas wait for each by itself."""
        if there:
            ptx.wait(shared.ds_full + (block & 1), (block >> 1) & 1)
        return [self.multiply_share(parts, n, block & 1) for n in range(len(self.shares[role]))]

    @cute.jit
    def multiply_share(self, parts, n: cutlass.Constexpr, buffer):
        """64 columns of dqᵀ = Kᵀ ds of half of the queries, over both CTAs' keys: issued, one group."""
        dq = cute.make_rmem_tensor(parts.turned.partition_shape_C((64, self.dq_rows)), Float32)
        atom = cute.make_mma_atom(parts.turned.op)
        own = buffer * PARTS + cute.arch.block_idx_in_cluster()
        warpgroup.fence()
        for part in cutlass.range_constexpr(2):
            ds = parts.ds_read[None, None, None, own if cutlass.const_expr(part == OWN) else buffer * PARTS + FROM_PEER]
            for step in cutlass.range_constexpr(4):
                atom.set(warpgroup.Field.ACCUMULATE, part + step > 0)
                cute.gemm(atom, dq, parts.keys_turned[n][part][None, None, step], ds[None, None, step], dq)
        warpgroup.commit_group()
        return dq

    @cute.jit
    def leave_shares(self, shared, parts, role: cutlass.Constexpr, shares, block, lane):
        """dq of a block, which is made, on its way; both CTAs may overwrite its ds."""
        ptx.arrive_everywhere(shared.ds_empty + (block & 1), lane, self.cluster)
        for n in cutlass.range_constexpr(len(self.shares[role])):
            self.store_share(shared, parts, shares[n], self.shares[role][n], block, lane == 0)

    @cute.jit
    def last_shares(self, shared, parts, role: cutlass.Constexpr, block, lane):
        """dq of a tile's last block, all of it."""
        shares = self.multiply_shares(shared, parts, role, block, True)
        warpgroup.wait_group(0)
        ptx.arrive(shared.k_empty, lane == 0)
        self.leave_shares(shared, parts, role, shares, block, lane)
