"""Runs a kernel's PTX on the CPU: enough of sm_90a for this package's kernels, warp by warp, with numpy.

Warps take turns and give up theirs where they wait. Lanes that have parted meet again at the lowest program counter.
What is asynchronous is made as unkind as its rules allow: TMA loads arrive at once or late, by chance, TMA stores read
shared memory only when somebody waits for them, shared memory begins as NaN, and an access to global memory outside the
tensors of the call is an error. Products (wgmma) are computed where they are issued: a missing wait for them is not
found, nor is anything about speed. A round in which no warp gets any further is a deadlock, and raises.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ptx_program import Program

LANES = 32
RANK_SHIFT = 24
LOCAL = (1 << RANK_SHIFT) - 1
SHARED_BASE = 1024
SHARED_BYTES = 232 << 10
PARAMS_AT = 1 << 60
FULL = np.ones(LANES, dtype=bool)
LANE = np.arange(LANES, dtype=np.uint32)
TYPES: dict[str, Any] = {
    "b16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip


class Deadlock(RuntimeError):
    """No warp can go on."""


@dataclass
class Barrier:
    """An mbarrier."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def check(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
        assert self.pending >= 0, "more arrivals than the barrier takes"


@dataclass
class Instruction:
    kind: str  # "op", "branch", "wait", "bar", "end"
    text: str
    run: Callable[..., Any] | None = None
    guard: tuple[str, bool] | None = None
    target: int = -1
    meets: bool = False
    """All lanes of the warp take part, and wait for each other."""


