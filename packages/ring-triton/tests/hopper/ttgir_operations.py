"""What each operation of a Triton GPU module does, those that control others aside."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ttgir_machine import Barrier, Descriptor, NamedBarrier, Operation, Pointer, Product, Scope, Thread


def _shape(text: str) -> tuple[int, ...]:
    """Of the last tensor or memdesc type in text."""
    dims = re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", text)
    return tuple(int(d) for d in dims[-1][:-1].split("x")) if dims else ()


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (np.abs(a) // np.abs(b)) * np.sign(a) * np.sign(b)
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _unsigned(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: compare(a & 0xFFFFFFFF, b & 0xFFFFFFFF)


SIGNED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
COMPARE = (
    {"eq": SIGNED["eq"], "ne": SIGNED["ne"]}
    | {f"s{name}": f for name, f in SIGNED.items()}
    | {f"o{name}": f for name, f in SIGNED.items()}
    | {"une": SIGNED["ne"]}
    | {f"u{name}": _unsigned(f) for name, f in SIGNED.items() if name[0] in "lg"}
)


def _select(c: Any, a: Any, b: Any) -> Any:
    return np.where(c, a, b) if isinstance(c, np.ndarray) else (a if c else b)


def _of_pointer(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: x.moved(f(x.at)) if isinstance(x, Pointer) else f(x)


def _same(x: Any) -> Any:
    return x


PURE: dict[str, Callable[..., Any]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": _divide,
    "arith.remsi": lambda a, b: a - _divide(a, b) * b,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.addf": lambda a, b: a + b,
    "arith.subf": lambda a, b: a - b,
    "arith.mulf": lambda a, b: a * b,
    "arith.divf": lambda a, b: a / b,
    "arith.maxnumf": np.fmax,
    "arith.select": _select,
    "math.exp2": np.exp2,
    "math.log2": np.log2,
    "tt.addptr": lambda p, offset: p.moved(p.at + offset),
    "ttg.memdesc_trans": lambda x: x.T,
    "ttg.local_load": np.array,
} | dict.fromkeys(
    ("arith.extsi", "arith.extui", "arith.truncf", "arith.extf", "arith.bitcast", "tt.bitcast", "ttg.convert_layout"),
    _same,
)


def function_of(operation: Operation) -> Callable[[Scope, Thread], Any]:
    """What an operation without regions of its own (but tt.reduce) does."""
    names, text = operation.operands, operation.text
    if operation.name in PURE:
        f = PURE[operation.name]
        if len(names) == 1:
            return lambda scope, _: f(scope[names[0]])
        if len(names) == 2:
            return lambda scope, _: f(scope[names[0]], scope[names[1]])
        return lambda scope, _: f(*(scope[name] for name in names))
    make = OTHERS.get(operation.name)
    if make is None:
        raise NotImplementedError(text)
    g = make(operation)
    return lambda scope, thread: g(thread, *(scope[name] for name in names))


def _constant(operation: Operation) -> Callable[..., Any]:
    found = re.match(r"arith\.constant (?:dense<)?([^ >]+)>? ?: ?(.*)|arith\.constant (true|false)", operation.text)
    assert found, operation.text
    if found[3]:
        value: Any = found[3] == "true"
    elif found[1] in ("true", "false"):
        value = found[1] == "true"
    elif found[1].startswith("0x") and "f32" in found[2]:
        value = np.array([int(found[1], 16)], dtype=np.uint32).view(np.float32)[0]
    else:
        value = np.float32(found[1]) if "f32" in found[2] else int(found[1])
    shape = _shape(found[2] or "")
    whole = np.full(shape, value) if shape else value
    return lambda _: whole


def _compare(operation: Operation) -> Callable[..., Any]:
    f = COMPARE[operation.text.split()[1].rstrip(",")]
    return lambda _, a, b: f(a, b)


def _broadcast(operation: Operation) -> Callable[..., Any]:
    shape = _shape(operation.text.split("->")[-1])
    f = _of_pointer(lambda x: np.broadcast_to(x, shape))
    return lambda _, x: f(x)


def _expand(operation: Operation) -> Callable[..., Any]:
    axis = re.search(r"axis = (\d+)", operation.text)
    assert axis
    f = _of_pointer(lambda x: np.expand_dims(x, int(axis[1])))
    return lambda _, x: f(x)


def _range(operation: Operation) -> Callable[..., Any]:
    end = re.search(r"end = (\d+)", operation.text)
    assert end
    return lambda _: np.arange(int(end[1]))


def _reduce(operation: Operation) -> Callable[..., Any]:
    axis = re.search(r"axis = (\d+)", operation.text)
    assert axis
    by = {"arith.addf": np.add, "arith.addi": np.add, "arith.maxnumf": np.fmax, "arith.maxsi": np.maximum}
    ufunc = by[operation.regions[0].operations[0].name]
    return lambda _, x: ufunc.reduce(x, axis=int(axis[1]))


def _load(_: Thread, p: Pointer, mask: Any = None, other: Any = 0) -> Any:
    if mask is None:
        return p.array[p.at] if isinstance(p.at, np.ndarray) else p.array[p.at].item()
    at, mask = np.broadcast_arrays(p.at, mask)
    out = np.array(np.broadcast_to(other, at.shape), dtype=p.array.dtype)
    out[mask] = p.array[at[mask]]
    return out


def _store(_: Thread, p: Pointer, value: Any, mask: Any = True) -> None:
    at, value, mask = np.broadcast_arrays(p.at, value, mask)
    assert len(np.unique(at[mask])) == mask.sum(), "elements stored twice in one store"
    p.array[at[mask]] = value[mask]


def _atomic(operation: Operation) -> Callable[..., Any]:
    adds = "atomic_rmw add" in operation.text

    def update(_: Thread, p: Pointer, value: int, __: Any) -> int:
        before = int(p.array[p.at])
        p.array[p.at] = before + value if adds else value
        return before

    return update


def _allocate(operation: Operation) -> Callable[..., Any]:
    shape = _shape(operation.text)
    if "xi64" in operation.text:
        return lambda _: [Barrier() for _ in range(shape[0])]
    kind = np.int32 if "xi32" in operation.text else np.float32
    return lambda _: np.full(shape, -1 if kind is np.int32 else np.nan, dtype=kind)


def _copy(thread: Thread, value: np.ndarray, view: np.ndarray) -> None:
    view[...] = value
    thread.unfenced.append(view)


def _fence(thread: Thread) -> None:
    thread.unfenced.clear()


def _tma_store(thread: Thread, descriptor: Descriptor, *rest: Any) -> None:
    *corner, view = rest
    assert not any(np.may_share_memory(view, x) for x in thread.unfenced), "a TMA store without a fence before it"
    thread.stores.append(lambda: descriptor.store(corner, view))


def _wait_stores(operation: Operation) -> Callable[..., Any]:
    pending = re.search(r"pendings = (\d+)", operation.text)
    assert pending

    def wait(thread: Thread) -> None:
        while len(thread.stores) > int(pending[1]):
            thread.stores.pop(0)()

    return wait


def _count(operation: Operation) -> Callable[..., Any]:
    """init_barrier, arrive_barrier, barrier_expect: a barrier and a number."""
    number = re.search(r"%[\w$.-]+, (\d+)", operation.text)
    assert number, operation.text
    value = int(number[1])

    def expect(barrier: Barrier) -> None:
        barrier.bytes += value
        barrier.arrive(1)

    does = {
        "ttng.init_barrier": lambda barrier: barrier.set_up(value),
        "ttng.arrive_barrier": lambda barrier: barrier.arrive(value),
        "ttng.barrier_expect": expect,
    }[operation.name]
    return lambda _, barrier, *__: does(barrier)


def _tma(thread: Thread, descriptor: Descriptor, *rest: Any) -> None:
    *corner, view, barrier, _ = rest

    def arrive() -> None:
        view[...] = descriptor.load(corner)
        barrier.bytes -= view.size * descriptor.element_bytes
        assert barrier.bytes >= 0, "more bytes than were announced"
        barrier.turn()

    thread.cta.copies.append(arrive)


def _dot(thread: Thread, a: np.ndarray, b: np.ndarray, c: np.ndarray, use_c: bool) -> Product:
    product = Product(lambda: a @ b + c if use_c else a @ b)
    thread.products.append(product)
    return product


def _wait_products(operation: Operation) -> Callable[..., Any]:
    pending = re.search(r"pendings = (\d+)", operation.text)
    assert pending
    assert len(operation.operands) == 1, operation.text

    def wait(thread: Thread, product: Product) -> np.ndarray:
        while len(thread.products) > int(pending[1]):
            first = thread.products.pop(0)
            first.value = first.compute()
        assert product.value is not None, "a product is used before it is waited for"
        return product.value

    return wait


def _assembly(operation: Operation) -> Callable[..., Any]:
    text = operation.text

    def execute(thread: Thread, *operands: Any) -> Any:
        named = re.search(r"bar\.(sync|arrive) (\d+), (\d+)", text)
        if named:
            barrier = thread.cta.named.setdefault(int(named[2]), NamedBarrier())
            generation = barrier.generation
            barrier.arrive(int(named[3]))
            return (lambda: barrier.generation > generation) if named[1] == "sync" else 0
        if "ld.acquire" in text:
            return _load(thread, *operands)
        assert "fence.proxy.async" in text, text
        return 0

    return execute


OTHERS: dict[str, Callable[[Operation], Callable[..., Any]]] = {
    "arith.constant": _constant,
    "arith.cmpi": _compare,
    "arith.cmpf": _compare,
    "tt.splat": _broadcast,
    "tt.broadcast": _broadcast,
    "tt.expand_dims": _expand,
    "tt.make_range": _range,
    "tt.reduce": _reduce,
    "tt.load": lambda _: _load,
    "tt.store": lambda _: _store,
    "tt.atomic_rmw": _atomic,
    "tt.elementwise_inline_asm": _assembly,
    "tt.get_program_id": lambda _: lambda thread: thread.cta.program,
    "tt.get_num_programs": lambda _: lambda thread: thread.cta.programs,
    "ttg.local_alloc": _allocate,
    "ttg.local_store": lambda _: _copy,
    "ttg.memdesc_index": lambda _: lambda _, x, i: x[i],
    "ttng.init_barrier": _count,
    "ttng.arrive_barrier": _count,
    "ttng.barrier_expect": _count,
    "ttng.async_tma_copy_global_to_local": lambda _: _tma,
    "ttng.async_tma_copy_local_to_global": lambda _: _tma_store,
    "ttng.async_tma_store_wait": _wait_stores,
    "ttng.fence_async_shared": lambda _: _fence,
    "ttng.warp_group_dot": lambda _: _dot,
    "ttng.warp_group_dot_wait": _wait_products,
}
