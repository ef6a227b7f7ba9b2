"""The producer of the forward (`forward`): loads, arrival flags, and which tile is next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from ring_cute.hopper import ptx
from ring_cute.hopper.records import (
    BATCH,
    ENDS,
    HEAD,
    Q_ROW,
    RECORDS,
    START,
    STOP,
    WALK_COLUMNS,
    ask_once,
    publish,
    tell,
)
from ring_cute.hopper.views import DROP, FAR, KEEP


@dataclass(frozen=True)
class Loads:
    """TMA atoms and the tensors of coordinates that go with them."""

    q_atom: Any
    q: Any  # (Sq, D, Hq, B)
    k_atom: Any
    k: Any  # (key, D, Hkv, end, far)
    v_atom: Any
    v: Any
    state_atom: Any
    state: Any  # (Sq, D, Hq, B)


@dataclass(frozen=True)
class Shared:
    """What lives in shared memory: buffers, and barriers as pointers to the first of each kind."""

    q: Any  # (64, D, CONSUMERS * QUERIES)
    k: Any  # (BLOCK, D, STAGES)
    v: Any  # (BLOCK, D, STAGES)
    records: Any  # (16, RECORDS) int32
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    record_full: Any
    record_empty: Any
    o: Any  # (64, D, CONSUMERS) fp32, None without state_tma
    staged: Any  # (64, D, 2 CONSUMERS), every other one: the same memory for final rows
    o_full: Any
    o_empty: Any
    numbers: Any  # (RECORDS): of the tiles that the records are about, from the cluster's first CTA
    number_full: Any


def _sizes(buffers: Any) -> tuple[int, int]:
    """Rows and columns of a buffer."""
    return cute.size(buffers, mode=[0]), cute.size(buffers, mode=[1])


@cute.jit
def _copy(
    atom, tile, buffer, barrier, policy: cutlass.Constexpr = None, cluster: cutlass.Constexpr = 1
):  # fmt: skip
    """A tile of global memory (rows, D), whole, to a buffer, by TMA; the barrier expects its bytes from then on, and
    those that the cluster's other CTAs send."""
    target, source = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(buffer, 0, 2), cute.group_modes(tile, 0, 2)
    )
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, cluster * cute.size(buffer) * buffer.element_type.width // 8)
    more = {}
    if cutlass.const_expr(policy is not None):
        more["cache_policy"] = Int64(policy)
    if cutlass.const_expr(cluster > 1):
        more["mcast_mask"] = cutlass.Int16((1 << cluster) - 1)
    cute.copy(atom, source, target, tma_bar_ptr=barrier, **more)


@cute.jit
def _load_q(
    loads, shared, slot, tiles, queries: cutlass.Constexpr, consumers: cutlass.Constexpr, hints: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
):  # fmt: skip
    """The queries of the tile that a record is about, if it has any block: for each consumer its 64 rows."""
    records = shared.records
    if records[STOP, slot] > records[START, slot]:
        q_row, head, batch = records[Q_ROW, slot], records[HEAD, slot], records[BATCH, slot]
        if cutlass.const_expr(cluster > 1):  # this CTA's rows
            q_row = q_row + cute.arch.block_idx_in_cluster() * (64 * consumers)
        buffer = tiles & (queries - 1)
        for c in cutlass.range_constexpr(consumers):
            at = c * queries + buffer
            if cutlass.const_expr(queries == 1):
                ptx.wait(shared.q_empty + at, (tiles & 1) ^ 1)
            else:
                if tiles > 0:  # given back during the tile before
                    ptx.wait(shared.q_empty + at, ((tiles - 1) >> (queries - 1)) & 1)
            rows = cute.domain_offset((q_row + c * 64, 0), loads.q[None, None, head, batch])
            tile = cute.local_tile(rows, _sizes(shared.q), (0, 0))
            _copy(loads.q_atom, tile, shared.q[None, None, at], shared.q_full + at, DROP if hints else None)


@cute.jit
def _load_state(
    loads, shared, ends, q_row, head, batch, turn, consumers: cutlass.Constexpr, hints: cutlass.Constexpr
):  # fmt: skip
    """The state of a tile that continues; the buffer alone for one that begins here. After two blocks of the tile, not
    before: a buffer comes back in the first one."""
    for c in cutlass.range_constexpr(consumers):
        ptx.wait(shared.o_empty + c, turn & 1)
        if (ends & 1) == 0:
            rows = cute.domain_offset((q_row + c * 64, 0), loads.state[None, None, head, batch])
            tile = cute.local_tile(rows, _sizes(shared.o), (0, 0))
            _copy(loads.state_atom, tile, shared.o[None, None, c], shared.o_full + c, DROP if hints else None)
        else:
            ptx.arrive(shared.o_full + c, cute.arch.lane_idx() == 0)


@cute.jit
def _load_keys(
    atom, tensor, x, head, end, buffers, full, empty, stage, phase, hints: cutlass.Constexpr, cluster: cutlass.Constexpr
):  # fmt: skip
    """A block of K or V into its ring, or this CTA's part of it into those of the whole cluster; rows beyond the
    segment's end are zeros."""
    ptx.wait(empty + stage, phase ^ 1)
    box = cute.size(buffers, mode=[0]) // cluster, cute.size(buffers, mode=[1])
    part = Int32(0)
    if cutlass.const_expr(cluster > 1):
        part = cute.arch.block_idx_in_cluster()
    rows = cute.domain_offset((x + part * box[0], 0), tensor[None, None, head, end, FAR])
    tile = cute.local_tile(rows, box, (0, 0))
    target = cute.local_tile(buffers[None, None, stage], box, (part, 0))
    _copy(atom, tile, target, full + stage, KEEP if hints else None, cluster)


