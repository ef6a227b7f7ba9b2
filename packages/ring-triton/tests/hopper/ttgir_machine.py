"""What the interpreter of Triton GPU modules (`ttgir`) works on: operations, and the machine that they change.

Values: scalars are Python numbers, tensors NumPy arrays, pointers `Pointer`, shared memory views into arrays that start
as NaN, barriers `Barrier`. Layouts say nothing here. Whatever waits is a generator that yields until it may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Scope = dict[str, Any]
Steps = Generator[Callable[[], bool], None, tuple[Any, ...]]


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