class Memory:
    """The tensors of a call, by address."""

    def __init__(self, regions: list[tuple[int, np.ndarray]]) -> None:
        self.regions = regions  # (address, bytes)

    def find(self, address: int, size: int) -> tuple[np.ndarray, int]:
        for start, data in self.regions:
            if start <= address and address + size <= start + len(data):
                return data, address - start
        raise IndexError(f"{size} bytes at {address:#x} are outside every tensor of the call")

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(N, size) bytes."""
        out = np.empty((len(addresses), size), dtype=np.uint8)
        for n, address in enumerate(addresses.tolist()):
            data, at = self.find(address, size)
            out[n] = data[at : at + size]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for address, value in zip(addresses.tolist(), values, strict=True):
            data, at = self.find(address, len(value))
            data[at : at + len(value)] = value


@dataclass(frozen=True)
class TensorMap:
    """A descriptor as the hardware has it, 128 bytes, decoded."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all but the first dimension
    box: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of an element: rows of a box are 128."""
        return 128 // self.box[0]

    @classmethod
    def of(cls, raw: bytes, rank: int) -> TensorMap:
        word = struct.unpack("<32I", raw)
        strides = [(word[n] | ((word[7] >> (4 * (n - 3))) & 0xF) << 32) << 4 for n in range(3, 7)]
        boxes = [word[13] >> 24, *(word[14 + n // 4] >> (8 * (n % 4)) & 0xFF for n in range(4))]
        return cls(
            word[0] | word[1] << 32,
            tuple(word[8 + n] + 1 for n in range(rank)),
            tuple(strides[: rank - 1]),
            tuple(box + 1 for box in boxes[:rank]),
        )

    def rows(self, at: tuple[int, ...]) -> list[tuple[int, int]]:
        """(address, columns inside) of each row of a box of two dimensions; no column where the row is outside."""
        assert all(size == 1 for size in self.box[2:]), self.box
        inside = all(0 <= c < size for c, size in zip(at[2:], self.sizes[2:], strict=True))
        found = []
        for row in range(at[1], at[1] + self.box[1]):
            address = self.address + self.width * at[0] + row * self.strides[0]
            address += sum(c * stride for c, stride in zip(at[2:], self.strides[1:], strict=True))
            columns = min(self.box[0], self.sizes[0] - at[0]) if inside and 0 <= row < self.sizes[1] else 0
            found.append((address % (1 << 64), max(0, columns)))
        return found


def swizzled(address: np.ndarray) -> np.ndarray:
    """128-byte swizzle: bits 4-6 are those xor bits 7-9."""
    return address ^ ((address >> 3) & 0x70)


@dataclass
class Warp:
    number: int
    block: Block
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    stores: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])
    """Groups of TMA stores under way; the last one is not committed yet."""
    met: int = 0

    def get(self, name: str, kind: Any) -> np.ndarray:
        return self.registers[name].view(kind)

    def put(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if value.dtype != bool:
            value = value.view(np.uint32 if value.dtype.itemsize == 4 else np.uint64)
        if mask is not None and name in self.registers:
            value = np.where(mask, value, self.registers[name])
        self.registers[name] = value

    def run(self) -> Generator[bool, None, None]:
        """One step for each value: whether it got anywhere."""
        code = self.block.program.code
        groups: dict[int, np.ndarray] = {0: FULL.copy()}
        parked: dict[int, np.ndarray] = {}  # lanes that wait for the others of their warp
        while groups:
            pc = min(groups)
            active = groups.pop(pc)
            others = min(groups, default=1 << 30)
            mask = None if active.all() else active
            while True:
                if pc >= others:
                    groups[pc] = active | groups[pc] if pc in groups else active
                    break
                step = code[pc]
                if step.meets and mask is not None:
                    parked[pc] = active | parked.get(pc, False)
                    if parked[pc].all():
                        groups[pc] = parked.pop(pc)
                    break
                if step.kind == "op":
                    step.run(self, mask)  # type: ignore[misc]
                    pc += 1
                elif step.kind == "branch":
                    taken = active
                    if step.guard is not None:
                        taken = active & (self.registers[step.guard[0]] == step.guard[1])
                    if taken.all() or (taken == active).all():
                        pc = step.target
                    elif not taken.any():
                        pc += 1
                    else:
                        for where, who in ((step.target, taken), (pc + 1, active & ~taken)):
                            groups[where] = who | groups[where] if where in groups else who
                        break
                elif step.kind == "wait":
                    while not step.run(self, mask):  # type: ignore[misc]
                        yield False
                    yield True
                    pc += 1
                elif step.kind == "bar":
                    number, threads, waits = step.run(self, mask)  # type: ignore[misc]
                    generation = self.block.arrive(number, threads)
                    while waits and self.block.generations.get(number, 0) == generation:
                        yield False
                    pc += 1
                else:
                    break
        waiting = [code[pc].text for pc in parked]
        assert not parked, f"lanes of warp {self.number} wait for others that never come, at {waiting}"


class Block:
    """A CTA while it runs."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        params: list[bytes],
        number: tuple[int, int, int],
        grid: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.program, self.memory, self.params, self.number, self.grid = program, memory, params, number, grid
        self.shared = np.full(SHARED_BYTES, 0xFF, dtype=np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.arrived: dict[int, int] = {}
        self.generations: dict[int, int] = {}
        self.flying: list[tuple[int, Callable[[], None]]] = []
        self.time = 0
        self.random = random.Random(seed)
        self.cluster = [self]
        self.met = [0, 0]  # threads at the cluster's barrier, and how often all were; the first CTA's counts

    def arrive(self, number: int, threads: int) -> int:
        generation = self.generations.get(number, 0)
        self.arrived[number] = self.arrived.get(number, 0) + LANES
        if self.arrived[number] >= threads:
            self.arrived[number] = 0
            self.generations[number] = generation + 1
        return generation

    def at(self, address: int) -> tuple[Block, int]:
        """The cluster's CTA that an address is of (`mapa` marks others' with their rank), and the address there."""
        return (self.cluster[(address >> RANK_SHIFT) - 1] if address >> RANK_SHIFT else self), address & LOCAL

    # shared memory, by address
    def words(self, addresses: np.ndarray, size: int) -> np.ndarray:
        at = addresses.astype(np.int64) - SHARED_BASE
        return self.shared[at[:, None] + np.arange(size)]

    def rows16(self, start: int, row_address: np.ndarray) -> np.ndarray:
        at = swizzled(row_address) - SHARED_BASE
        low, high = self.shared[at], self.shared[at + 1]
        return low.astype(np.uint16) | high.astype(np.uint16) << 8


def numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit numbers as fp32."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def round16(x: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 to the bits of a 16-bit type, to the nearest even."""
    if dtype == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def run_cluster(blocks: list[Block], threads: int) -> None:
    """The CTAs of a cluster, all warps in turn."""
    warps = [Warp(n, block) for block in blocks for n in range(threads // LANES)]
    turns = dict(enumerate(warp.run() for warp in warps))
    first, idle = blocks[0], 0
    while turns:
        moved = False
        for number in first.random.sample(list(turns), len(turns)):
            try:
                moved |= next(turns[number])
            except StopIteration:
                del turns[number]
                moved = True
        for block in blocks:
            block.time += 1
            landed = [action for at, action in block.flying if at <= block.time]
            block.flying = [(at, action) for at, action in block.flying if at > block.time]
            for action in landed:
                action()
            moved |= bool(landed or block.flying)
        idle = 0 if moved else idle + 1
        if idle > 8:
            raise Deadlock(f"warps {sorted(turns)} wait; barriers {[block.barriers for block in blocks]}")
    for warp in warps:
        for group in warp.stores:
            for store in group:
                store()
    assert not any(block.flying for block in blocks), "a load is under way while the CTA ends"


def launch(
    program: Program,
    memory: Memory,
    params: list[bytes],
    grid: tuple[int, int, int],
    seed: int = 0,
    cluster: int = 1,
) -> None:
    """All clusters, one after the other; their CTAs are neighbours along x."""
    for z in range(grid[2]):
        for y in range(grid[1]):
            for start in range(0, grid[0], cluster):
                places = [(x, y, z) for x in range(start, start + cluster)]
                blocks = [Block(program, memory, params, place, grid, seed + place[0]) for place in places]
                for block in blocks:
                    block.cluster, block.met = blocks, blocks[0].met
                run_cluster(blocks, program.threads)
