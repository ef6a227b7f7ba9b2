"""Before and after the backward: what a row needs to know of itself, and dq in its own dtype.

  out, dout (row of D) ──▶ delta = rowsum(dout * out) - dlse     0 where that is no number
  lse                  ──▶ scaled_lse = lse * log2(e)            +inf where a row has seen nothing: P is then 0
                           sums (row of D) fp32 = 0
  sums (row of D) fp32 ──▶ dq = sums * scale

Some lanes of a warp share a row, 8 numbers each; ROUNDS rows a lane, all loaded before any is used: both kernels do
nothing but move memory. grid = (tiles of rows, query heads, batch entries).

A block of the backward may hold rows beyond its segment, whose P is 0 and whose delta has to be a number.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute

from ring_cute.hopper import ptx
from ring_cute.hopper.backward_settings import EndsKind
from ring_cute.hopper.views import flat

ENDS_THREADS = 256
ROUNDS = 4


def lanes_of(head_dim: int) -> int:
    """Lanes that share a row: a power of two, 8 numbers each."""
    return 1 << max(0, (head_dim // 8 - 1).bit_length())


def rows_of(head_dim: int) -> int:
    """Rows of a CTA."""
    return ENDS_THREADS // lanes_of(head_dim) * ROUNDS


def _quads(memory: Any, offset: Any, width: Any, count: int) -> Any:
    """`count` words of 16 bytes from the given element of memory on, as Int32, addressed as one vector."""
    pointer = cute.make_ptr(Int32, memory + offset * width, cute.AddressSpace.gmem, assumed_align=16)
    return cute.make_tensor(pointer, cute.make_layout(4 * count))


class Prepare:
    """One kernel: `cute.compile(Prepare(kind), …)`; `compiling.compile_ends` knows how."""

    def __init__(self, kind: EndsKind) -> None:
        self.kind = kind
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.lanes = lanes_of(kind.head_dim)
        self.each = ENDS_THREADS // self.lanes

    @cute.jit
    def __call__(
        self,
        out: Int64,
        dout: Int64,
        lse: Int64,
        dlse: Int64,
        delta: Int64,
        scaled_lse: Int64,
        sums: Int64,
        out_b: Int64,
        out_s: Int64,
        out_h: Int64,
        do_b: Int64,
        do_s: Int64,
        do_h: Int64,
        lse_b: Int64,
        lse_h: Int64,
        dlse_b: Int64,
        dlse_h: Int64,
        dlse_s: Int64,
        length: Int32,
        num_heads: Int32,
        batch: Int32,
        stream: Any,
    ):
        """Addresses and strides in elements; out, dout (B, S, H, D), lse, dlse, delta, scaled_lse (B, H, S), sums
        (B, H, S, D)."""
        tiles = cute.ceil_div(length, self.each * ROUNDS)
        self.kernel(
            out, dout, flat(lse, Float32), flat(dlse, Float32), flat(delta, Float32), flat(scaled_lse, Float32), sums,
            out_b, out_s, out_h, do_b, do_s, do_h, lse_b, lse_h, dlse_b, dlse_h, dlse_s, length, num_heads,
        ).launch(grid=(tiles, num_heads, batch), block=(ENDS_THREADS, 1, 1), stream=stream)  # fmt: skip

    @cute.kernel
    def kernel(
        self, out: Int64, dout: Int64, lse: cute.Tensor, dlse: cute.Tensor, delta: cute.Tensor,
        scaled_lse: cute.Tensor, sums: Int64, out_b: Int64, out_s: Int64, out_h: Int64, do_b: Int64, do_s: Int64,
        do_h: Int64, lse_b: Int64, lse_h: Int64, dlse_b: Int64, dlse_h: Int64, dlse_s: Int64, length: Int32,
        num_heads: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        tile, head, entry = cute.arch.block_idx()
        part = thread & (self.lanes - 1)
        first = tile * (self.each * ROUNDS) + thread // self.lanes
        dim = self.kind.head_dim
        batch, head = Int64(entry), Int64(head)
        line = (batch * num_heads + head) * length
        a = cute.make_rmem_tensor((4, ROUNDS), Int32)
        b = cute.make_rmem_tensor((4, ROUNDS), Int32)
        row_lse = cute.make_rmem_tensor(ROUNDS, Float32)
        a.fill(0)
        b.fill(0)
        row_lse.fill(0.0)
        inside = part * 8 < dim
        for n in cutlass.range_constexpr(ROUNDS):
            row = first + n * self.each
            if row < length:
                row_lse[n] = lse[batch * lse_b + head * lse_h + row]
                if inside:
                    column = part * 8
                    x = _quads(out, batch * out_b + head * out_h + row * out_s + column, 2, 1)
                    y = _quads(dout, batch * do_b + head * do_h + row * do_s + column, 2, 1)
                    cute.autovec_copy(x, a[None, n])
                    cute.autovec_copy(y, b[None, n])
        nothing = cute.make_rmem_tensor(8, Int32)
        nothing.fill(0)
        for n in cutlass.range_constexpr(ROUNDS):
            row = first + n * self.each
            if row < length and inside:
                cute.autovec_copy(nothing, _quads(sums, (line + row) * dim + part * 8, 4, 2))
        for n in cutlass.range_constexpr(ROUNDS):
            row = first + n * self.each
            total = Float32(0.0)
            x, y = cute.recast_tensor(a[None, n], self.dtype), cute.recast_tensor(b[None, n], self.dtype)
            for e in cutlass.range_constexpr(8):
                total = ptx.fma(x[e].to(Float32), y[e].to(Float32), total)
            distance = self.lanes // 2
            while cutlass.const_expr(distance > 0):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=distance)
                distance //= 2
            if part == 0 and row < length:
                if cutlass.const_expr(self.kind.dlse):
                    total = total - dlse[batch * dlse_b + head * dlse_h + row * dlse_s]
                if not (cute.math.absf(total) < Float32.inf):
                    total = Float32(0.0)
                delta[line + row] = total
                value = row_lse[n] * ptx.LOG2_E
                if row_lse[n] == -Float32.inf:
                    value = Float32.inf
                scaled_lse[line + row] = value


class Finish:
    """One kernel: `cute.compile(Finish(kind), …)`."""

    def __init__(self, kind: EndsKind) -> None:
        self.kind = kind
        self.dtype = {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[kind.dtype]
        self.lanes = lanes_of(kind.head_dim)
        self.each = ENDS_THREADS // self.lanes

    @cute.jit
    def __call__(
        self,
        sums: Int64,
        dq: Int64,
        scale: Float32,
        dq_b: Int64,
        dq_s: Int64,
        dq_h: Int64,
        length: Int32,
        num_heads: Int32,
        batch: Int32,
        stream: Any,
    ):
        """Addresses and strides in elements; sums (B, H, S, D), dq (B, S, H, D)."""
        tiles = cute.ceil_div(length, self.each * ROUNDS)
        self.kernel(sums, dq, scale, dq_b, dq_s, dq_h, length, num_heads).launch(
            grid=(tiles, num_heads, batch), block=(ENDS_THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self, sums: Int64, dq: Int64, scale: Float32, dq_b: Int64, dq_s: Int64, dq_h: Int64, length: Int32,
        num_heads: Int32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        tile, head, entry = cute.arch.block_idx()
        part = thread & (self.lanes - 1)
        first = tile * (self.each * ROUNDS) + thread // self.lanes
        dim = self.kind.head_dim
        batch, head = Int64(entry), Int64(head)
        line = (batch * num_heads + head) * length
        x = cute.make_rmem_tensor((8, ROUNDS), Int32)
        x.fill(0)
        inside = part * 8 < dim
        for n in cutlass.range_constexpr(ROUNDS):
            row = first + n * self.each
            if row < length and inside:
                cute.autovec_copy(_quads(sums, (line + row) * dim + part * 8, 4, 2), x[None, n])
        rounded = cute.make_rmem_tensor(4, Int32)
        for n in cutlass.range_constexpr(ROUNDS):
            row = first + n * self.each
            if row < length and inside:
                numbers = cute.recast_tensor(x[None, n], Float32)
                for e in cutlass.range_constexpr(4):
                    rounded[e] = ptx.pack(numbers[2 * e] * scale, numbers[2 * e + 1] * scale, self.dtype)
                at = batch * dq_b + head * dq_h + row * dq_s + part * 8
                cute.autovec_copy(rounded, _quads(dq, at, 2, 1))
