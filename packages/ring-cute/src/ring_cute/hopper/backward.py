"""The backward in CuTe DSL: one launch over all key tiles of a table. Head dims to 128 as below; beyond them consumers
divide the work otherwise (`wide_consumer`), to 192 between two CTAs (`paired_consumer`), and all else is the same.

    warpgroup 0: three warps, few registers           warpgroups 1 and 2: 64 keys each, many registers
    ┌───────────── load ───────────────┐              ┌──────────────── consumer ─────────────────┐
    │ K and V tile, then blocks of     │── full ────► │ s  = exp2(K Q[n]ᵀ - lse)  (keys, queries) │
    │ queries by TMA: Q and dO rings   │◄── empty ─── │ ds = s (V dO[n]ᵀ - delta) ──► shared      │
    ├──────────── describe ────────────┤              │ dv += s dO[n]             s in registers  │
    │ lse, delta, edges of each block  │── full ────► │ dqᵀ = Kᵀ ds of block n - 1, all 128 keys, │
    ├─────────── add_queries ──────────┤              │       half of dq each ──► shared          │
    │ dq by TMA reduce-add to memory   │◄── full ──── │ dk += ds Q[n]            ds in registers  │
    └──────────────────────────────────┘              └───────────────────────────────────────────┘

A CTA computes one tile of 128 keys of one key head after the other (which one is next says a counter; longest first),
and walks the queries that see it, from the last one, of every query head of the group or of a part of it. dk and dv
never leave the registers before a tile's end. dq is summed in fp32 in global memory by every CTA that has a part of it:
rows of D numbers, so that a block may begin at any row.

Shared memory: `k`, `v` (64, D) for each consumer; `q` (BLOCK, D) Q_STAGES, with `lse`, `delta`, `bounds` and, for
ALiBi, `slopes`; `do` (BLOCK, D) DO_STAGES; `ds` (BLOCK, 128 keys) twice; `dq` in fp32 for each consumer: its 64 columns
of D of all rows, or at head dim 64 all columns of its half of the rows.

Barriers, of which phases follow from counts over the whole life of the CTA: `q_full`/`q_empty` (q_full: the loads and
the description), `do_full`/`do_empty` one a stage, `k_full`/`k_empty`, `v_full`/`v_empty`, `ds_full`/`ds_empty` one a
buffer, `dq_full`/`dq_empty` one a consumer, `record_full`/`record_empty` one a record. "full" takes one arrival and the
bytes of the load, or one of each warp that writes, "empty" one of each warp that has read.

Order of a block: s and dp issued, dp on top of -delta; exponentials; ds made, and stored for the other consumer; dv
issued; dq of the block *before* issued; dk issued; that dq to shared memory. By then both consumers' ds of the block
before have long been there: they do not wait for each other in every block, and fall into turns, one at its
exponentials while the other has the tensor cores. P and ds are both made before dv reads P, so what is live at a time
is dk, dv, s and dp, or dk, dv, dq, and P and ds in 16 bits: a block may have 80 queries (128 at head dim 64).

A thread has keys r and r + 8 of its warp's 16, and queries 8 j + 2 (lane % 4) + {0, 1}: element c + 2 half + 4 j of s
and dp. P and ds have the same order as operands, which is that of wgmma's first operand. ds is also stored for dq,
transposed (stmatrix), keys contiguous. dq is computed transposed: its words then lie in shared memory without bank
conflicts.

Rows beyond a segment arrive as zeros, whatever memory holds there (`views.ragged_view`), with an lse of +inf.

After Shah et al. (arXiv:2407.08608) and Spector et al. (arXiv:2410.20399): transposed scores, dq by asynchronous
reduction.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import hopper_helpers

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_consumer import CONSUMERS, WARPS, BackwardConsumer
from ring_cute.hopper.backward_producer import (
    KeyLoads,
    KeyShared,
    add_queries,
    describe,
    load,
)
from ring_cute.hopper.backward_records import (
    RECORDS,
    KeyWork,
)
from ring_cute.hopper.backward_settings import BackwardKind
from ring_cute.hopper.dsl import LayoutEnum, SmemAllocator
from ring_cute.hopper.paired_consumer import PairedConsumer
from ring_cute.hopper.scores import Terms
from ring_cute.hopper.views import flat, ragged_view
from ring_cute.hopper.wide_consumer import WideConsumer

THREADS = 128 * (1 + CONSUMERS)


class HopperBackward:
    """One kernel: `cute.compile(HopperBackward(kind), …)`; `compiling.compile_backward` knows how."""

    def __init__(self, kind: BackwardKind) -> None:
        self.kind = kind
        consumer = (PairedConsumer if kind.paired else WideConsumer) if kind.wide else BackwardConsumer
        self.consumer, self.cluster = consumer(kind), kind.settings.cluster
        assert kind.wide or not kind.paired, "128 keys are one CTA's there"
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.dim = kind.padded
        self.head_dim = kind.head_dim
        self.block = kind.settings.block
        self.q_stages = kind.settings.q_stages
        self.do_stages = kind.settings.do_stages
        self.dq_rows, self.dq_buffers = self.consumer.dq_rows, self.consumer.dq_buffers
        self.shares = self.consumer.shares
        self.p_numbers = 64 * self.block if kind.wide else 0
        self.p_barriers = 4 * kind.wide
        self.ds_writers = 4 if kind.wide else WARPS

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
        k_layout = cute.tile_to_shape(atom, (64, self.dim, self.consumer.key_parts), (0, 1, 2))
        v_layout = cute.tile_to_shape(atom, (64, self.dim, max(self.consumer.value_parts, 1)), (0, 1, 2))
        ds_layout = cute.tile_to_shape(atom, self.consumer.ds_shape, (0, 1, 2))
        dq_layout = cute.tile_to_shape(wide, (self.dq_rows, 64, self.dq_buffers), (0, 1, 2))
        bring, one = cpasync.CopyBulkTensorTileG2SOp(), lambda layout: cute.select(layout, mode=[0, 1])
        bring_rows = cpasync.CopyBulkTensorTileG2SMulticastOp() if self.kind.paired else bring
        rows, keys = (self.block // self.cluster, self.dim), (64, self.dim)
        part = cute.tile_to_shape(atom, rows, (0, 1))  # what a CTA loads of a block of Q or dO
        view = lambda x, heads, s, h: ragged_view(x, self.dtype, self.head_dim, heads, s, h)  # noqa: E731
        q_atom, q_tma = cpasync.make_tiled_tma_atom(bring_rows, view(q, num_heads, q_s, q_h), part, rows)
        do_atom, do_tma = cpasync.make_tiled_tma_atom(bring_rows, view(dout, num_heads, do_s, do_h), part, rows)
        k_atom, k_tma = cpasync.make_tiled_tma_atom(bring, view(k, num_kv_heads, k_s, k_h), one(k_layout), keys)
        v_atom, v_tma = cpasync.make_tiled_tma_atom(bring, view(v, num_kv_heads, v_s, v_h), one(v_layout), keys)
        width = Int64(self.head_dim)
        dq_atom, dq_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyReduceBulkTensorTileS2GOp(),
            ragged_view(
                dq, Float32, self.head_dim, num_heads, width, width
            ),  # heads are not used, but a size must vary
            one(dq_layout),
            (self.dq_rows, 64),
        )
        scores = self.product(OperandMajorMode.K, OperandMajorMode.K, self.block)
        sums = self.product(OperandMajorMode.K, OperandMajorMode.MN, self.dim, warpgroup.OperandSource.RMEM)
        turned = self.product(OperandMajorMode.MN, OperandMajorMode.K, self.dq_rows)

        values = self.consumer.value_parts > 0

        @cute.struct
        class Storage:
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(v_layout) if values else 0], 1024]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            do: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(do_layout)], 1024]
            ds: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(ds_layout)], 1024]
            dq: cute.struct.Align[cute.struct.MemRange[Float32, cute.cosize(dq_layout)], 1024]
            p: cute.struct.Align[cute.struct.MemRange[Float32, self.p_numbers], 128]
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
            p_full: cute.struct.MemRange[Int64, self.p_barriers]
            p_empty: cute.struct.MemRange[Int64, self.p_barriers if self.kind.paired else 0]
            ds_full: cute.struct.MemRange[Int64, 2]
            ds_empty: cute.struct.MemRange[Int64, 2]
            record_full: cute.struct.MemRange[Int64, RECORDS]
            record_empty: cute.struct.MemRange[Int64, RECORDS]
            slopes: cute.struct.MemRange[Float32, 2 * self.q_stages if self.kind.alibi else 0]
            number_full: cute.struct.MemRange[Int64, RECORDS if self.kind.paired else 0]
            numbers: cute.struct.MemRange[Int32, RECORDS if self.kind.paired else 0]

        self.storage = Storage
        self.kernel(
            q_atom, q_tma, k_atom, k_tma, v_atom, v_tma, do_atom, do_tma, dq_atom, dq_tma,
            q_layout, do_layout, k_layout, v_layout, ds_layout, dq_layout, scores, sums, turned,
            flat(lse, Float32), flat(delta, Float32), flat(dk, Int32 if self.kind.gradients == "final" else Int64),
            flat(dv, Int32 if self.kind.gradients == "final" else Int64),
            flat(items, Int32), flat(walk, Int32), flat(counter, Int32), flat(flags, cutlass.Uint32),
            flat(epoch, cutlass.Uint32), flat(departures, Int32), flat(turns, Int32), flat(done, Int32),
            score_scale, scale, q_len, num_heads, num_kv_heads, dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s,
            dv_h, num_items, section, head_batches, total,
            split, members, piece_length, q_batch_rows, do_batch_rows, k_batch_rows, polls,
            *(terms if self.kind.shaped else (None, None, None)),
        ).launch(
            grid=(grid, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(self.cluster, 1, 1) if self.kind.paired else None,
            stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip

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
        v_layout: cute.ComposedLayout,
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
        shared = KeyShared(
            q=storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            do=storage.do.get_tensor(do_layout.outer, swizzle=do_layout.inner),
            k=storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            v=storage.v.get_tensor(v_layout.outer, swizzle=v_layout.inner) if self.consumer.value_parts else None,
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
            p=storage.p.get_tensor(cute.make_layout((4, 128, self.p_numbers // 512))) if self.kind.wide else None,
            p_full=storage.p_full.data_ptr() if self.kind.wide else None,
            p_empty=storage.p_empty.data_ptr() if self.kind.paired else None,
            numbers=storage.numbers.get_tensor(cute.make_layout(RECORDS)) if self.kind.paired else None,
            number_full=storage.number_full.data_ptr() if self.kind.paired else None,
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
                    cute.arch.mbarrier_init(shared.q_empty + i, WARPS * self.cluster)
                for i in cutlass.range_constexpr(self.do_stages):
                    cute.arch.mbarrier_init(shared.do_full + i, 1)
                    cute.arch.mbarrier_init(shared.do_empty + i, WARPS * self.cluster)
                cute.arch.mbarrier_init(shared.k_full, 1)
                cute.arch.mbarrier_init(shared.k_empty, WARPS)
                cute.arch.mbarrier_init(shared.v_full, 1)
                cute.arch.mbarrier_init(shared.v_empty, self.consumer.v_readers)
                for i in cutlass.range_constexpr(self.dq_buffers):
                    cute.arch.mbarrier_init(shared.dq_full + i, 4)
                    cute.arch.mbarrier_init(shared.dq_empty + i, 1)
                for i in cutlass.range_constexpr(self.p_barriers):
                    cute.arch.mbarrier_init(shared.p_full + i, 1)
                    if cutlass.const_expr(self.kind.paired):
                        cute.arch.mbarrier_init(shared.p_empty + i, 1)
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(shared.ds_full + i, self.ds_writers)
                    cute.arch.mbarrier_init(shared.ds_empty + i, WARPS * self.cluster)
                for i in cutlass.range_constexpr(RECORDS):
                    cute.arch.mbarrier_init(shared.record_full + i, 1)
                    cute.arch.mbarrier_init(shared.record_empty + i, (WARPS + 1 + len(self.shares)) * self.cluster)
                    if cutlass.const_expr(self.kind.paired):
                        cute.arch.mbarrier_init(shared.number_full + i, 1)
            cute.arch.mbarrier_init_fence()
        ptx.meet(self.cluster)

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
                    self.block, self.q_stages, self.do_stages, self.kind.flags, self.cluster,
                )  # fmt: skip
            if warp == 1:
                terms = Terms(cap, slopes_b, slopes) if self.kind.alibi else None
                describe(work, shared, lse, delta, num_heads, q_len, terms, self.block, self.q_stages, self.cluster)
            for sender in cutlass.range_constexpr(len(self.shares)):
                if warp == 2 + sender:
                    add_queries(
                        work, shared, dq_atom, dq_tma, num_heads, q_len, turns, done, self.block,
                        self.shares[sender], self.kind.ordered, sender, len(self.shares), self.cluster,
                    )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.kind.settings.consumer_registers)
            self.consumer.consume(
                shared, scores, sums, turned, dk, dv, departures, score_scale, scale,
                dk_c, dk_b, dk_s, dk_h, dv_c, dv_b, dv_s, dv_h,
                Terms(cap, slopes_b, slopes),
            )  # fmt: skip
        if cutlass.const_expr(self.kind.paired):
            ptx.meet(self.cluster)  # what the peer sends to a CTA's memory, it sends while that lives
