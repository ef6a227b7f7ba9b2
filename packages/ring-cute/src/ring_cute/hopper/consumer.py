"""A consumer warpgroup of the forward (`forward`): products, softmax, and where a tile's rows go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

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
    Q_ROW,
    RECORD_BITS,
    RECORDS,
    RIGHT,
    ROWS,
    START,
    STOP,
    STRIDE,
    UPPER,
    WALK_COLUMNS,
)
from ring_cute.hopper.scores import Place, add_slopes, cap_scores, slope_of
from ring_cute.hopper.softmax import mask, multiply, rescale, softmax, to_operand, turn
from ring_cute.hopper.views import DROP
from ring_cute.settings import ForwardKind

OUT_BARRIER, TURN_BARRIER = 1, 4
"""Named barriers: OUT_BARRIER + consumer, TURN_BARRIER + consumer."""


@dataclass(frozen=True)
class Results:
    """Where a tile's rows go, and what earlier steps have left of them; strides in elements."""

    out_atom: Any
    out_tma: Any  # (Sq, D, Hq, B)
    out: Any  # words of two numbers
    out_b: Any
    out_s: Any
    out_h: Any
    lse: Any
    lse_b: Any
    lse_h: Any
    state_atom: Any
    state_tma: Any  # (Sq, D, Hq, B)
    state: Any  # words of two numbers
    state_b: Any
    state_s: Any
    state_h: Any


@dataclass(frozen=True)
class Sums:
    """What a thread keeps of its two rows, r and r + 8 of its warp's 16."""

    o: Any
    m: Any  # (2), the maximum in base 2 that probabilities are of
    norm: Any  # (2), of the thread's columns
    decay: Any  # (2), what o is still, or was last, to be multiplied with
    earlier: Any  # (2), the lse of earlier steps, -inf where there were none


@dataclass(frozen=True)
class Operands:
    """Of the two products: S = query keysᵀ, O += p values."""

    scores: cute.TiledMma
    sums: cute.TiledMma
    query: Any
    keys: Any
    values: Any
    s: Any
    p: Any


