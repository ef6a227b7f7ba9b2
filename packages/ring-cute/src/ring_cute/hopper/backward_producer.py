"""The backward's three warps that compute nothing: loads, what is known of rows, and dq's way to global memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_records import (
    BATCH,
    BLOCKS,
    DISTANCE,
    EXISTS,
    HEAD,
    I_LO,
    KEYS,
    LOWER,
    PIECE,
    Q_LEN,
    Q_START,
    RECORD_BITS,
    RECORDS,
    STRIDE,
    TOKEN,
    TURNS,
    UPPER,
    WALK_COLUMNS,
    WHOLE_FROM,
    WHOLE_TO,
    begin,
    following,
    publish,
)
from ring_cute.hopper.producer import await_piece
from ring_cute.hopper.records import ask_once, tell
from ring_cute.hopper.scores import slope_of
from ring_cute.hopper.views import FAR

EDGE, FIRST_OFFSET, LAST_OFFSET, APART = range(4)
"""Of a block's `bounds`: whether some pair takes no part; key r of the tile sees query c of the block iff
r - FIRST_OFFSET <= c <= r - LAST_OFFSET; with ALiBi, how far query 0 is behind key 0."""
SLOPE, STEP = 0, 1
"""Of a block's `slopes`: `scores.Place.slope`, and the stride of positions."""


@dataclass(frozen=True)
class KeyLoads:
    """TMA atoms and the tensors of coordinates that go with them, all (row, D, heads, end, far)."""

    q_atom: Any
    q: Any
    k_atom: Any
    k: Any
    v_atom: Any
    v: Any
    do_atom: Any
    do: Any


@dataclass(frozen=True)
class KeyShared:
    """What lives in shared memory: buffers, and barriers as pointers to the first of each kind."""

    q: Any  # (BLOCK, D, Q_STAGES)
    do: Any  # (BLOCK, D, DO_STAGES)
    k: Any  # (64, D, 2), or (64, D, 1) where it is wide, and so on: see there
    v: Any  # (64, D, 2); None where V comes through dO's stages
    ds: Any  # (BLOCK, 128, 2)
    dq: Any  # (rows, 64, 2) fp32
    lse: Any  # (BLOCK, Q_STAGES) fp32
    delta: Any  # (BLOCK, Q_STAGES) fp32, negated: where dP starts from
    bounds: Any  # (4, Q_STAGES) int32
    records: Any  # (16, RECORDS) int32
    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    dq_full: Any  # one for each buffer
    dq_empty: Any
    record_full: Any
    record_empty: Any
    slopes: Any  # (2, Q_STAGES) fp32, None without ALiBi
    p: Any  # of wide heads, as all that follows: (4, 128 threads, BLOCK * 64 / 512) fp32
    p_full: Any  # one for each warp
    p_empty: Any  # of pairs, as all that follows but for ds_full and ds_empty
    numbers: Any  # (RECORDS): of the tiles that the records are about, from the cluster's first CTA
    number_full: Any
    ds_full: Any  # one for each buffer of ds
    ds_empty: Any


@cute.jit
def _copy(atom, tensor, x, head, end, buffer, barrier, ranks: cutlass.Constexpr = 0):
    """A box of rows from x on to a buffer (rows, D), by TMA; ranks: bits of those of the cluster's CTAs that get it."""
    rows = cute.domain_offset((x, 0), tensor[None, None, head, end, FAR])
    sizes = (cute.size(buffer, mode=[0]), cute.size(buffer, mode=[1]))
    tile = cute.local_tile(rows, sizes, (0, 0))
    target, source = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(buffer, 0, 2), cute.group_modes(tile, 0, 2)
    )
    more = {}
    if cutlass.const_expr(ranks > 0):
        more["mcast_mask"] = cutlass.Int16(ranks)
    cute.copy(atom, source, target, tma_bar_ptr=barrier, **more)


@cute.jit
def _load_rows(atom, tensor, x, head, end, buffer, full, cluster: cutlass.Constexpr):
    """A block of Q or dO from x on; in a cluster this CTA's part of it, to all of them."""
    _expect(full, buffer, 1)
    if cutlass.const_expr(cluster == 1):
        _copy(atom, tensor, x, head, end, buffer, full)
    else:
        box = cute.size(buffer, mode=[0]) // cluster, cute.size(buffer, mode=[1])
        part = cute.arch.block_idx_in_cluster()
        target = cute.local_tile(buffer, box, (part, 0))
        _copy(atom, tensor, x + part * box[0], head, end, target, full, (1 << cluster) - 1)


