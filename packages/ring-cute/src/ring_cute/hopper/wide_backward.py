"""The backward of wide heads (beyond 128) in CuTe DSL: one launch over all key tiles of a table.

    warpgroup 0: four warps, few registers            warpgroups 1 (dv) and 2 (dk): the same 64 keys, many registers
    ┌───────────── load ───────────────┐              ┌─────────── dv ───────────┐      ┌──────────── dk ────────────┐
    │ K and V tile, then blocks of     │── full ────► │ P = exp2(K Q[n]ᵀ - lse)  │─ P ─►│ ds = P (V dO[n]ᵀ - delta)  │
    │ queries by TMA: Q and dO rings   │◄── empty ─── │ dv += P dO[n]            │◄ ds ─│ dk += ds Q[n]              │
    ├──────────── describe ────────────┤              │ dqᵀ = Kᵀ ds, half of D   │      │ dqᵀ = Kᵀ ds, the other half│
    │ lse, delta, edges of each block  │── full ────► │       64 columns at a time, to shared memory                  │
    ├────── add_queries, 2 warps ──────┤              │                          │      │                            │
    │ dq by TMA reduce-add to memory   │◄── full ──── │                          │      │                            │
    └──────────────────────────────────┘              └──────────────────────────┘      └────────────────────────────┘

As `backward` otherwise: tiles, the walk, the ends, and everything about order, flags and departures are the same.

Why so. dk and dv of 64 keys by 256 are 128 registers of each of 256 threads, whoever has them; those of 128 keys would
be all there are. K and V of 64 keys are 64 KiB at a head dim of 256, a stage of Q or dO is 32. Were keys or queries of
scores split between the warpgroups, products of 32 columns would read 24 bytes of operands for every 16 that the tensor
cores take; were D split for dv and dk, P and ds would come from shared memory. Where one consumer has all of P and dv,
and the other all of dP and dk, products have 64 columns or D, and P and ds are operands from registers. For 64 queries
by 64 keys by 256, in cycles of 128 bytes of shared memory: scores and dP 1024, dv and dk 512, dq 512, P 256, ds 64, dq
out and in 1024, loads 512: 3900, while the tensor cores take 2560. P goes from one consumer to the other in fp32, each
thread's to the same thread of the other (scores and dP are laid out alike), so that ds is rounded once.

dq is summed by twice as many tiles as with 128 keys. What that costs is what limits this kernel by estimate: sums in
memory take some 3 TB/s, which 64 keys a tile come to at 500 TFLOP/s. 80 keys (as FlashAttention-3) fit by transposing
dv and dk, whose products then read both operands from shared memory; a pair of CTAs that shares 128 keys halves it.

Shared memory: `k`, `v` (64, D); `q` (BLOCK, D) Q_STAGES, with `lse`, `delta`, `bounds`; `do` (BLOCK, D) DO_STAGES; `p`
in fp32, as threads have it; `ds` (BLOCK, 64 keys) twice; `dq` (BLOCK, 64 columns) in fp32, two or more.

Barriers besides those of `backward`: `p_full`, one a warp: its threads' P is there. It needs no `p_empty`, since the
consumer of dv writes the next P only once it has seen ds, which the other made of this P. `ds_full`/`ds_empty`, one a
buffer: written by the four warps of one consumer, read by both. `v_empty` and `p_full` have arrivals of one consumer.

Order of a block, of which products that follow each other without a wait are under way together:

    dv: P[n] there │ dv, s[n+1] │ dO[n] free │ ds[n] there │ dq │ P[n+1] made, handed over │ dq goes │ dq │ dq goes
    dk: dP[n] there, P[n] there │ ds[n] made, stored │ dk, dq │ Q[n] free, dq goes │ dq, dP[n+1] │ dq goes
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import hopper_helpers

from ring_cute.hopper.backward_consumer import CONSUMERS
from ring_cute.hopper.backward_producer import (
    KeyLoads,
    add_queries,
    describe,
    load,
)
from ring_cute.hopper.backward_records import (
    RECORDS,
    KeyWork,
)
from ring_cute.hopper.backward_settings import WIDE_TILE_KEYS, BackwardKind
from ring_cute.hopper.dsl import LayoutEnum, SmemAllocator
from ring_cute.hopper.scores import Terms
from ring_cute.hopper.views import flat, ragged_view
from ring_cute.hopper.wide_consumer import QUERIES, VALUES, WideConsumer, WideShared

WARPS = 4 * CONSUMERS
HELPERS = 3
"""Warps, besides the one that loads, that read records."""
THREADS = 128 * (1 + CONSUMERS)


class WideBackward:
    """One kernel: `cute.compile(WideBackward(kind), …)`; `compiling.compile_backward` knows how."""

    def __init__(self, kind: BackwardKind) -> None:
        self.kind = kind
        self.consumer = WideConsumer(kind)
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.dim = kind.padded
        self.head_dim = kind.head_dim
        self.block = kind.settings.block
        self.q_stages = kind.settings.q_stages
        self.do_stages = kind.settings.do_stages
        self.dq_buffers = kind.settings.dq_buffers
        assert self.dim % 64 == 0 and self.block == 64, "a share of dq has 64 columns, a row of ds 64 keys"
        assert self.dq_buffers in (CONSUMERS, self.dim // 64), "one for each consumer, or for each share"

    @cute.jit
    def __call__(
        self,
        q: Int64,
        k: Int64,
        v: Int64,
        dout: Int64,
        lse: Int64,
        delta: Int64,
        dq: Int64,
        dk: Int64,
        dv: Int64,
        items: Int64,
        walk: Int64,
        counter: Int64,
        flags: Int64,
        epoch: Int64,
        departures: Int64,
        turns: Int64,
        done: Int64,
        score_scale: Float32,  # the softmax's times log2(e)
        scale: Float32,
        q_len: Int32,
        num_heads: Int32,
        num_kv_heads: Int32,
        q_s: Int64,
        q_h: Int64,
        k_s: Int64,
        k_h: Int64,
        v_s: Int64,
        v_h: Int64,
        do_s: Int64,
        do_h: Int64,
        dk_c: Int64,
        dk_b: Int64,
        dk_s: Int64,
        dk_h: Int64,
        dv_c: Int64,
        dv_b: Int64,
        dv_s: Int64,
        dv_h: Int64,
        num_items: Int32,
        section: Int32,
        head_batches: Int32,
        total: Int32,
        split: Int32,
        members: Int32,
        piece_length: Int32,
        q_batch_rows: Int32,
        do_batch_rows: Int32,
        k_batch_rows: Int32,
        polls: Int32,
        grid: Int32,
        stream: Any,
        *terms: Any,
    ):
        """Addresses, sizes and strides in elements; q, dout (B, Sq, Hq, D), lse (times log2(e)), delta (B, Hq, Sq), dq
        (B, Hq, Sq, D) fp32, k, v, dk, dv (C, B, S, Hkv, D). terms: of shaped scores only, those of `scores.Terms`;
        `score_scale` is then what `scores` takes."""
        atom = warpgroup.make_smem_layout_atom(
            hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, 64), self.dtype
        )
        wide = warpgroup.make_smem_layout_atom(
            hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, Float32, 32), Float32
        )
        q_layout = cute.tile_to_shape(atom, (self.block, self.dim, self.q_stages), (0, 1, 2))
        do_layout = cute.tile_to_shape(atom, (self.block, self.dim, self.do_stages), (0, 1, 2))
        k_layout = cute.tile_to_shape(atom, (WIDE_TILE_KEYS, self.dim, 1), (0, 1, 2))
        ds_layout = cute.tile_to_shape(atom, (self.block, WIDE_TILE_KEYS, 2), (0, 1, 2))
        dq_layout = cute.tile_to_shape(wide, (self.block, 64, self.dq_buffers), (0, 1, 2))
        bring, one = cpasync.CopyBulkTensorTileG2SOp(), lambda layout: cute.select(layout, mode=[0, 1])
        rows, keys = (self.block, self.dim), (WIDE_TILE_KEYS, self.dim)
        view = lambda x, heads, s, h: ragged_view(x, self.dtype, self.head_dim, heads, s, h)  # noqa: E731
        q_atom, q_tma = cpasync.make_tiled_tma_atom(bring, view(q, num_heads, q_s, q_h), one(q_layout), rows)
        do_atom, do_tma = cpasync.make_tiled_tma_atom(bring, view(dout, num_heads, do_s, do_h), one(do_layout), rows)
        k_atom, k_tma = cpasync.make_tiled_tma_atom(bring, view(k, num_kv_heads, k_s, k_h), one(k_layout), keys)
        v_atom, v_tma = cpasync.make_tiled_tma_atom(bring, view(v, num_kv_heads, v_s, v_h), one(k_layout), keys)
        width = Int64(self.head_dim)
        dq_atom, dq_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyReduceBulkTensorTileS2GOp(),
            ragged_view(
                dq, Float32, self.head_dim, num_heads, width, width
            ),  # heads are not used, but a size must vary
            one(dq_layout),
            (self.block, 64),
        )
        scores = self.product(OperandMajorMode.K, OperandMajorMode.K, self.block)
        sums = self.product(OperandMajorMode.K, OperandMajorMode.MN, self.dim, warpgroup.OperandSource.RMEM)
        turned = self.product(OperandMajorMode.MN, OperandMajorMode.K, self.block)

        @cute.struct
        class Storage:
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            do: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(do_layout)], 1024]
            ds: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(ds_layout)], 1024]
            dq: cute.struct.Align[cute.struct.MemRange[Float32, cute.cosize(dq_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[Float32, WIDE_TILE_KEYS * self.block], 128]
            lse: cute.struct.Align[cute.struct.MemRange[Float32, self.block * self.q_stages], 128]
            delta: cute.struct.Align[cute.struct.MemRange[Float32, self.block * self.q_stages], 128]
            bounds: cute.struct.Align[cute.struct.MemRange[Int32, 4 * self.q_stages], 16]
            records: cute.struct.Align[cute.struct.MemRange[Int32, 16 * RECORDS], 64]
            q_full: cute.struct.MemRange[Int64, self.q_stages]
            q_empty: cute.struct.MemRange[Int64, self.q_stages]
            do_full: cute.struct.MemRange[Int64, self.do_stages]
            do_empty: cute.struct.MemRange[Int64, self.do_stages]
            k_full: cute.struct.MemRange[Int64, 1]
            k_empty: cute.struct.MemRange[Int64, 1]
            v_full: cute.struct.MemRange[Int64, 1]
            v_empty: cute.struct.MemRange[Int64, 1]
            dq_full: cute.struct.MemRange[Int64, self.dq_buffers]
            dq_empty: cute.struct.MemRange[Int64, self.dq_buffers]
            p_full: cute.struct.MemRange[Int64, 4]
            ds_full: cute.struct.MemRange[Int64, 2]
            ds_empty: cute.struct.MemRange[Int64, 2]
            record_full: cute.struct.MemRange[Int64, RECORDS]
            record_empty: cute.struct.MemRange[Int64, RECORDS]
            slopes: cute.struct.MemRange[Float32, 2 * self.q_stages if self.kind.alibi else 0]

        self.storage = Storage
        self.kernel(
            q_atom, q_tma, k_atom, k_tma, v_atom, v_tma, do_atom, do_tma, dq_atom, dq_tma,
            q_layout, do_layout, k_layout, ds_layout, dq_layout, scores, sums, turned,
            flat(lse, Float32), flat(delta, Float32), flat(dk, Int32 if self.kind.gradients == "final" else Int64),
            flat(dv, Int32 if self.kind.gradients == "final" else Int64),
            flat(items, Int32), flat(walk, Int32), flat(counter, Int32), flat(flags, cutlass.Uint32),
            flat(epoch, cutlass.Uint32), flat(departures, Int32), flat(turns, Int32), flat(done, Int32),
            score_scale, scale, q_len, num_heads, num_kv_heads, dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s,
            dv_h, num_items, section, head_batches, total,
            split, members, piece_length, q_batch_rows, do_batch_rows, k_batch_rows, polls,
            *(terms if self.kind.shaped else (None, None, None)),
        ).launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    def product(self, a, b, columns, source=warpgroup.OperandSource.SMEM):
        """64 rows by so many columns, in fp32, by one warpgroup."""
        return hopper_helpers.make_trivial_tiled_mma(
            self.dtype, self.dtype, a, b, Float32, (1, 1, 1), (64, columns), source
        )

    @cute.kernel
    def kernel(
        self,
        q_atom: cute.CopyAtom,
        q_tma: cute.Tensor,
        k_atom: cute.CopyAtom,
        k_tma: cute.Tensor,
        v_atom: cute.CopyAtom,
        v_tma: cute.Tensor,
        do_atom: cute.CopyAtom,
        do_tma: cute.Tensor,
        dq_atom: cute.CopyAtom,
        dq_tma: cute.Tensor,
        q_layout: cute.ComposedLayout,
        do_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
        ds_layout: cute.ComposedLayout,
        dq_layout: cute.ComposedLayout,
        scores: cute.TiledMma,
        sums: cute.TiledMma,
        turned: cute.TiledMma,
        lse: cute.Tensor,
        delta: cute.Tensor,
        dk: cute.Tensor,
        dv: cute.Tensor,
        items: cute.Tensor,
        walk: cute.Tensor,
        counter: cute.Tensor,
        flags: cute.Tensor,
        epoch: cute.Tensor,
        departures: cute.Tensor,
        turns: cute.Tensor,
        done: cute.Tensor,
        score_scale: Float32,
        scale: Float32,
        q_len: Int32,
        num_heads: Int32,
        num_kv_heads: Int32,
        dk_c: Int64,
        dk_b: Int64,
        dk_s: Int64,
        dk_h: Int64,
        dv_c: Int64,
        dv_b: Int64,
        dv_s: Int64,
        dv_h: Int64,
        num_items: Int32,
        section: Int32,
        head_batches: Int32,
        total: Int32,
        split: Int32,
        members: Int32,
        piece_length: Int32,
        q_batch_rows: Int32,
        do_batch_rows: Int32,
        k_batch_rows: Int32,
        polls: Int32,
        cap: Any,  # this and what follows: None unless scores are shaped
        slopes_b: Any,
        slopes: Any,
    ):
        storage = SmemAllocator().allocate(self.storage)
        stats = cute.make_layout((self.block, self.q_stages))
        shared = WideShared(
            q=storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            do=storage.do.get_tensor(do_layout.outer, swizzle=do_layout.inner),
            k=storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            v=storage.v.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            ds=storage.ds.get_tensor(ds_layout.outer, swizzle=ds_layout.inner),
            dq=storage.dq.get_tensor(dq_layout.outer, swizzle=dq_layout.inner),
            lse=storage.lse.get_tensor(stats),
            delta=storage.delta.get_tensor(stats),
            bounds=storage.bounds.get_tensor(cute.make_layout((4, self.q_stages))),
            records=storage.records.get_tensor(cute.make_layout((16, RECORDS))),
            q_full=storage.q_full.data_ptr(),
            q_empty=storage.q_empty.data_ptr(),
            do_full=storage.do_full.data_ptr(),
            do_empty=storage.do_empty.data_ptr(),
            k_full=storage.k_full.data_ptr(),
            k_empty=storage.k_empty.data_ptr(),
            v_full=storage.v_full.data_ptr(),
            v_empty=storage.v_empty.data_ptr(),
            dq_full=storage.dq_full.data_ptr(),
            dq_empty=storage.dq_empty.data_ptr(),
            record_full=storage.record_full.data_ptr(),
            record_empty=storage.record_empty.data_ptr(),
            slopes=storage.slopes.get_tensor(cute.make_layout((2, self.q_stages))) if self.kind.alibi else None,
            p=storage.p.get_tensor(cute.make_layout((4, 128, self.block * WIDE_TILE_KEYS // 512))),
            p_full=storage.p_full.data_ptr(),
            ds_full=storage.ds_full.data_ptr(),
            ds_empty=storage.ds_empty.data_ptr(),
        )
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for loads in (q_atom, k_atom, v_atom, do_atom, dq_atom):
                cpasync.prefetch_descriptor(loads)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.q_stages):
                    cute.arch.mbarrier_init(shared.q_full + i, 2)
                    cute.arch.mbarrier_init(shared.q_empty + i, WARPS)
                for i in cutlass.range_constexpr(self.do_stages):
                    cute.arch.mbarrier_init(shared.do_full + i, 1)
                    cute.arch.mbarrier_init(shared.do_empty + i, WARPS)
                cute.arch.mbarrier_init(shared.k_full, 1)
                cute.arch.mbarrier_init(shared.k_empty, WARPS)
                cute.arch.mbarrier_init(shared.v_full, 1)
                cute.arch.mbarrier_init(shared.v_empty, 4)
                for i in cutlass.range_constexpr(self.dq_buffers):
                    cute.arch.mbarrier_init(shared.dq_full + i, 4)
                    cute.arch.mbarrier_init(shared.dq_empty + i, 1)
                for i in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_init(shared.p_full + i, 1)
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(shared.ds_full + i, 4)
                    cute.arch.mbarrier_init(shared.ds_empty + i, WARPS)
                for i in cutlass.range_constexpr(RECORDS):
                    cute.arch.mbarrier_init(shared.record_full + i, 1)
                    cute.arch.mbarrier_init(shared.record_empty + i, WARPS + HELPERS)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.kind.settings.producer_registers)
            work = KeyWork(
                items, walk, counter, num_items, section, num_kv_heads, head_batches, total, split, members,
                num_heads // num_kv_heads,
            )  # fmt: skip
            if warp == 0:
                loads = KeyLoads(q_atom, q_tma, k_atom, k_tma, v_atom, v_tma, do_atom, do_tma)
                load(
                    work, loads, shared, flags, epoch, polls, (piece_length, q_batch_rows, do_batch_rows, k_batch_rows),
                    self.block, self.q_stages, self.do_stages, self.kind.flags,
                )  # fmt: skip
            if warp == 1:
                terms = Terms(cap, slopes_b, slopes) if self.kind.alibi else None
                describe(work, shared, lse, delta, num_heads, q_len, terms, self.block, self.q_stages)
            for role in cutlass.range_constexpr(CONSUMERS):
                if warp == 2 + role:
                    add_queries(
                        work, shared, dq_atom, dq_tma, num_heads, q_len, turns, done, self.block,
                        self.consumer.shares[role], self.kind.ordered, role, CONSUMERS,
                    )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.kind.settings.consumer_registers)
            if warp < 8:
                self.consumer.consume_wide(
                    shared, scores, sums, turned, dv, departures, score_scale, scale, (dv_c, dv_b, dv_s, dv_h),
                    Terms(cap, slopes_b, slopes), VALUES,
                )  # fmt: skip
            else:
                self.consumer.consume_wide(
                    shared, scores, sums, turned, dk, departures, score_scale, scale, (dk_c, dk_b, dk_s, dk_h),
                    Terms(cap, slopes_b, slopes), QUERIES,
                )  # fmt: skip
