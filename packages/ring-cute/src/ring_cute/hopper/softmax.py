"""A consumer's arithmetic: products, mask, online softmax, rounding; all on registers."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from ring_cute.hopper import ptx


@cute.jit
def multiply(product, a, b, c, add: cutlass.Constexpr, depth: cutlass.Constexpr = None):
    """c = a b, or c += a b: issued, one group. depth: of the numbers that are multiplied and summed only so many; the
    others are zeros, where tiles are made for a larger head dim."""
    whole = 16 * cute.size(b, mode=[2])
    multiply_kept(product, None, None, a, b, c, add, whole if cutlass.const_expr(depth is None) else depth)


def sums_product(dtype, columns: int):
    """The product of 64 rows in registers by so many columns: nothing is computed of those of a tile's padding."""
    return hopper_helpers.make_trivial_tiled_mma(
        dtype, dtype, OperandMajorMode.K, OperandMajorMode.MN, Float32, (1, 1, 1), (64, columns),
        warpgroup.OperandSource.RMEM,
    )  # fmt: skip


def kept_operand(dtype, block: int, columns: int):
    """The product of 64 rows by a block, whose first operand is in registers, and registers for so many columns of it;
    None and None for no column."""
    if not columns:
        return None, None
    by_kept = hopper_helpers.make_trivial_tiled_mma(
        dtype, dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (64, block),
        warpgroup.OperandSource.RMEM,
    )  # fmt: skip
    kept = cute.make_rmem_tensor(by_kept.partition_shape_A((64, columns)), dtype)
    return by_kept, kept


@cute.jit
def keep(by_kept, kept, rows, thread):
    """The first columns of a consumer's 64 rows (64, D), in shared memory, to registers."""
    load = cute.make_tiled_copy_A(
        cute.make_copy_atom(cute.nvgpu.warp.LdMatrix8x8x16bOp(False, 4), kept.element_type), by_kept
    )
    own = load.get_slice(thread)
    sources, targets = own.partition_S(rows), own.retile(kept)
    for n in cutlass.range_constexpr(cute.size(kept, mode=[2])):
        cute.copy(load, sources[None, None, n], targets[None, None, n])


@cute.jit
def multiply_kept(product, by_kept, kept, a, b, c, add: cutlass.Constexpr, depth: cutlass.Constexpr):
    """c = a b, or c += a b, over so many numbers, of which the first factors of a are in registers, if any: issued,
    one group."""
    columns = 0 if cutlass.const_expr(kept is None) else min(cute.size(kept, mode=[2]), -(-depth // 16))
    atom = cute.make_mma_atom(product.op)  # an own one: what is set on an argument would escape from loops
    warpgroup.fence()
    if cutlass.const_expr(columns > 0):
        first = cute.make_mma_atom(by_kept.op)
        for n in cutlass.range_constexpr(columns):
            first.set(warpgroup.Field.ACCUMULATE, add or n > 0)
            cute.gemm(first, c, kept[None, None, n], b[None, None, n], c)
    for n in cutlass.range_constexpr(columns, -(-depth // 16)):
        atom.set(warpgroup.Field.ACCUMULATE, add or n > 0)
        cute.gemm(atom, c, a[None, None, n], b[None, None, n], c)
    warpgroup.commit_group()


@cute.jit
def mask(s, row, column, j, k_len, lower, upper):
    """-inf where a row does not see key j + column.

    A thread's elements of a row are numbered from left to right, two of each eight keys; those that it sees are a run
    of bits of a word, of which one instruction makes seven predicates (R2P).
    """
    for half in cutlass.range_constexpr(2):
        own = row + 8 * half
        first = _elements_below(own + lower - j - column)
        last = _elements_below(cute.math.min(own + upper + 1, k_len) - j - column)
        for word in cutlass.range_constexpr(-(-cute.size(s) // 64)):
            start = cute.math.max(first - 32 * word, 0)
            seen = ptx.bits(start, cute.math.max(last - 32 * word - start, 0))
            for e in cutlass.range_constexpr(32):
                n = 32 * word + e
                if cutlass.const_expr(2 * n < cute.size(s)):
                    at = 4 * (n // 2) + 2 * half + n % 2
                    s[at] = cutlass.select_((seen & (1 << e)) != 0, s[at], -Float32.inf)


@cute.jit
def _elements_below(keys):
    """How many of a thread's elements of a row are among that many keys from its own first one."""
    keys = cute.math.max(keys, 0)
    return 2 * (keys >> 3) + cute.math.min(keys & 7, 2)


LAZY = 8.0
"""log2 of the factor by which a row's maximum may grow before its sums are multiplied, where `lazy`."""


@cute.jit
def softmax(s, m, norm, decay, scale, masked: cutlass.Constexpr, lazy: cutlass.Constexpr):
    """One step of the online softmax in base 2: s becomes probabilities, `decay` the factor for earlier sums, which is
    1 for the whole warp where it returns false."""
    new = []
    for half in cutlass.range_constexpr(2):
        top = [s[2 * half], s[2 * half + 1]]
        for e in cutlass.range_constexpr(4, cute.size(s), 4):
            for c in cutlass.range_constexpr(2):
                top[c] = cute.arch.fmax(top[c], s[e + 2 * half + c])
        new.append(cute.arch.fmax(m[half], ptx.quad_max(cute.arch.fmax(top[0], top[1])) * scale))
    grown = cutlass.Boolean(True)
    if cutlass.const_expr(lazy):
        grown = cute.arch.vote_any_sync((new[0] > m[0] + LAZY) | (new[1] > m[1] + LAZY))
        new = [cutlass.select_(grown, new[half], m[half]) for half in range(2)]
    for half in cutlass.range_constexpr(2):
        base = new[half]
        if cutlass.const_expr(masked):
            base = cutlass.select_(base == -Float32.inf, Float32(0.0), base)  # a row that has seen nothing yet
        decay[half] = ptx.exp2(m[half] - base)
        m[half] = new[half]
        total = [norm[half] * decay[half], Float32(0.0)]
        for e in cutlass.range_constexpr(0, cute.size(s), 4):
            for c in cutlass.range_constexpr(2):
                x = ptx.exp2(ptx.fma(s[e + 2 * half + c], scale, -base))
                s[e + 2 * half + c] = x
                total[c] = total[c] + x
        norm[half] = total[0] + total[1]
    return grown


@cute.jit
def rescale(o, factor):
    """Each of a thread's two rows of sums times its factor."""
    for e in cutlass.range_constexpr(0, cute.size(o), 4):
        for c in cutlass.range_constexpr(4):
            o[e + c] = o[e + c] * factor[c // 2]


@cute.jit
def to_operand(s, p):
    """fp32 to the inputs' dtype, two numbers a register."""
    words, count = cute.recast_tensor(p, Int32), cute.size(s) // 2
    for e in cutlass.range_constexpr(0, count, 4):
        for c in cutlass.range_constexpr(e, min(e + 4, count)):
            words[c] = ptx.pack(s[2 * c], s[2 * c + 1], p.element_type)


@cute.jit
def turn(words):
    """Of each four words of four neighbouring lanes, as a 4 x 4 matrix, the transpose: lane c of a quad then has word c
    of each."""
    lane = cute.arch.lane_idx()
    for distance in cutlass.range_constexpr(1, 3):
        odd = (lane & distance) != 0
        for n in cutlass.range_constexpr(cute.size(words)):
            if cutlass.const_expr(n & distance == 0):
                here, there = words[n], words[n + distance]
                got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, here, there), offset=distance)
                words[n] = cutlass.select_(odd, got, here)
                words[n + distance] = cutlass.select_(odd, there, got)