@cute.jit
def _expect(barrier, buffer, times: cutlass.Constexpr):
    """The barrier's arrival, and the bytes of `times` buffers (rows, D)."""
    size = cute.size(buffer, mode=[0]) * cute.size(buffer, mode=[1]) * buffer.element_type.width // 8
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, size * times)


@cute.jit
def _load_keys(atom, tensor, x, head, end, buffers, full, empty, tiles, own):
    """K or V of the CTA's tile `tiles`, of which they begin at x, in parts of 64; own: which of them comes first."""
    parts = cute.size(buffers, mode=[2])
    ptx.wait(empty, (tiles & 1) ^ 1)
    _expect(full, buffers, parts)
    for c in cutlass.range_constexpr(parts):
        _copy(atom, tensor, x + 64 * (own ^ c), head, end, buffers[None, None, c], full)


@cute.jit
def next_stage(stage, phase, stages: cutlass.Constexpr):
    """Of a ring: the stage after this one, and its parity."""
    stage += 1
    if stage == stages:
        stage = Int32(0)
        phase = phase ^ 1
    return stage, phase


@cute.jit
def load(
    work,
    loads,
    shared,
    flags,
    epoch,
    polls,
    sizes,
    block: cutlass.Constexpr,
    q_stages: cutlass.Constexpr,
    do_stages: cutlass.Constexpr,
    flagged: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
):
    """Brings each tile's keys and values, its blocks of Q and dO. sizes: piece length, batch rows of q, dO, k. Of a
    cluster each CTA's own keys are the first part of what it loads of the tile's; V only of these."""
    piece_length, q_batch_rows, do_batch_rows, k_batch_rows = sizes
    lane = cute.arch.lane_idx()
    grid, _, _ = cute.arch.grid_dim()
    first_tile, _, _ = cute.arch.block_idx()
    own = Int32(0)
    if cutlass.const_expr(cluster > 1):
        grid, first_tile = grid // cluster, first_tile // cluster
        own = cute.arch.block_idx_in_cluster()
    records, walk = shared.records, work.walk
    turn, tiles = Int32(0), Int32(0)
    q_stage, q_phase, do_stage, do_phase = Int32(0), Int32(0), Int32(0), Int32(0)
    publish(first_tile, turn, lane, work, records, shared.record_full, shared.record_empty)
    going = first_tile < work.total
    while going:
        slot = turn & (RECORDS - 1)
        total, batch, head = records[BLOCKS, slot], records[BATCH, slot], records[HEAD, slot]
        if total > 0:
            piece, count = records[PIECE, slot], records[KEYS, slot]
            if cutlass.const_expr(flagged):
                await_piece(flags, epoch, piece, polls)
            k_end = batch * k_batch_rows + piece * piece_length + records[TOKEN, slot] + count
            w, b, q_head = begin(walk, records, slot)
            for n in cutlass.range(total, unroll=1):
                entry = w * WALK_COLUMNS
                q_len = walk[entry + Q_LEN]
                end = walk[entry + Q_START] + q_len
                x = FAR - q_len + walk[entry + I_LO] + b * block
                if cutlass.const_expr(cluster == 1):  # noqa: SIM102  # a constant, and a value
                    if n == 0:
                        _load_keys(
                            loads.k_atom, loads.k, FAR - count, head, k_end, shared.k, shared.k_full, shared.k_empty,
                            tiles, own,
                        )  # fmt: skip
                ptx.wait(shared.q_empty + q_stage, q_phase ^ 1)
                _load_rows(
                    loads.q_atom, loads.q, x, q_head, batch * q_batch_rows + end, shared.q[None, None, q_stage],
                    shared.q_full + q_stage, cluster,
                )  # fmt: skip
                if n == 0:
                    if cutlass.const_expr(cluster == 1):
                        _load_keys(
                            loads.v_atom, loads.v, FAR - count, head, k_end, shared.v, shared.v_full, shared.v_empty,
                            tiles, own,
                        )  # fmt: skip
                    else:  # through dO's stages
                        ptx.wait(shared.do_empty + do_stage, do_phase ^ 1)
                        _expect(shared.do_full + do_stage, shared.do[None, None, do_stage], 1)
                        _copy(
                            loads.v_atom, loads.v, FAR - count + 64 * own, head, k_end, shared.do[None, None, do_stage],
                            shared.do_full + do_stage,
                        )  # fmt: skip
                        do_stage, do_phase = next_stage(do_stage, do_phase, do_stages)
                ptx.wait(shared.do_empty + do_stage, do_phase ^ 1)
                _load_rows(
                    loads.do_atom, loads.do, x, q_head, batch * do_batch_rows + end, shared.do[None, None, do_stage],
                    shared.do_full + do_stage, cluster,
                )  # fmt: skip
                if cutlass.const_expr(cluster > 1):  # noqa: SIM102  # a constant, and a value
                    if n == 0:
                        _load_keys(
                            loads.k_atom, loads.k, FAR - count, head, k_end, shared.k, shared.k_full, shared.k_empty,
                            tiles, own,
                        )  # fmt: skip
                q_stage, q_phase = next_stage(q_stage, q_phase, q_stages)
                do_stage, do_phase = next_stage(do_stage, do_phase, do_stages)
                w, b, q_head = following(walk, w, b, q_head)
            tiles += 1
        asked = tell(ask_once(lane, work, cluster), turn + 1, lane, shared, cluster, RECORD_BITS)
        publish(asked + grid, turn + 1, lane, work, records, shared.record_full, shared.record_empty)
        going = asked + grid < work.total
        turn += 1


