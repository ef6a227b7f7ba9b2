"""The forward in CuTe DSL: one launch over all tiles of a table.

    warpgroup 0: one warp, few registers              warpgroups 1 and 2: 64 rows each, many registers
    ┌──────────── producer ────────────┐              ┌──────────────── consumer ────────────────┐
    │ Q tile, then K and V blocks      │── full ────►│ S[n+1] = Q K[n+1]ᵀ   issued               │
    │ by TMA into two rings of STAGES  │              │ O += P[n] V[n]        issued               │
    │ (waits for arrival flags before  │◄── empty ───│ softmax of S[n+1] while O is summed        │
    │ a piece's first load)            │              │ P stays in registers                       │
    └──────────────────────────────────┘              └──────────────────────────────────────────┘

Shared memory: `q` (64, D) CONSUMERS x QUERIES buffers, `k` and `v` (BLOCK, D) STAGES each, `records` of tiles, and,
where steps accumulate, `o` (64, D) in fp32 for each consumer.

Barriers, of which phases follow from counts of tiles and blocks over the whole life of the CTA: `q_full`/`q_empty` one
per buffer of queries, `k_full`/`k_empty` and `v_full`/`v_empty` one per stage, `record_full`/`record_empty` one per
record, `o_full`/`o_empty` one per consumer. "full" takes one arrival and the bytes of the load, "empty" one of each
warp that has read.

Every tile begins from nothing, and its first scores are under way while the tile before ends; where its strip
continues, what earlier steps have left in (state, lse) is added at its end, so that neither loading nor storing it
holds up the products:

    tile n:  first scores │ softmax │ blocks ...                │ last sums │ merge, write to `o`
    tile n + 1:                        record and queries come  │ first scores │             softmax │ blocks ...
    `o`:     stored n - 1 │ tile n's state arrives by TMA, waits             │ (read) stored by TMA while n + 1 goes on

(State by TMA up to head dim 128, `ForwardKind.state_tma`; wider ones have no room and go from and to registers at the
end, after which the next tile's first scores begin.) Where they fit (QUERIES = 2) the queries have two buffers, and a
tile's output leaves by TMA through the one that its queries were in, which is given back in the next tile's first
block; where there is an `o`, through that. TMA stores boxes of 64 rows: what has fewer leaves from registers, as all
rows do where there is one buffer of queries: the next tile's come there once all scores are computed.

With `Settings.turns` consumers issue a block's products one after the other, each behind a named barrier that the one
before it arrives at: one has the tensor cores while the others are at their exponentials.

With `Settings.cluster` > 1 a tile has the rows of several CTAs, each of which loads a part of every block for all of
them: "empty" barriers of K, V and records then count the warps of all, and the number of the next tile, which the first
CTA asks for, goes to the others' `numbers`, announced at `number_full`.

A thread has rows r and r + 8 of its warp's 16, and columns 8 j + 2 (lane % 4) + {0, 1}: element c + 2 half + 4 j of S
or O. P has the same order, which is that of wgmma's first operand. A row's maximum is found over the quad in every
block, its sum only at the end.

Keys are read through a view whose bounds each load names (`ragged_view`): rows beyond a segment arrive as zeros,
whatever memory holds there, so 0 x NaN cannot occur. Rows of queries beyond a tile's last are computed and dropped.

After Shah et al. (arXiv:2407.08608): roles, register split, order of the two products.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import hopper_helpers

from ring_cute.hopper import ptx
from ring_cute.hopper.consumer import Consumer
from ring_cute.hopper.dsl import LayoutEnum, SmemAllocator
from ring_cute.hopper.producer import Loads, Shared, produce
from ring_cute.hopper.records import RECORDS, Work
from ring_cute.hopper.scores import Terms
from ring_cute.hopper.tile_end import Results
from ring_cute.hopper.views import flat, ragged_view, rows_view
from ring_cute.settings import ForwardKind


class HopperForward:
    """One kernel: `cute.compile(HopperForward(kind), …)`; `compiling.compile_forward` knows how."""

    def __init__(self, kind: ForwardKind) -> None:
        self.kind = kind
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.dim = kind.padded
        self.head_dim = kind.head_dim
        self.block = kind.settings.block
        self.stages = kind.settings.stages
        self.stage_bits = self.stages.bit_length() - 1
        self.queries = kind.queries
        self.consumers = kind.settings.consumers
        self.cluster = kind.settings.cluster
        self.consumer = Consumer(kind)
        assert self.stages == 1 << self.stage_bits, "phases are read off bits of a count"

    @cute.jit
    def __call__(
        self,
        q: Int64,
        k: Int64,
        v: Int64,
        out: Int64,
        lse: Int64,
        state: Int64,
        sinks: Int64,
        items: Int64,
        walk: Int64,
        counter: Int64,
        flags: Int64,
        epoch: Int64,
        scale: Float32,  # the softmax's times log2(e)
        batch: Int32,
        q_len: Int32,
        num_heads: Int32,
        num_kv_heads: Int32,
        q_b: Int64,
        q_s: Int64,
        q_h: Int64,
        k_s: Int64,
        k_h: Int64,
        v_s: Int64,
        v_h: Int64,
        out_b: Int64,
        out_s: Int64,
        out_h: Int64,
        lse_b: Int64,
        lse_h: Int64,
        state_b: Int64,
        state_s: Int64,
        state_h: Int64,
        num_items: Int32,
        section: Int32,
        head_batches: Int32,
        total: Int32,
        k_batch_rows: Int32,
        polls: Int32,
        grid: Int32,
        stream: Any,
        *terms: Any,
    ):
        """Addresses, sizes and strides in elements; q, out, state (B, Sq, Hq, D), lse (B, Hq, Sq), k, v (…, Hkv, D).
        terms: of shaped scores only, those of `scores.Terms`; `scale` is then what `scores` takes."""
        sizes = (batch, q_len, num_heads)
        q_layout = hopper_helpers.make_smem_layout_a(
            LayoutEnum.ROW_MAJOR, (64, self.block, self.dim), self.dtype, self.consumers * self.queries
        )
        atom = warpgroup.make_smem_layout_atom(
            hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, self.dim), self.dtype
        )
        k_layout = cute.tile_to_shape(atom, (self.block, self.dim, self.stages), (0, 1, 2))
        load = load_keys = cpasync.CopyBulkTensorTileG2SOp()
        keys, key_box = cute.select(k_layout, mode=[0, 1]), (self.block, self.dim)
        if cutlass.const_expr(self.cluster > 1):  # each CTA loads a part of a block, for all of them
            load_keys = cpasync.CopyBulkTensorTileG2SMulticastOp()
            key_box = (self.block // self.cluster, self.dim)
            keys = cute.tile_to_shape(atom, key_box, (0, 1))
        rows, box = cute.select(q_layout, mode=[0, 1]), (64, self.dim)
        q_atom, q_tma = cpasync.make_tiled_tma_atom(
            load, rows_view(q, self.dtype, self.head_dim, sizes, (q_b, q_s, q_h)), rows, box
        )
        k_atom, k_tma = cpasync.make_tiled_tma_atom(
            load_keys,
            ragged_view(k, self.dtype, self.head_dim, num_kv_heads, k_s, k_h),
            keys,
            key_box,
        )
        v_atom, v_tma = cpasync.make_tiled_tma_atom(
            load_keys,
            ragged_view(v, self.dtype, self.head_dim, num_kv_heads, v_s, v_h),
            keys,
            key_box,
        )
        if cutlass.const_expr(self.kind.out_tma):
            out_atom, out_tma = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileS2GOp(),
                rows_view(out, self.dtype, self.head_dim, sizes, (out_b, out_s, out_h)),
                rows,
                box,
            )
        else:
            out_atom, out_tma = q_atom, q_tma
        state_in, state_out, state_tma, o_layout = q_atom, q_atom, q_tma, None
        if cutlass.const_expr(self.kind.state_tma):
            o_layout = cute.tile_to_shape(
                warpgroup.make_smem_layout_atom(
                    hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, Float32, self.dim), Float32
                ),
                (64, self.dim, self.consumers),
                (0, 1, 2),
            )
            states = rows_view(state, Float32, self.head_dim, sizes, (state_b, state_s, state_h))
            o_rows = cute.select(o_layout, mode=[0, 1])
            state_in, state_tma = cpasync.make_tiled_tma_atom(load, states, o_rows, box)
            state_out, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), states, o_rows, box)
        scores = hopper_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, self.block),
            warpgroup.OperandSource.SMEM,
        )
        sums = hopper_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (64, self.dim),
            warpgroup.OperandSource.RMEM,
        )

        queries, stages = self.consumers * self.queries, self.stages
        sums_ahead = self.consumers * 64 * self.dim if self.kind.state_tma else 0
        consumers_ahead = self.consumers if self.kind.state_tma else 0

        @cute.struct
        class Storage:
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            o: cute.struct.Align[cute.struct.MemRange[Float32, sums_ahead], 1024]
            records: cute.struct.Align[cute.struct.MemRange[Int32, 16 * RECORDS], 64]
            q_full: cute.struct.MemRange[Int64, queries]
            q_empty: cute.struct.MemRange[Int64, queries]
            k_full: cute.struct.MemRange[Int64, stages]
            k_empty: cute.struct.MemRange[Int64, stages]
            v_full: cute.struct.MemRange[Int64, stages]
            v_empty: cute.struct.MemRange[Int64, stages]
            record_full: cute.struct.MemRange[Int64, RECORDS]
            record_empty: cute.struct.MemRange[Int64, RECORDS]
            o_full: cute.struct.MemRange[Int64, consumers_ahead]
            o_empty: cute.struct.MemRange[Int64, consumers_ahead]
            numbers: cute.struct.MemRange[Int32, RECORDS]
            number_full: cute.struct.MemRange[Int64, RECORDS]

        self.storage = Storage
        threads = 128 * (1 + self.consumers)
        self.kernel(
            q_atom, q_tma, k_atom, k_tma, v_atom, v_tma, out_atom, out_tma, state_in, state_out,
            state_tma, q_layout, k_layout, o_layout, scores, sums,
            flat(out, Int32), flat(lse, Float32), flat(state, Int64), flat(sinks, Float32),
            flat(items, Int32), flat(walk, Int32), flat(counter, Int32), flat(flags, cutlass.Uint32),
            flat(epoch, cutlass.Uint32), scale, num_heads, num_kv_heads, out_b, out_s, out_h, lse_b, lse_h,
            state_b, state_s, state_h, num_items, section, head_batches, total, k_batch_rows, polls,
            *(terms if self.kind.shaped else (None, None, None)),
        ).launch(
            grid=(grid, 1, 1),
            block=(threads, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        q_atom: cute.CopyAtom,
        q_tma: cute.Tensor,
        k_atom: cute.CopyAtom,
        k_tma: cute.Tensor,
        v_atom: cute.CopyAtom,
        v_tma: cute.Tensor,
        out_atom: cute.CopyAtom,
        out_tma: cute.Tensor,
        state_in: cute.CopyAtom,
        state_out: cute.CopyAtom,
        state_tma: cute.Tensor,
        q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout,
        o_layout: Any,  # None without state_tma
        scores: cute.TiledMma,
        sums: cute.TiledMma,
        out: cute.Tensor,
        lse: cute.Tensor,
        state: cute.Tensor,
        sinks: cute.Tensor,
        items: cute.Tensor,
        walk: cute.Tensor,
        counter: cute.Tensor,
        flags: cute.Tensor,
        epoch: cute.Tensor,
        scale: Float32,
        num_heads: Int32,
        num_kv_heads: Int32,
        out_b: Int64,
        out_s: Int64,
        out_h: Int64,
        lse_b: Int64,
        lse_h: Int64,
        state_b: Int64,
        state_s: Int64,
        state_h: Int64,
        num_items: Int32,
        section: Int32,
        head_batches: Int32,
        total: Int32,
        k_batch_rows: Int32,
        polls: Int32,
        cap: Any,  # this and what follows: None unless scores are shaped
        slopes_b: Any,
        slopes: Any,
    ):
        storage = SmemAllocator().allocate(self.storage)
        o, staged = None, None
        if cutlass.const_expr(self.kind.state_tma):
            o = storage.o.get_tensor(o_layout.outer, swizzle=o_layout.inner)
            pointer = cute.recast_ptr(storage.o.data_ptr(), q_layout.inner, dtype=self.dtype)
            rows = cute.tile_to_shape(cute.select(q_layout, mode=[0, 1]), (64, self.dim, 2 * self.consumers), (0, 1, 2))
            staged = cute.make_tensor(pointer, rows.outer)
        shared = Shared(
            q=storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner),
            k=storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            v=storage.v.get_tensor(k_layout.outer, swizzle=k_layout.inner),
            records=storage.records.get_tensor(cute.make_layout((16, RECORDS))),
            q_full=storage.q_full.data_ptr(),
            q_empty=storage.q_empty.data_ptr(),
            k_full=storage.k_full.data_ptr(),
            k_empty=storage.k_empty.data_ptr(),
            v_full=storage.v_full.data_ptr(),
            v_empty=storage.v_empty.data_ptr(),
            record_full=storage.record_full.data_ptr(),
            record_empty=storage.record_empty.data_ptr(),
            o=o,
            staged=staged,
            o_full=storage.o_full.data_ptr(),
            o_empty=storage.o_empty.data_ptr(),
            numbers=storage.numbers.get_tensor(cute.make_layout(RECORDS)),
            number_full=storage.number_full.data_ptr(),
        )
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            cpasync.prefetch_descriptor(q_atom)
            cpasync.prefetch_descriptor(k_atom)
            cpasync.prefetch_descriptor(v_atom)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.consumers * self.queries):
                    cute.arch.mbarrier_init(shared.q_full + i, 1)
                    cute.arch.mbarrier_init(shared.q_empty + i, 4)
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(shared.k_full + i, 1)
                    cute.arch.mbarrier_init(shared.k_empty + i, 4 * self.consumers * self.cluster)
                    cute.arch.mbarrier_init(shared.v_full + i, 1)
                    cute.arch.mbarrier_init(shared.v_empty + i, 4 * self.consumers * self.cluster)
                if cutlass.const_expr(self.kind.state_tma):
                    for i in cutlass.range_constexpr(self.consumers):
                        cute.arch.mbarrier_init(shared.o_full + i, 1)
                        cute.arch.mbarrier_init(shared.o_empty + i, 4)
                for i in cutlass.range_constexpr(RECORDS):
                    cute.arch.mbarrier_init(shared.record_full + i, 1)
                    cute.arch.mbarrier_init(shared.record_empty + i, 4 * self.consumers * self.cluster)
                    cute.arch.mbarrier_init(shared.number_full + i, 1)
            cute.arch.mbarrier_init_fence()
        ptx.meet(self.cluster)

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.kind.settings.producer_registers)
            if warp == 0:
                work = Work(
                    items, walk, counter, num_items, section, num_heads, head_batches, total,
                    num_heads // num_kv_heads, k_batch_rows,
                )  # fmt: skip
                loads = Loads(q_atom, q_tma, k_atom, k_tma, v_atom, v_tma, state_in, state_tma)
                produce(
                    work, loads, shared, flags, epoch, polls, self.block, self.stages, self.queries,
                    self.consumers, self.kind.flags, self.kind.state_tma, self.kind.settings.cache_hints, self.cluster,
                    self.kind.queries_ahead,
                )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.kind.settings.consumer_registers)
            results = Results(
                out_atom, out_tma, out, out_b, out_s, out_h, lse, lse_b, lse_h, state_out, state_tma, state,
                state_b, state_s, state_h,
            )  # fmt: skip
            self.consumer.consume(shared, walk, results, scores, sums, sinks, scale, Terms(cap, slopes_b, slopes))
        if cutlass.const_expr(self.cluster > 1):
            ptx.meet(self.cluster)  # what others send to a CTA's memory, they send while it lives
