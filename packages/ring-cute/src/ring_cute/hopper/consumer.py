"""A consumer warpgroup of the forward (`forward`): products, softmax, and where a tile's rows go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup

from ring_cute.hopper import ptx
from ring_cute.hopper.records import (
    BATCH,
    DISTANCE,
    EDGES,
    ENDS,
    EXISTS,
    HEAD,
    J_LO,
    K_LEN,
    LOWER,
    NUMBER,
    RECORD_BITS,
    RECORDS,
    RIGHT,
    START,
    STOP,
    STRIDE,
    UPPER,
    WALK_COLUMNS,
)
from ring_cute.hopper.scores import Place, add_slopes, cap_scores, slope_of
from ring_cute.hopper.softmax import (
    keep,
    kept_operand,
    mask,
    multiply,
    multiply_kept,
    rescale,
    softmax,
    sums_product,
    to_operand,
)
from ring_cute.hopper.tile_end import OUT_BARRIER, Sums, TileEnd

MOST_CONSUMERS = 3
TURN_BARRIER = OUT_BARRIER + MOST_CONSUMERS
"""Named barriers: TURN_BARRIER + consumer, where they take turns."""


@dataclass(frozen=True)
class Operands:
    """Of the two products: S = query keysᵀ, O += p values."""

    scores: cute.TiledMma
    sums: cute.TiledMma
    queries: Any  # of all buffers
    by_held: Any  # S, where queries are in registers
    held: Any  # their first columns, in registers
    keys: Any
    values: Any
    s: Any
    p: Any


class Consumer(TileEnd):
    """Consumers' part of a kind of kernel."""

    @cute.jit
    def consume(self, shared, walk, results, scores, sums, sinks, scale, terms):
        """All of the CTA's tiles."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) - 4
        cid = warp >> 2
        lane = cute.arch.lane_idx()
        leader = lane == 0
        row = (warp & 3) * 16 + (lane >> 2)  # of the consumer's 64, and this + 8
        column = 2 * (lane & 3)
        first_row = self.top(cid) + row  # of the tile
        records = shared.records

        # operands in shared memory are the same for all threads
        queries = scores.make_fragment_A(scores.get_slice(0).partition_A(shared.q))
        by_held, held = kept_operand(self.dtype, self.block, self.settings.query_columns)
        keys = scores.make_fragment_B(scores.get_slice(0).partition_B(shared.k))
        turned = cute.make_tensor(shared.v.iterator, cute.select(shared.v.layout, mode=[1, 0, 2]))  # (D, BLOCK, STAGES)
        values = sums.make_fragment_B(sums.get_slice(0).partition_B(turned))
        s = cute.make_rmem_tensor(scores.partition_shape_C((64, self.block)), Float32)
        p = cute.make_rmem_tensor(sums.partition_shape_A((64, self.block)), self.dtype)
        narrow = sums_product(self.dtype, self.head_dim)
        o = cute.make_rmem_tensor(narrow.partition_shape_C((64, self.head_dim)), Float32)
        m = cute.make_rmem_tensor(2, Float32)
        norm = cute.make_rmem_tensor(2, Float32)
        decay = cute.make_rmem_tensor(2, Float32)
        earlier = cute.make_rmem_tensor(2, Float32)
        kept = Sums(o, m, norm, decay, earlier)
        of = Operands(scores, narrow, queries, by_held, held, keys, values, s, p)

        blocks, tiles, turn = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(self.settings.turns):  # noqa: SIM102  # a constant, and a value
            if cid == self.settings.consumers - 1:
                self.end_turn(cid)  # the first consumer begins
        ptx.wait(shared.record_full, 0)
        going = records[EXISTS, 0] != 0
        self.begin(shared, of, Int32(0), cid, leader, tiles, blocks)
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
            if cutlass.const_expr(self.kind.state):
                self.look_back(records, slot, cid, row, results, earlier)
            if cutlass.const_expr(self.kind.state_tma):  # noqa: SIM102  # a constant, and a value
                if stop <= start:
                    self.free_buffers(shared, cid, tiles, leader, False)
            warpgroup.wait_group(0)
            if stop > start:
                # the first block has no values to sum before it
                number, right, edges = records[NUMBER, slot], records[RIGHT, slot], records[EDGES, slot]
                k_len, j_lo = records[K_LEN, slot], records[J_LO, slot]
                lower, upper = records[LOWER, slot], records[UPPER, slot]
                j = j_lo
                if right > 0:
                    j = j_lo + (number - 1) * self.block
                slope = self.slope(records, slot, terms)
                place = self.place(walk, start, slope)
                stage = blocks & (self.stages - 1)
                self.release(shared.k_empty + stage, lane)
                factor = self.shape(s, scale, terms, place, first_row, column, j)
                if edges > 0:
                    mask(s, first_row, column, j, k_len, lower, upper)
                softmax(s, m, norm, decay, factor, True, False)
                self.free_buffers(shared, cid, tiles, leader, True)
                to_operand(s, p)
                blocks += 1
                done = Int32(1)
                for w in cutlass.range(start, stop, unroll=1):
                    if w > start:
                        entry = w * WALK_COLUMNS
                        k_len, j_lo, number = walk[entry + 1], walk[entry + 2], walk[entry + 3]
                        right, edges = walk[entry + 4], walk[entry + 5]
                        lower, upper = walk[entry + 6], walk[entry + 7]
                    place = self.place(walk, w, slope)
                    for t in cutlass.range(done, edges, unroll=1):
                        nth = t - right
                        if t < right:
                            nth = number - 1 - t
                        self.attend(
                            shared, of, kept, scale, terms, place, cid, lane, first_row, column, tiles, blocks,
                            j_lo + nth * self.block, k_len, lower, upper, True,
                        )  # fmt: skip
                        blocks += 1
                    for t in cutlass.range(cute.math.max(done, edges), number, unroll=1):
                        j = Int32(0)  # what has no mask looks at it for distances only
                        if cutlass.const_expr(self.kind.alibi):
                            j = j_lo + (t - right) * self.block
                        self.attend(
                            shared, of, kept, scale, terms, place, cid, lane, first_row, column, tiles, blocks,
                            j, k_len, lower, upper, False,
                        )  # fmt: skip
                        blocks += 1
                    done = Int32(0)
                if cutlass.const_expr(not self.kind.queries_ahead):
                    ptx.arrive(shared.q_empty + cid, leader)  # all scores are computed
                before = (blocks - 1) & (self.stages - 1)
                ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
                multiply(narrow, p, values[None, None, None, before], o, True)
                tiles += 1
            next_slot = (turn + 1) & (RECORDS - 1)
            ptx.wait(shared.record_full + next_slot, ((turn + 1) >> RECORD_BITS) & 1)
            if cutlass.const_expr(self.kind.begins_early):
                self.begin(shared, of, next_slot, cid, leader, tiles, blocks)
                warpgroup.wait_group(1)
            else:
                warpgroup.wait_group(0)
            if stop > start:
                self.release(shared.v_empty + ((blocks - 1) & (self.stages - 1)), lane)
            self.finish(shared, slot, cid, row, column, tiles, turn, kept, sums, results)
            if cutlass.const_expr(not self.kind.begins_early):
                self.begin(shared, of, next_slot, cid, leader, tiles, blocks)
            cute.arch.sync_warp()  # all lanes have read the record
            self.release(shared.record_empty + slot, lane)
            turn += 1
            going = records[EXISTS, next_slot] != 0
        warpgroup.wait_group(0)
        if cutlass.const_expr(self.kind.out_tma or self.kind.state_tma):
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # buffers are read while the CTA lives

    @cute.jit
    def begin(self, shared, of, slot, cid, leader, tiles, blocks):
        """The scores of a tile's first block: issued. Where there is no tile, or it has no block, what comes out is
        never looked at: a product that only some tiles issue would be one that ptxas waits for at once."""
        at = cid * self.queries + (tiles & (self.queries - 1))
        stage = blocks & (self.stages - 1)
        some = shared.records[STOP, slot] > shared.records[START, slot]
        if some:
            ptx.wait(shared.q_full + at, (tiles >> (self.queries - 1)) & 1)
        if cutlass.const_expr(self.settings.query_columns > 0):
            keep(of.by_held, of.held, shared.q[None, None, at], self.thread())
            if cutlass.const_expr(self.queries == 1 and self.kind.queries_ahead):
                cute.arch.sync_warp()
                if some:
                    ptx.arrive(shared.q_empty + cid, leader)
        if some:
            ptx.wait(shared.k_full + stage, (blocks >> self.stage_bits) & 1)
        self.multiply_keys(of, at, stage)

    @cute.jit
    def multiply_keys(self, of, at, stage):
        """A block's scores: issued, one group."""
        query, keys = of.queries[None, None, None, at], of.keys[None, None, None, stage]
        multiply_kept(of.scores, of.by_held, of.held, query, keys, of.s, False, self.head_dim)

    @cute.jit
    def attend(
        self, shared, of, kept, scale, terms, place, cid, lane, row, column, tiles, blocks, j, k_len, lower, upper,
        masked: cutlass.Constexpr,
    ):  # fmt: skip
        """Scores of this block, then the sum over the values of the block before, whose P is at hand."""
        stage, before = blocks & (self.stages - 1), (blocks - 1) & (self.stages - 1)
        ptx.wait(shared.k_full + stage, (blocks >> self.stage_bits) & 1)
        if cutlass.const_expr(self.settings.turns):
            cute.arch.barrier(barrier_id=TURN_BARRIER + cid, number_of_threads=2 * 128)
        self.multiply_keys(of, cid * self.queries + (tiles & (self.queries - 1)), stage)
        ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
        multiply(of.sums, of.p, of.values[None, None, None, before], kept.o, True)
        if cutlass.const_expr(self.settings.turns):
            self.end_turn(cid)
        warpgroup.wait_group(1)
        self.release(shared.k_empty + stage, lane)
        factor = self.shape(of.s, scale, terms, place, row, column, j)
        if cutlass.const_expr(masked):
            mask(of.s, row, column, j, k_len, lower, upper)
        grown = softmax(of.s, kept.m, kept.norm, kept.decay, factor, masked, self.settings.lazy)
        if cutlass.const_expr(self.settings.overlap):
            # over already, but a branch: ptxas would otherwise wait for the sums before the exponentials they overlap
            ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
        warpgroup.wait_group(0)
        self.release(shared.v_empty + before, lane)
        if cutlass.const_expr(self.settings.lazy):
            if grown:
                rescale(kept.o, kept.decay)
        else:
            rescale(kept.o, kept.decay)
        to_operand(of.s, of.p)

    @cute.jit
    def end_turn(self, cid):
        """This consumer's products of a block are issued: the next one may issue its own."""
        following = cid + 1
        if following == self.settings.consumers:
            following = Int32(0)
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + following, number_of_threads=2 * 128)

    def slope(self, records, slot, terms):
        """That of a tile's head."""
        return slope_of(terms, records[BATCH, slot], records[HEAD, slot]) if self.kind.alibi else None

    def place(self, walk, w, slope):
        """What slopes are multiplied with in the segment of a walk's row."""
        if not self.kind.alibi:
            return None
        return Place(slope, walk[w * WALK_COLUMNS + DISTANCE], walk[w * WALK_COLUMNS + STRIDE])

    def shape(self, s, scale, terms, place, row, column, j):
        """Products as scores, before the mask; what is left to be multiplied with in the softmax."""
        if not self.kind.shaped:
            return scale
        if self.kind.softcap:
            cap_scores(s, scale, terms.cap)
            scale = Float32(1.0)
        if self.kind.alibi:
            add_slopes(s, scale, place, row, column, j)
        return Float32(1.0)

    @cute.jit
    def free_buffers(self, shared, cid, tiles, leader, walked: cutlass.Constexpr):
        """Gives back what the tile before has left its rows in; its queries' buffer only if this one has queries."""
        if cutlass.const_expr(self.kind.out_tma or self.kind.state_tma):
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()  # whichever lane sent them
        if cutlass.const_expr(self.queries > 1 and walked):
            ptx.arrive(shared.q_empty + cid * self.queries + ((tiles + 1) & (self.queries - 1)), leader)
        if cutlass.const_expr(self.kind.state_tma):
            ptx.arrive(shared.o_empty + cid, leader)