@cute.jit
def await_piece(flags, epoch, piece, polls):
    """Returns once piece has arrived, is poisoned (the largest value) or `polls` looks were in vain."""
    want = cutlass.Uint32(epoch[0])
    seen = ptx.load_acquire_sys(flags.iterator + piece)
    looks = Int32(0)
    while seen < want and looks < polls:
        seen = ptx.load_acquire_sys(flags.iterator + piece)
        looks += 1
    # the copy engine's writes, acquired by the generic proxy, must be visible to the async proxy (TMA)
    ptx.fence_proxy_async()


@cute.jit
def produce(
    work,
    loads,
    shared,
    flags,
    epoch,
    polls,
    block: cutlass.Constexpr,
    stages: cutlass.Constexpr,
    queries: cutlass.Constexpr,
    consumers: cutlass.Constexpr,
    flagged: cutlass.Constexpr,
    ahead: cutlass.Constexpr,
    hints: cutlass.Constexpr,
    cluster: cutlass.Constexpr,
    early: cutlass.Constexpr,
):
    """One warp, for all of the CTA's tiles. early: a tile's queries come once it is known, during the one before."""
    lane = cute.arch.lane_idx()
    grid, _, _ = cute.arch.grid_dim()
    first_tile, _, _ = cute.arch.block_idx()
    if cutlass.const_expr(cluster > 1):
        grid, first_tile = grid // cluster, first_tile // cluster
    records = shared.records
    stage_bits = stages.bit_length() - 1  # here: what a method is called on in a loop becomes a variable of it
    blocks, tiles, turn = Int32(0), Int32(0), Int32(0)
    publish(first_tile, turn, lane, work, records, shared.record_full, shared.record_empty)
    if cutlass.const_expr(early):
        _load_q(loads, shared, 0, tiles, queries, consumers, hints, cluster)
    going = first_tile < work.total
    while going:
        slot = turn & (RECORDS - 1)
        start, stop, q_row = records[START, slot], records[STOP, slot], records[Q_ROW, slot]
        batch, head, ends = records[BATCH, slot], records[HEAD, slot], records[ENDS, slot]
        if cutlass.const_expr(cluster > 1):  # this CTA's rows
            q_row = q_row + cute.arch.block_idx_in_cluster() * (64 * consumers)
        kv_head = head // work.group
        first = blocks
        asked = Int32(0)
        if stop > start:
            for w in cutlass.range(start, stop, unroll=1):
                entry = w * WALK_COLUMNS
                k_row, k_len, j_lo = work.walk[entry], work.walk[entry + 1], work.walk[entry + 2]
                count, right = work.walk[entry + 3], work.walk[entry + 4]
                if cutlass.const_expr(flagged):
                    await_piece(flags, epoch, work.walk[entry + 8], polls)
                end = batch * work.k_batch_rows + k_row + k_len
                for t in cutlass.range(count, unroll=1):
                    if blocks - first == 2:  # after two blocks there is time for the next tile
                        asked = ask_once(lane, work, cluster)
                        if cutlass.const_expr(ahead):
                            _load_state(loads, shared, ends, q_row, head, batch, turn, consumers, hints)
                    if blocks - first == 3:
                        asked = tell(asked, turn + 1, lane, shared, cluster)
                        publish(asked + grid, turn + 1, lane, work, records, shared.record_full, shared.record_empty)
                        if cutlass.const_expr(early):
                            next_slot = (turn + 1) & (RECORDS - 1)
                            _load_q(loads, shared, next_slot, tiles + 1, queries, consumers, hints, cluster)
                    number = t - right  # right edges from the right, then the others from the left
                    if t < right:
                        number = count - 1 - t
                    x = FAR - k_len + j_lo + number * block
                    stage, phase = blocks & (stages - 1), (blocks >> stage_bits) & 1
                    _load_keys(
                        loads.k_atom,
                        loads.k,
                        x,
                        kv_head,
                        end,
                        shared.k,
                        shared.k_full,
                        shared.k_empty,
                        stage,
                        phase,
                        hints,
                        cluster,
                    )
                    if cutlass.const_expr(not early):  # noqa: SIM102  # a constant, and a value
                        if blocks == first:  # the last tile's scores free a stage of K before they free Q
                            _load_q(loads, shared, slot, tiles, queries, consumers, hints, cluster)
                    _load_keys(
                        loads.v_atom,
                        loads.v,
                        x,
                        kv_head,
                        end,
                        shared.v,
                        shared.v_full,
                        shared.v_empty,
                        stage,
                        phase,
                        hints,
                        cluster,
                    )
                    blocks += 1
            tiles += 1
        if blocks - first <= 2:
            asked = ask_once(lane, work, cluster)
            if cutlass.const_expr(ahead):
                _load_state(loads, shared, ends, q_row, head, batch, turn, consumers, hints)
        if blocks - first <= 3:
            asked = tell(asked, turn + 1, lane, shared, cluster)
            publish(asked + grid, turn + 1, lane, work, records, shared.record_full, shared.record_empty)
            if cutlass.const_expr(early):
                _load_q(loads, shared, (turn + 1) & (RECORDS - 1), tiles, queries, consumers, hints, cluster)
        going = asked + grid < work.total
        turn += 1
