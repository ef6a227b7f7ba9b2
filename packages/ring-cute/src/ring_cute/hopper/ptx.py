"""Instructions that the DSL has no name for, or wraps in more than is wanted here."""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def _asm(result: Any, operands: list[Any], code: str, constraints: str, *, effects: bool) -> Any:
    return llvm.inline_asm(
        result,
        operands,
        code,
        constraints,
        has_side_effects=effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@dsl_user_op
def wait(barrier: Any, phase: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Until the barrier's phase of that parity is over: the loop of PTX's documentation, nothing unrolled."""
    _asm(
        None,
        [barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip), Int32(phase).ir_value(loc=loc, ip=ip)],
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n@!done bra again;\n}",
        "r,r,~{memory}",
        effects=True,
    )


@dsl_user_op
def arrive(barrier: Any, who: Any, *, loc: Any = None, ip: Any = None) -> None:
    """One arrival by the threads for which `who` is not zero: a predicate, not a branch."""
    _asm(
        None,
        [barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip), Int32(who).ir_value(loc=loc, ip=ip)],
        "{\n.reg .pred me;\nsetp.ne.s32 me, $1, 0;\n@me mbarrier.arrive.shared::cta.b64 _, [$0];\n}",
        "r,r,~{memory}",
        effects=True,
    )


@dsl_user_op
def arrive_at(barrier: Any, rank: Any, who: Any, *, loc: Any = None, ip: Any = None) -> None:
    """One arrival, by the threads for which `who` is not zero, at the barrier that the cluster's CTA `rank` has where
    this one has `barrier`."""
    _asm(
        None,
        [
            barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            *(Int32(x).ir_value(loc=loc, ip=ip) for x in (rank, who)),
        ],
        "{\n.reg .pred me;\n.reg .b32 there;\nsetp.ne.s32 me, $2, 0;\nmapa.shared::cluster.u32 there, $0, $1;\n"
        "@me mbarrier.arrive.shared::cluster.b64 _, [there];\n}",
        "r,r,r,~{memory}",
        effects=True,
    )


@dsl_user_op
def send(number: Any, to: Any, barrier: Any, rank: Any, *, loc: Any = None, ip: Any = None) -> None:
    """A word to where the cluster's CTA `rank` has `to`; it counts as four bytes at that CTA's barrier."""
    _asm(
        None,
        [
            to.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            *(Int32(x).ir_value(loc=loc, ip=ip) for x in (rank, number)),
        ],
        "{\n.reg .b32 there, bar;\nmapa.shared::cluster.u32 there, $0, $2;\nmapa.shared::cluster.u32 bar, $1, $2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], $3, [bar];\n}",
        "r,r,r,r,~{memory}",
        effects=True,
    )


def arrive_everywhere(barrier: Any, lane: Any, cluster: int) -> None:
    """A warp's arrival at a barrier, in each CTA of the cluster."""
    if cluster == 1:
        arrive(barrier, lane == 0)
    else:
        arrive_at(barrier, lane & (cluster - 1), lane < cluster)


def meet(cluster: int) -> None:
    """All threads of the CTA, or of its cluster."""
    if cluster == 1:
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


@dsl_user_op
def arrive_expecting(barrier: Any, size: Any, who: Any, *, loc: Any = None, ip: Any = None) -> None:
    """One arrival by the threads for which `who` is not zero, and so many bytes that the phase waits for."""
    _asm(
        None,
        [
            barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            *(Int32(x).ir_value(loc=loc, ip=ip) for x in (size, who)),
        ],
        "{\n.reg .pred me;\nsetp.ne.s32 me, $2, 0;\n@me mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;\n}",
        "r,r,r,~{memory}",
        effects=True,
    )


@dsl_user_op
def send_bytes(
    source: Any, to: Any, size: Any, barrier: Any, rank: Any, who: Any, *, loc: Any = None, ip: Any = None
) -> None:
    """So many bytes of shared memory to where the cluster's CTA `rank` has the address `to`, by the async proxy, for
    the thread for which `who` is not zero; they count at that CTA's barrier."""
    _asm(
        None,
        [
            *(Int32(x).ir_value(loc=loc, ip=ip) for x in (source, to)),
            barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            *(Int32(x).ir_value(loc=loc, ip=ip) for x in (rank, size, who)),
        ],
        "{\n.reg .pred me;\n.reg .b32 there, bar;\nsetp.ne.s32 me, $5, 0;\n"
        "mapa.shared::cluster.u32 there, $1, $3;\nmapa.shared::cluster.u32 bar, $2, $3;\n"
        "@me cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [$0], $4, [bar];\n}",
        "r,r,r,r,r,r,~{memory}",
        effects=True,
    )


@dsl_user_op
def exp2(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """2^x, denormals flushed."""
    value = Float32(x).ir_value(loc=loc, ip=ip)
    return Float32(_asm(T.f32(), [value], "ex2.approx.ftz.f32 $0, $1;", "=f,f", effects=False))


@dsl_user_op
def log2(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    value = Float32(x).ir_value(loc=loc, ip=ip)
    return Float32(_asm(T.f32(), [value], "lg2.approx.ftz.f32 $0, $1;", "=f,f", effects=False))


@dsl_user_op
def rcp(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """1 / x, denormals flushed."""
    value = Float32(x).ir_value(loc=loc, ip=ip)
    return Float32(_asm(T.f32(), [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f", effects=False))


@dsl_user_op
def magnitude(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """|x|."""
    value = Float32(x).ir_value(loc=loc, ip=ip)
    return Float32(_asm(T.f32(), [value], "abs.ftz.f32 $0, $1;", "=f,f", effects=False))


@dsl_user_op
def pack(low: Any, high: Any, dtype: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """Two fp32 numbers, rounded, in one register."""
    kind = {cutlass.BFloat16: "bf16x2", cutlass.Float16: "f16x2"}[dtype]
    values = [Float32(high).ir_value(loc=loc, ip=ip), Float32(low).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), values, f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f", effects=False))


@dsl_user_op
def load_acquire_sys(address: Any, *, loc: Any = None, ip: Any = None) -> Uint32:
    """A word that copy engines or other devices write."""
    where = address.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)
    return Uint32(_asm(T.i32(), [where], "ld.acquire.sys.global.u32 $0, [$1];", "=r,l,~{memory}", effects=True))


@dsl_user_op
def load_acquire_gpu(address: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """A word that other CTAs write."""
    where = address.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)
    return Int32(_asm(T.i32(), [where], "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l,~{memory}", effects=True))


@dsl_user_op
def add_release_gpu(address: Any, x: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Adds to a counter that other CTAs read, after all that came before is visible to them."""
    values = [address.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip), Int32(x).ir_value(loc=loc, ip=ip)]
    _asm(None, values, "red.release.gpu.global.add.u32 [$0], $1;", "l,r,~{memory}", effects=True)


@dsl_user_op
def fence_proxy_async(*, loc: Any = None, ip: Any = None) -> None:
    """What the generic proxy has seen so far is visible to the async one (TMA, wgmma)."""
    _asm(None, [], "fence.proxy.async;", "~{memory}", effects=True)


@dsl_user_op
def bits(start: Any, count: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """A word whose bits start, …, start + count - 1 are set, of those there are."""
    values = [Int32(x).ir_value(loc=loc, ip=ip) for x in (start, count)]
    return Int32(_asm(T.i32(), values, "bmsk.clamp.b32 $0, $1, $2;", "=r,r,r", effects=False))


@dsl_user_op
def quad_max(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """The largest of the four neighbouring lanes' numbers."""
    for distance in (1, 2):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=distance, loc=loc, ip=ip), loc=loc, ip=ip)
    return Float32(x)


@dsl_user_op
def quad_sum(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """The sum of the four neighbouring lanes' numbers."""
    for distance in (1, 2):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=distance, loc=loc, ip=ip)
    return Float32(x)


@dsl_user_op
def fma(a: Any, b: Any, c: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """a b + c, rounded once."""
    values = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(_asm(T.f32(), values, "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", effects=False))


@dsl_user_op
def shared_address(pointer: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """Of a pointer to shared memory."""
    return Int32(pointer.toint(loc=loc, ip=ip))


@dsl_user_op
def store_shared(address: Any, x: Any, *, loc: Any = None, ip: Any = None) -> None:
    """One fp32 number to shared memory."""
    values = [Int32(address).ir_value(loc=loc, ip=ip), Float32(x).ir_value(loc=loc, ip=ip)]
    _asm(None, values, "st.shared.f32 [$0], $1;", "r,f,~{memory}", effects=True)


@dsl_user_op
def store_matrices_turned(address: Any, *words: Any, loc: Any = None, ip: Any = None) -> None:
    """Four 8 x 8 matrices of 16-bit numbers to shared memory, transposed; a lane names a row of one of them."""
    values = [Int32(x).ir_value(loc=loc, ip=ip) for x in (address, *words)]
    code = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    _asm(None, values, code, "r,r,r,r,r,~{memory}", effects=True)


@dsl_user_op
def add_pair(address: Any, x: Any, y: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Two fp32 numbers, added to global memory that others may add to at the same time."""
    where = address.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)
    values = [where, Float32(x).ir_value(loc=loc, ip=ip), Float32(y).ir_value(loc=loc, ip=ip)]
    _asm(None, values, "red.relaxed.gpu.global.add.v2.f32 [$0], {$1, $2};", "l,f,f,~{memory}", effects=True)


@dsl_user_op
def add_release_sys(address: Any, x: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Adds to a counter that other devices read, after all that came before is visible to them."""
    values = [address.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip), Int32(x).ir_value(loc=loc, ip=ip)]
    _asm(None, values, "red.release.sys.global.add.u32 [$0], $1;", "l,r,~{memory}", effects=True)


@dsl_user_op
def opaque(x: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """x, but the compiler does not know: what depends on it is worked out where it is needed, not kept in registers."""
    return Int32(_asm(T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], "mov.b32 $0, $1;", "=r,r", effects=True))


@dsl_user_op
def late(x: Any, *, loc: Any = None, ip: Any = None) -> Float32:
    """x, but nothing that is made of it comes before this point: what it waits for is waited for here."""
    return Float32(_asm(T.f32(), [Float32(x).ir_value(loc=loc, ip=ip)], "mov.b32 $0, $1;", "=f,f", effects=True))