class Consumer:
    """Consumers' part of a kind of kernel."""

    def __init__(self, kind: ForwardKind) -> None:
        self.kind = kind
        self.settings = kind.settings
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.dim = kind.padded
        self.head_dim = kind.head_dim
        self.block = kind.settings.block
        self.stages = kind.settings.stages
        self.stage_bits = self.stages.bit_length() - 1
        self.queries = kind.queries

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
        if cutlass.const_expr(self.settings.query_registers):
            queries = cute.make_rmem_tensor(scores.partition_shape_A((64, self.dim)), self.dtype)
            load_q = cute.make_tiled_copy_A(
                cute.make_copy_atom(cute.nvgpu.warp.LdMatrix8x8x16bOp(False, 4), self.dtype), scores
            )
            thread = load_q.get_slice(cute.arch.thread_idx()[0] & 127)
            sources, targets = thread.partition_S(shared.q), thread.retile(queries)
        else:
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
        earlier = cute.make_rmem_tensor(2, Float32)
        kept = Sums(o, m, norm, decay, earlier)

        blocks, tiles, turn = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(self.settings.ping_pong):  # noqa: SIM102  # a constant, and a value
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
            if cutlass.const_expr(self.kind.state):
                self.look_back(records, slot, cid, row, results, earlier)
            if stop > start:
                at = cid * self.queries + (tiles & (self.queries - 1))
                query = queries
                if cutlass.const_expr(not self.settings.query_registers):
                    query = queries[None, None, None, at]
                of = Operands(scores, sums, query, keys, values, s, p)
                ptx.wait(shared.q_full + at, (tiles >> (self.queries - 1)) & 1)
                if cutlass.const_expr(self.settings.query_registers):
                    cute.copy(load_q, sources[None, None, None, at], targets)
                    if cutlass.const_expr(self.queries == 1):
                        cute.arch.sync_warp()
                        ptx.arrive(shared.q_empty + cid, leader)
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
                ptx.wait(shared.k_full + stage, (blocks >> self.stage_bits) & 1)
                if cutlass.const_expr(self.settings.ping_pong):
                    self.my_turn(cid)
                multiply(scores, of.query, keys[None, None, None, stage], s, False, self.head_dim)
                if cutlass.const_expr(self.settings.ping_pong):
                    self.your_turn(cid)
                warpgroup.wait_group(0)
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
                            shared, of, kept, scale, terms, place, cid, lane, first_row, column, blocks,
                            j_lo + nth * self.block, k_len, lower, upper, True,
                        )  # fmt: skip
                        blocks += 1
                    for t in cutlass.range(cute.math.max(done, edges), number, unroll=1):
                        j = Int32(0)  # what has no mask looks at it for distances only
                        if cutlass.const_expr(self.kind.alibi):
                            j = j_lo + (t - right) * self.block
                        self.attend(
                            shared, of, kept, scale, terms, place, cid, lane, first_row, column, blocks,
                            j, k_len, lower, upper, False,
                        )  # fmt: skip
                        blocks += 1
                    done = Int32(0)
                if cutlass.const_expr(self.queries == 1 and not self.settings.query_registers):
                    ptx.arrive(shared.q_empty + cid, leader)  # all scores are computed
                before = (blocks - 1) & (self.stages - 1)
                ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
                multiply(sums, p, values[None, None, None, before], o, True)
                warpgroup.wait_group(0)
                self.release(shared.v_empty + before, lane)
                tiles += 1
            else:
                if cutlass.const_expr(self.kind.state_tma):
                    self.free_buffers(shared, cid, tiles, leader, False)
            self.finish(shared, slot, cid, row, column, tiles, turn, kept, sums, results)
            cute.arch.sync_warp()  # all lanes have read the record
            self.release(shared.record_empty + slot, lane)
            turn += 1
            slot = turn & (RECORDS - 1)
            ptx.wait(shared.record_full + slot, (turn >> RECORD_BITS) & 1)
            going = records[EXISTS, slot] != 0
        if cutlass.const_expr(self.kind.out_tma or self.kind.state_tma):
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # buffers are read while the CTA lives

    @cute.jit
    def attend(
        self, shared, of, kept, scale, terms, place, cid, lane, row, column, blocks, j, k_len, lower, upper,
        masked: cutlass.Constexpr,
    ):  # fmt: skip
        """Scores of this block, then the sum over the values of the block before, whose P is at hand."""
        stage, before = blocks & (self.stages - 1), (blocks - 1) & (self.stages - 1)
        ptx.wait(shared.k_full + stage, (blocks >> self.stage_bits) & 1)
        if cutlass.const_expr(self.settings.ping_pong):
            self.my_turn(cid)
        multiply(of.scores, of.query, of.keys[None, None, None, stage], of.s, False, self.head_dim)
        ptx.wait(shared.v_full + before, ((blocks - 1) >> self.stage_bits) & 1)
        multiply(of.sums, of.p, of.values[None, None, None, before], kept.o, True)
        if cutlass.const_expr(self.settings.ping_pong):
            self.your_turn(cid)
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

    @cute.jit
    def look_back(self, records, slot, cid, row, results, earlier):
        """The lse that earlier steps have left of a thread's rows."""
        at = Int64(records[BATCH, slot]) * results.lse_b + Int64(records[HEAD, slot]) * results.lse_h
        at = at + records[Q_ROW, slot]
        for half in cutlass.range_constexpr(2):
            own = self.top(cid) + row + 8 * half
            earlier[half] = -Float32.inf
            if (records[ENDS, slot] & 1) == 0 and own < records[ROWS, slot]:
                earlier[half] = results.lse[at + own]  # on its way until it is used, at the tile's end

    @cute.jit
    def finish(self, shared, slot, cid, row, column, tiles, turn, kept, sums, results):
        """A tile's end: what earlier steps have left is added, and all of it goes where it belongs."""
        records, o, m = shared.records, kept.o, kept.m
        q_row, count, batch = records[Q_ROW, slot], records[ROWS, slot], records[BATCH, slot]
        ends, head = records[ENDS, slot], records[HEAD, slot]
        for half in cutlass.range_constexpr(2):
            kept.norm[half] = ptx.quad_sum(kept.norm[half])
        if cutlass.const_expr(self.kind.state):
            if cutlass.const_expr(self.kind.state_tma):
                ptx.wait(shared.o_full + cid, turn & 1)
            if (ends & 1) == 0:
                self.add_state(shared, slot, cid, row, column, kept, sums, results)
        factor = cute.make_rmem_tensor(2, Float32)
        for half in cutlass.range_constexpr(2):
            own = row + 8 * half
            factor[half] = Float32(0.0)
            value = -Float32.inf
            if kept.norm[half] > 0.0:
                factor[half] = cute.arch.rcp_approx(kept.norm[half])
                value = (m[half] + ptx.log2(kept.norm[half])) * ptx.LN_2
            if column == 0 and self.top(cid) + own < count:
                results.lse[
                    Int64(batch) * results.lse_b + Int64(head) * results.lse_h + q_row + self.top(cid) + own
                ] = value
        rescale(o, factor)
        if cutlass.const_expr(self.kind.state):
            if (ends & 2) != 0:
                self.write_out(shared, slot, cid, row, column, tiles, o, sums, results)
            else:
                self.write_state(shared, slot, cid, row, column, o, sums, results)
        else:
            self.write_out(shared, slot, cid, row, column, tiles, o, sums, results)

    @cute.jit
    def add_state(self, shared, slot, cid, row, column, kept, sums, results):
        """What earlier steps have left of a tile's rows, to their sums."""
        o, m = kept.o, kept.m
        weight, own_weight = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        for half in cutlass.range_constexpr(2):
            earlier = kept.earlier[half] * ptx.LOG2_E
            both = cute.arch.fmax(m[half], earlier)
            base = cutlass.select_(both == -Float32.inf, Float32(0.0), both)  # a row that has seen nothing in any step
            weight[half] = ptx.exp2(earlier - base)
            own_weight[half] = ptx.exp2(m[half] - base)
            m[half] = both
            kept.norm[half] = kept.norm[half] * own_weight[half] + weight[half]
        if cutlass.const_expr(self.kind.state_tma):
            rescale(o, own_weight)
            added = cute.make_rmem_tensor_like(o)
            cute.autovec_copy(self.rows_of(shared.o[None, None, cid], sums), added)
            for e in cutlass.range_constexpr(0, cute.size(o), 4):
                for c in cutlass.range_constexpr(4):
                    # of rows that earlier steps saw nothing of, state may hold anything
                    x = cutlass.select_(weight[c // 2] > 0.0, added[e + c], Float32(0.0))
                    o[e + c] = ptx.fma(x, weight[c // 2], o[e + c])
        else:
            state_at = self.row_in(results.state_b, results.state_s, results.state_h, shared.records, slot, cid, column)
            for half in cutlass.range_constexpr(2):
                if weight[half] > 0.0:
                    pairs = self.pairs_of_a_row(results.state, state_at + (row + 8 * half) * results.state_s)
                    loaded = cute.make_rmem_tensor(self.head_dim // 8, Int64)
                    for n in cutlass.range_constexpr(self.head_dim // 8):
                        loaded[n] = pairs[n]
                    added = cute.recast_tensor(loaded, Float32)
                    for e in cutlass.range_constexpr(0, cute.size(o), 4):
                        for c in cutlass.range_constexpr(2):
                            x = o[e + 2 * half + c] * own_weight[half]
                            if cutlass.const_expr(2 * e < self.head_dim):
                                x = ptx.fma(added[e // 2 + c], weight[half], x)
                            o[e + 2 * half + c] = x

    @cute.jit
    def write_state(self, shared, slot, cid, row, column, o, sums, results):
        """A tile's rows for the next step, by TMA where all 64 are inside, else from registers."""
        records = shared.records
        q_row, count, batch, head = records[Q_ROW, slot], records[ROWS, slot], records[BATCH, slot], records[HEAD, slot]
        from_registers = count > self.top(cid)
        if cutlass.const_expr(self.kind.state_tma):  # noqa: SIM102  # a constant, and a value
            if count >= self.top(cid) + 64:
                from_registers = False
                buffer = shared.o[None, None, cid]
                cute.autovec_copy(o, self.rows_of(buffer, sums))
                self.send(results.state_atom, results.state_tma[None, None, head, batch], q_row, cid, buffer)
        if from_registers:
            state_at = self.row_in(results.state_b, results.state_s, results.state_h, records, slot, cid, column)
            for half in cutlass.range_constexpr(2):
                own = row + 8 * half
                if self.top(cid) + own < count:
                    pairs = self.pairs_of_a_row(results.state, state_at + own * results.state_s)
                    sums_in_pairs = cute.recast_tensor(o, Int64)
                    for n in cutlass.range_constexpr(self.head_dim // 8):
                        pairs[n] = sums_in_pairs[2 * n + half]

    @cute.jit
    def write_out(self, shared, slot, cid, row, column, tiles, o, sums, results):
        """A tile's final rows, by TMA where all 64 are inside, else from registers."""
        records = shared.records
        q_row, count, batch, head = records[Q_ROW, slot], records[ROWS, slot], records[BATCH, slot], records[HEAD, slot]
        rounded = cute.make_rmem_tensor(sums.partition_shape_C((64, self.dim)), self.dtype)
        to_operand(o, rounded)
        from_registers = count > self.top(cid)
        if cutlass.const_expr(self.kind.out_tma):  # noqa: SIM102  # a constant, and a value
            # otherwise a box would reach into the next tile's rows, or there are no queries whose buffer is free
            if count >= self.top(cid) + 64 and (self.kind.state_tma or records[STOP, slot] > records[START, slot]):
                from_registers = False
                if cutlass.const_expr(self.kind.state_tma):
                    buffer = shared.staged[None, None, 2 * cid]
                else:
                    # the queries' buffer: all scores are computed, and this tile holds it until the next one
                    buffer = shared.q[None, None, cid * self.queries + ((tiles - 1) & (self.queries - 1))]
                store = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), self.dtype)
                tiled = cute.make_tiled_copy_C(store, sums)
                thread = tiled.get_slice(cute.arch.thread_idx()[0] & 127)
                # every warp has read what it holds, its queries or its state, before any warp overwrites it
                cute.arch.barrier(barrier_id=OUT_BARRIER + cid, number_of_threads=128)
                cute.copy(tiled, thread.retile(rounded), thread.partition_D(buffer))
                self.send(results.out_atom, results.out_tma[None, None, head, batch], q_row, cid, buffer)
        if from_registers:
            self.write_rows(records, slot, cid, row, rounded, results)

    @cute.jit
    def write_rows(self, records, slot, cid, row, rounded, results):
        """Final rows from registers, 16 bytes a lane: a quad's 64 in a row are whole sectors of L2."""
        count = records[ROWS, slot]
        out_at = self.row_in(results.out_b, results.out_s, results.out_h, records, slot, cid, 0)
        words, mine = cute.recast_tensor(rounded, Int32), cute.make_rmem_tensor(4, Int32)
        lane = cute.arch.lane_idx() & 3
        for half in cutlass.range_constexpr(2):
            own = row + 8 * half
            at = results.out.iterator + ((out_at + own * results.out_s) >> 1) + 4 * lane
            for n in cutlass.range_constexpr(0, self.head_dim // 8, 4):  # of eight columns, a word a lane
                for e in cutlass.range_constexpr(4):
                    mine[e] = words[2 * (n + e) + half]
                turn(mine)
                if self.top(cid) + own < count and n + lane < self.head_dim // 8:
                    cute.autovec_copy(mine, cute.make_tensor((at + 4 * n).align(16), cute.make_layout(4)))

    @cute.jit
    def send(self, atom, tensor, q_row, cid, buffer):
        """A consumer's 64 rows, from the buffer that its threads have written, by TMA."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=OUT_BARRIER + cid, number_of_threads=128)
        source, target = cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(buffer, 0, 2),
            cute.group_modes(
                cute.local_tile(cute.domain_offset((q_row + self.top(cid), 0), tensor), (64, self.dim), (0, 0)), 0, 2
            ),
        )
        if (cute.arch.make_warp_uniform(cute.arch.warp_idx()) & 3) == 0:
            with cute.arch.elect_one():  # of loads the DSL elects a lane by itself, of stores not
                if cutlass.const_expr(self.settings.cache_hints):
                    cute.copy(atom, source, target, cache_policy=Int64(DROP))
                else:
                    cute.copy(atom, source, target)
                cute.arch.cp_async_bulk_commit_group()

    def rows_of(self, buffer: Any, sums: Any) -> Any:
        """A thread's share of (64, D) in shared memory, in the order of its registers."""
        return sums.get_slice(cute.arch.thread_idx()[0] & 127).partition_C(buffer)

    def row_in(self, batch: Any, row: Any, head: Any, records: Any, slot: Any, cid: Any, column: Any) -> Any:
        """Where a thread's columns of the consumer's first row are, given a tensor's strides."""
        at = Int64(records[BATCH, slot]) * batch + Int64(records[HEAD, slot]) * head
        return at + Int64(records[Q_ROW, slot] + self.top(cid)) * row + column

    def pairs_of_a_row(self, memory, offset):
        """A thread's share of a row that begins at `offset` elements, in words of two: every fourth."""
        return cute.make_tensor(memory.iterator + (offset >> 1), cute.make_layout(self.head_dim // 8, stride=4))

    def top(self, cid: Any) -> Any:
        """A consumer's first row of the tile."""
        if self.settings.cluster == 1:
            return cid * 64
        return (cute.arch.block_idx_in_cluster() * self.settings.consumers + cid) * 64

    def release(self, barrier: Any, lane: Any) -> None:
        """A warp's arrival at a barrier for all that is shared: in each CTA of the cluster."""
        ptx.arrive_everywhere(barrier, lane, self.settings.cluster)

    @cute.jit
    def my_turn(self, cid):
        cute.arch.barrier(barrier_id=TURN_BARRIER + cid, number_of_threads=256)

    @cute.jit
    def your_turn(self, cid):
        cute.arch.barrier_arrive(barrier_id=TURN_BARRIER + 1 - cid, number_of_threads=256)
