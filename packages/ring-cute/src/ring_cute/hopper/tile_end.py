"""A tile's end in the forward (`forward`): what earlier steps have left is added, and rows go where they belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from ring_cute.hopper import ptx
from ring_cute.hopper.records import BATCH, ENDS, HEAD, Q_ROW, ROWS, START, STOP
from ring_cute.hopper.softmax import rescale, to_operand, turn
from ring_cute.hopper.views import DROP
from ring_cute.settings import ForwardKind

OUT_BARRIER = 1
"""Named barriers: OUT_BARRIER + consumer."""


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


class TileEnd:
    """What consumers of a kind of kernel do with a tile's sums."""

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
        weight, own_weight = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        for half in cutlass.range_constexpr(2):
            kept.norm[half] = ptx.quad_sum(kept.norm[half])
            weight[half] = Float32(0.0)
            own_weight[half] = Float32(1.0)
        if cutlass.const_expr(self.kind.state):
            if cutlass.const_expr(self.kind.state_tma):
                ptx.wait(shared.o_full + cid, turn & 1)
            if (ends & 1) == 0:
                self.weigh(kept, weight, own_weight)
        for half in cutlass.range_constexpr(2):
            own, factor = row + 8 * half, Float32(0.0)
            value = -Float32.inf
            if kept.norm[half] > 0.0:
                factor = cute.arch.rcp_approx(kept.norm[half])
                value = (m[half] + ptx.log2(kept.norm[half])) * ptx.LN_2
            if column == 0 and self.top(cid) + own < count:
                results.lse[
                    Int64(batch) * results.lse_b + Int64(head) * results.lse_h + q_row + self.top(cid) + own
                ] = value
            weight[half] = weight[half] * factor
            own_weight[half] = own_weight[half] * factor
        rescale(o, own_weight)
        if cutlass.const_expr(self.kind.state):  # noqa: SIM102  # a constant, and a value
            if (ends & 1) == 0:
                self.add_state(shared, slot, cid, row, column, o, weight, sums, results)
        if cutlass.const_expr(self.kind.state):
            if (ends & 2) != 0:
                self.write_out(shared, slot, cid, row, column, tiles, o, sums, results)
            else:
                self.write_state(shared, slot, cid, row, column, o, sums, results)
        else:
            self.write_out(shared, slot, cid, row, column, tiles, o, sums, results)

    @cute.jit
    def weigh(self, kept, weight, own_weight):
        """A tile's maximum and norm with what earlier steps have left, and what the sums of each count."""
        m = kept.m
        for half in cutlass.range_constexpr(2):
            earlier = ptx.late(kept.earlier[half]) * ptx.LOG2_E
            both = cute.arch.fmax(m[half], earlier)
            base = cutlass.select_(both == -Float32.inf, Float32(0.0), both)  # a row that has seen nothing in any step
            weight[half] = ptx.exp2(earlier - base)
            own_weight[half] = ptx.exp2(m[half] - base)
            m[half] = both
            kept.norm[half] = kept.norm[half] * own_weight[half] + weight[half]

    @cute.jit
    def add_state(self, shared, slot, cid, row, column, o, weight, sums, results):
        """What earlier steps have left, times its weight, to a tile's rows."""
        if cutlass.const_expr(self.kind.state_tma):
            there, pair = self.rows_of(shared.o[None, None, cid], sums), cute.make_rmem_tensor(2, Float32)
            for n in cutlass.range_constexpr(cute.size(o) // 4):
                for half in cutlass.range_constexpr(2):
                    cute.autovec_copy(there[(None, half, n), 0, 0], pair)
                    for c in cutlass.range_constexpr(2):
                        # of rows that earlier steps saw nothing of, state may hold anything
                        x = cutlass.select_(weight[half] > 0.0, pair[c], Float32(0.0))
                        e = 4 * n + 2 * half + c
                        o[e] = ptx.fma(x, weight[half], o[e])
        else:
            state_at = self.row_in(results.state_b, results.state_s, results.state_h, shared.records, slot, cid, column)
            for half in cutlass.range_constexpr(2):
                if weight[half] > 0.0:
                    pairs = self.pairs_of_a_row(results.state, state_at + (row + 8 * half) * results.state_s)
                    loaded = cute.make_rmem_tensor(self.head_dim // 8, Int64)
                    for n in cutlass.range_constexpr(self.head_dim // 8):
                        loaded[n] = pairs[n]
                    added = cute.recast_tensor(loaded, Float32)
                    for n in cutlass.range_constexpr(self.head_dim // 8):
                        for c in cutlass.range_constexpr(2):
                            e = 4 * n + 2 * half + c
                            o[e] = ptx.fma(added[2 * n + c], weight[half], o[e])

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
                there, pair = self.rows_of(buffer, sums), cute.make_rmem_tensor(2, Float32)
                for n in cutlass.range_constexpr(cute.size(o) // 4):
                    for half in cutlass.range_constexpr(2):
                        for c in cutlass.range_constexpr(2):
                            pair[c] = o[4 * n + 2 * half + c]
                        cute.autovec_copy(pair, there[(None, half, n), 0, 0])
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
        # a tile's padding is whatever it is: TMA knows where rows end
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
                thread = tiled.get_slice(self.thread())
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
        return sums.get_slice(self.thread()).partition_C(buffer)

    def row_in(self, batch: Any, row: Any, head: Any, records: Any, slot: Any, cid: Any, column: Any) -> Any:
        """Where a thread's columns of the consumer's first row are, given a tensor's strides."""
        at = Int64(records[BATCH, slot]) * batch + Int64(records[HEAD, slot]) * head
        return at + Int64(records[Q_ROW, slot] + self.top(cid)) * row + column

    def pairs_of_a_row(self, memory, offset):
        """A thread's share of a row that begins at `offset` elements, in words of two: every fourth."""
        return cute.make_tensor(memory.iterator + (offset >> 1), cute.make_layout(self.head_dim // 8, stride=4))

    def thread(self) -> Any:
        """This thread of the consumer; what follows from it at a tile's ends is worked out there, not kept."""
        return ptx.opaque(cute.arch.thread_idx()[0]) & 127

    def top(self, cid: Any) -> Any:
        """A consumer's first row of the tile."""
        if self.settings.cluster == 1:
            return cid * 64
        return (cute.arch.block_idx_in_cluster() * self.settings.consumers + cid) * 64

    def release(self, barrier: Any, lane: Any) -> None:
        """A warp's arrival at a barrier for all that is shared: in each CTA of the cluster."""
        ptx.arrive_everywhere(barrier, lane, self.settings.cluster)