@cute.jit
def describe(
    work, shared, lse, delta, num_heads, q_len_all, terms, block: cutlass.Constexpr, q_stages: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
):  # fmt: skip
    """Brings what is known of each block's rows: lse, -delta, and which pairs take part; with ALiBi's terms also the
    head's slope, and how far pairs are apart. Rows beyond the segment get an lse of +inf: their P is 0."""
    lane = cute.arch.lane_idx()
    records, walk = shared.records, work.walk
    turn = Int32(0)
    stage, phase = Int32(0), Int32(0)
    rounds = -(-block // 32)
    values = cute.make_rmem_tensor(2 * rounds, Float32)
    ptx.wait(shared.record_full, 0)
    going = records[EXISTS, 0] != 0
    while going:
        slot = turn & (RECORDS - 1)
        batch = records[BATCH, slot]
        w, b, q_head = begin(walk, records, slot)
        for _ in cutlass.range(records[BLOCKS, slot], unroll=1):
            entry = w * WALK_COLUMNS
            q_len, i = walk[entry + Q_LEN], walk[entry + I_LO] + b * block
            at = Int64(batch * num_heads + q_head) * q_len_all + walk[entry + Q_START] + i
            for t in cutlass.range_constexpr(rounds):
                values[2 * t] = Float32.inf
                values[2 * t + 1] = Float32(0.0)
                row = lane + 32 * t
                if i + row < q_len:
                    values[2 * t] = lse[at + row]
                    values[2 * t + 1] = delta[at + row]
            value = walk[entry + LOWER] + i
            if lane == FIRST_OFFSET:
                value = walk[entry + UPPER] + i
            slope, stride = Float32(0.0), Int32(0)
            if cutlass.const_expr(terms is not None):
                stride = walk[entry + STRIDE]
                if lane == APART:
                    value = walk[entry + DISTANCE] + stride * i
                slope = slope_of(terms, batch, q_head)
            if lane == EDGE:
                value = Int32(0)
                if b < walk[entry + WHOLE_FROM] or b >= walk[entry + WHOLE_TO]:
                    value = Int32(1)
            ptx.wait(shared.q_empty + stage, phase ^ 1)
            for t in cutlass.range_constexpr(rounds):
                row = lane + 32 * t
                if row < block:
                    shared.lse[row, stage] = values[2 * t]
                    shared.delta[row, stage] = -values[2 * t + 1]
            if lane < 4:
                shared.bounds[lane, stage] = value
            if cutlass.const_expr(terms is not None):
                if lane == SLOPE:
                    shared.slopes[SLOPE, stage] = slope
                if lane == STEP:
                    shared.slopes[STEP, stage] = Float32(stride)
            cute.arch.sync_warp()
            ptx.arrive(shared.q_full + stage, lane == 0)
            stage, phase = next_stage(stage, phase, q_stages)
            w, b, q_head = following(walk, w, b, q_head)
        cute.arch.sync_warp()
        ptx.arrive_everywhere(shared.record_empty + slot, lane, cluster)
        turn += 1
        slot = turn & (RECORDS - 1)
        ptx.wait(shared.record_full + slot, (turn >> RECORD_BITS) & 1)
        going = records[EXISTS, slot] != 0


@cute.jit
def _release(barrier, behind: cutlass.Constexpr, lane):
    """Word that a buffer has been read, behind which so many others may still be."""
    cute.arch.cp_async_bulk_wait_group(behind, read=True)
    cute.arch.sync_warp()
    ptx.arrive(barrier, lane == 0)


@dataclass(frozen=True)
class Share:
    """A part of a block's dq."""

    buffer: int
    columns: int  # which 64 columns of D
    rows: int  # which of the parts that a buffer's rows are
    nth: int = 0  # of the shares that go through this buffer
    shares: int = 1


@cute.jit
def add_queries(
    work, shared, dq_atom, dq_tensor, num_heads, q_len_all, turns, done, block: cutlass.Constexpr,
    shares: cutlass.Constexpr, ordered: cutlass.Constexpr, sender: cutlass.Constexpr, senders: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
):  # fmt: skip
    """Sends a block's dq on its way to be added to global memory. shares: of a block, in the order in which they come.
    ordered: when it is this block's turn (`backward_order`), and until then it waits; done: how many blocks have added
    to each stretch of rows of each head. senders: warps that send different columns, each with counters of its own, as
    have those of a cluster's CTAs, which send different rows."""
    lane = cute.arch.lane_idx()
    first_row, number, numbers = Int32(0), Int32(sender), senders * cluster
    if cutlass.const_expr(cluster > 1):
        first_row = cute.arch.block_idx_in_cluster() * cute.size(shared.dq, mode=[0])
        number = cute.arch.block_idx_in_cluster() * senders + sender
    records, walk = shared.records, work.walk
    turn, blocks = Int32(0), Int32(0)
    ptx.wait(shared.record_full, 0)
    going = records[EXISTS, 0] != 0
    while going:
        slot = turn & (RECORDS - 1)
        batch = records[BATCH, slot]
        w, b, q_head = begin(walk, records, slot)
        nth = Int32(0)  # of a query head's blocks
        stretches = cute.ceil_div(q_len_all, block)
        for _ in cutlass.range(records[BLOCKS, slot], unroll=1):
            entry = w * WALK_COLUMNS
            q_len = walk[entry + Q_LEN]
            mine, wanted = Int32(0), Int32(-1)
            if cutlass.const_expr(ordered):
                row = walk[entry + Q_START] + walk[entry + I_LO] + b * block
                mine = ((batch * num_heads + q_head) * stretches + row // block + lane) * numbers + number
                if lane < 2:  # a block touches one stretch, or two
                    wanted = turns[2 * (records[TURNS, slot] + nth) + lane]
            end = (batch * num_heads + q_head) * q_len_all + walk[entry + Q_START] + q_len
            x = FAR - q_len + walk[entry + I_LO] + b * block + first_row
            if cutlass.const_expr(ordered):
                if wanted >= 0:
                    while ptx.load_acquire_gpu(done.iterator + mine) != wanted:
                        pass
                cute.arch.sync_warp()
            for n in cutlass.range_constexpr(len(shares)):
                share = shares[n]
                buffer = shared.dq[None, None, share.buffer]
                ptx.wait(shared.dq_full + share.buffer, (blocks * share.shares + share.nth) & 1)
                sizes = (cute.size(buffer, mode=[0]), cute.size(buffer, mode=[1]))
                rows = cute.domain_offset((x + share.rows * sizes[0], 0), dq_tensor[None, None, 0, end, FAR])
                tile = cute.local_tile(rows, sizes, (0, share.columns))
                source, target = cpasync.tma_partition(
                    dq_atom, 0, cute.make_layout(1), cute.group_modes(buffer, 0, 2), cute.group_modes(tile, 0, 2)
                )
                cute.copy(dq_atom, source, target)  # of reductions the DSL elects a lane by itself, and always the same
                with cute.arch.elect_one():
                    cute.arch.cp_async_bulk_commit_group()
                if cutlass.const_expr(n > 0 and shares[n - 1].buffer != share.buffer):
                    _release(shared.dq_empty + shares[n - 1].buffer, 1, lane)
                if cutlass.const_expr(n == len(shares) - 1 or shares[n + 1].buffer == share.buffer):
                    _release(shared.dq_empty + share.buffer, 0, lane)
            blocks += 1
            same = q_head
            w, b, q_head = following(walk, w, b, q_head)
            nth += 1
            if q_head != same:
                nth = Int32(0)
            if cutlass.const_expr(ordered):
                cute.arch.cp_async_bulk_wait_group(0)  # added, not only read
                ptx.fence_proxy_async()
                cute.arch.sync_warp()
                if wanted >= 0:
                    ptx.add_release_gpu(done.iterator + mine, Int32(1))
        cute.arch.sync_warp()
        ptx.arrive_everywhere(shared.record_empty + slot, lane, cluster)
        turn += 1
        slot = turn & (RECORDS - 1)
        ptx.wait(shared.record_full + slot, (turn >> RECORD_BITS) & 1)
        going = records[EXISTS, slot] != 0
    cute.arch.cp_async_bulk_wait_group(0)  # all of it is added before the CTA ends
