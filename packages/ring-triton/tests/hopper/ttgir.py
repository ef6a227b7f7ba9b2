"""A Triton GPU module, as text, turned into Python functions: the part of the dialects that the Hopper kernels use.

Values: scalars are Python numbers, tensors NumPy arrays, pointers `Pointer`, shared memory views into arrays that start
as NaN, barriers `Barrier`. Layouts say nothing here. Whatever waits is a generator that yields until it may go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Scope = dict[str, Any]
Steps = Generator[Callable[[], bool], None, tuple[Any, ...]]
LOCATION = re.compile(r'\s*loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\([^()]*\))*\))*\))*\)')
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")


@dataclass
class Operation:
    """One operation: names of its results, its operands, its text and its regions."""

    results: list[str]
    name: str
    operands: list[str]
    text: str
    regions: list[Block] = field(default_factory=list)
    function: Callable[[Scope, Thread], Any] | None = None


@dataclass
class Block:
    """The only block of a region."""

    arguments: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def find(self, name: str) -> list[Operation]:
        return [operation for operation in self.operations if operation.name == name]


@dataclass(frozen=True)
class Pointer:
    """Elements of a flat array."""

    array: np.ndarray
    at: Any

    def moved(self, at: Any) -> Pointer:
        return Pointer(self.array, at)


@dataclass
class Barrier:
    """An mbarrier."""

    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def set_up(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int) -> None:
        assert self.pending >= count, "more arrivals than the barrier expects in a phase"
        self.pending -= count
        self.turn()

    def turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class NamedBarrier:
    """bar.sync and bar.arrive of one number."""

    threads: int = 0
    generation: int = 0

    def arrive(self, of: int) -> None:
        self.threads += 128
        if self.threads == of:
            self.threads, self.generation = 0, self.generation + 1


@dataclass
class Product:
    """An asynchronous product: its operand in shared memory is read as late as it may be."""

    compute: Callable[[], np.ndarray]
    value: np.ndarray | None = None


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor: boxes of `box` elements, zeros beyond `shape`; addresses wrap around at 2^64 bytes."""

    array: np.ndarray
    base: int
    shape: list[int]
    strides: list[int]
    box: list[int]
    element_bytes: int

    def load(self, corner: list[int]) -> np.ndarray:
        address, inside = self._addresses(corner)
        out = np.zeros(inside.shape, dtype=np.float32)
        out[inside] = self.array[address[inside].astype(np.int64)]
        return out.reshape(self.box[-2:])

    def store(self, corner: list[int], values: np.ndarray) -> None:
        address, inside = self._addresses(corner)
        self.array[address[inside].astype(np.int64)] = values.reshape(inside.shape)[inside]

    def _addresses(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of a box's elements, and which of them are within the bounds."""
        axes = [np.arange(c, c + b) for c, b in zip(corner, self.box, strict=True)]
        address, inside = np.array(0, dtype=object), np.array(True)
        for axis, bound, stride in zip(axes, self.shape, self.strides, strict=True):
            address = address[..., None] + axis.astype(object) * stride
            inside = inside[..., None] & (axis >= 0) & (axis < bound)
        return (address + self.base) % (2**64 // self.element_bytes), inside


@dataclass
class Cta:
    """What the threads of a CTA share beyond memory."""

    program: int
    programs: int
    copies: list[Callable[[], None]]
    """TMA copies under way, of all CTAs: whoever schedules the threads lets them arrive, in any order."""
    named: dict[int, NamedBarrier] = field(default_factory=dict)


@dataclass
class Thread:
    """One partition of a CTA."""

    cta: Cta
    products: list[Product] = field(default_factory=list)
    stores: list[Callable[[], None]] = field(default_factory=list)
    """TMA stores that have not been waited for: they read shared memory when they are, as late as they may."""
    unfenced: list[np.ndarray] = field(default_factory=list)
    """Shared memory written since the last fence, which a TMA store may not see."""

    def end(self) -> None:
        """Nothing reads shared memory once the threads are gone."""
        assert not self.stores, "a TMA store was not waited for"


def parse(text: str) -> tuple[list[str], Block]:
    """(names of the function's arguments, its body)."""
    lines = [line.strip() for line in LOCATION.sub("", text).splitlines()]
    start = next(n for n, line in enumerate(lines) if line.startswith("tt.func"))
    block, _ = _parse_block(lines, start + 1)
    return declared(lines[start]), block


def declared(text: str) -> list[str]:
    return re.findall(r"(%[\w$.-]+):", text)


def _parse_block(lines: list[str], n: int) -> tuple[Block, int]:
    """The block from line n on, and the line that closes it."""
    block = Block()
    while not lines[n].startswith("}"):
        line = lines[n]
        n += 1
        if not line or line.startswith("//"):
            continue
        if line.startswith("^"):
            block.arguments = declared(line)
            continue
        operation = _operation(line)
        if line.endswith("{"):
            while True:
                region, n = _parse_block(lines, n)
                operation.regions.append(region)
                n += 1
                if not lines[n - 1].endswith("{"):
                    break
        operation.function = None if operation.name in CONTROL else _function(operation)
        block.operations.append(operation)
    return block, n


def _operation(line: str) -> Operation:
    left, found, right = line.partition(" = ")
    if not found or not left.startswith("%"):
        left, right = "", line
    results = []
    for declared in left.split(", ") if left else []:
        name, _, count = declared.partition(":")
        results += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    name = re.match(r'"?([\w.]+)', right)
    assert name, line
    head = re.split(r" : | \{| <\{", right, maxsplit=1)[0]
    if name[1] == "tt.elementwise_inline_asm":
        head = right[right.rindex("}") :].split(" : ")[0]
    return Operation(results, name[1], NAME.findall(head), right)


CONTROL = {"scf.for", "scf.while", "scf.if", "scf.yield", "scf.condition", "ttg.warp_specialize", "default"} | {
    "ttg.warp_yield", "ttg.warp_return", "tt.return", "tt.reduce.return", "ttng.wait_barrier",
} | {f"partition{n}" for n in range(8)}  # fmt: skip


def run(block: Block, scope: Scope, thread: Thread) -> Steps:
    """Runs a block; returns the operands of its last operation."""
    for operation in block.operations:
        if operation.function is not None:
            value = operation.function(scope, thread)
            if callable(value):
                yield value
            elif operation.results:
                scope[operation.results[0]] = value
            continue
        values = [scope[name] for name in operation.operands if name in scope]
        match operation.name:
            case "ttng.wait_barrier":
                barrier, parity = values[0], int(values[1])
                yield lambda barrier=barrier, parity=parity: barrier.phase != parity
                continue
            case "scf.if":
                branch = operation.regions[0] if values[0] else (operation.regions[1:] or [Block()])[0]
                got = yield from run(branch, scope, thread)
            case "scf.for":
                got = yield from _for(operation, scope, thread)
            case "scf.while":
                got = yield from _while(operation, scope, thread)
            case "ttg.warp_specialize" | "default" | "partition0" | "partition1" | "partition2":
                continue
            case _:
                return tuple(values)
        scope.update(zip(operation.results, got, strict=bool(operation.results)))
    return ()


def _for(operation: Operation, scope: Scope, thread: Thread) -> Steps:
    head = re.match(r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)(?: iter_args\((.*?)\) ->)?", operation.text)
    assert head, operation.text
    carried = re.findall(r"(%\S+) = (%[\w$.#-]+)", head[5] or "")
    values = tuple(scope[initial] for _, initial in carried)
    for i in range(scope[head[2]], scope[head[3]], scope[head[4]]):
        scope[head[1]] = i
        scope.update(zip((name for name, _ in carried), values, strict=True))
        values = yield from run(operation.regions[0], scope, thread)
    return values


def _while(operation: Operation, scope: Scope, thread: Thread) -> Steps:
    carried = re.findall(r"(%\S+) = (%[\w$.#-]+)", operation.text.split(") : ")[0])
    values = tuple(scope[initial] for _, initial in carried)
    before, after = operation.regions
    while True:
        scope.update(zip((name for name, _ in carried), values, strict=True))
        go_on, *values = yield from run(before, scope, thread)
        if not go_on:
            return tuple(values)
        scope.update(zip(after.arguments, values, strict=True))
        values = yield from run(after, scope, thread)


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


def _function(operation: Operation) -> Callable[[Scope, Thread], Any]:
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
