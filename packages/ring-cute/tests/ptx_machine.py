"""Runs a kernel's PTX on the CPU: enough of sm_90a for this package's kernels, warp by warp, with numpy.

Warps take turns and give up theirs where they wait. Lanes that have parted meet again at the lowest program counter.
What is asynchronous is made as unkind as its rules allow: TMA loads arrive at once or late, by chance, TMA stores read
shared memory only when somebody waits for them, shared memory begins as NaN, and an access to global memory outside the
tensors of the call is an error. Products (wgmma) are computed where they are issued: a missing wait for them is not
found, nor is anything about speed. A round in which no warp gets any further is a deadlock, and raises.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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


def split_operands(text: str) -> list[str]:
    """At commas outside brackets."""
    found, depth = [""], 0
    for letter in text.strip():
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [operand.strip() for operand in found if operand.strip()]


class Program:
    """A kernel's PTX, read once."""

    def __init__(self, ptx: str) -> None:
        head, body = ptx.split(".reqntid", 1)
        self.threads = int(body.split(",")[0])
        sizes = re.findall(r"\.param\s+(?:\.align \d+ )?\.(\w+) \w+_param_\d+(?:\[(\d+)\])?", head)
        self.param_sizes = [int(n) if n else {"f32": 4, "u32": 4, "u64": 8, "f64": 8}[t] for t, n in sizes]
        self.code: list[Instruction] = []
        labels: dict[str, int] = {}
        jumps: list[tuple[Instruction, str]] = []
        scope = 0
        for raw in body[body.index("{") + 1 :].splitlines():
            line = re.sub(r"\w+_param_(\d+)\b", r"PARAM\1", raw.split("//")[0].strip())
            scope += line == "{"
            if re.fullmatch(r"[\w$]+:", line):
                labels[line[:-1] if line[0] == "$" else f"{line[:-1]}/{scope}"] = len(self.code)
                continue
            if not line or line[0] in ".{}":
                continue
            made, label = self.parse(line.rstrip(";"))
            if label:
                jumps.append((made, label if label[0] == "$" else f"{label}/{scope}"))
            if made.kind != "skip":
                self.code.append(made)
        for made, label in jumps:
            made.target = labels[label]
        self.code.append(Instruction("end", "ret"))

    def parse(self, line: str) -> tuple[Instruction, str]:
        guard = None
        if found := re.match(r"@(!?)(%?\w+)\s+(.*)", line):
            guard, line = (found[2], not found[1]), found[3]
        name, _, rest = line.partition(" ")
        if "\t" in name:
            name, _, more = line.partition("\t")
            name, rest = name.strip(), more
        operands = split_operands(rest)
        if name.startswith("bar.warp"):
            return Instruction("op", line, lambda w, mask: None, guard, -1, True), ""
        operation, *kinds = name.split(".")
        if operation == "bra":
            return Instruction("branch", line, None, guard, -1), operands[0]
        if operation == "ret":
            return Instruction("end", line), ""
        if name.startswith(("prefetch", "setmaxnreg", "fence", "wgmma.fence", "wgmma.commit", "wgmma.wait")):
            return Instruction("skip", line), ""
        builder = getattr(self, "op_" + operation, None)
        assert builder is not None, f"the machine does not know {line}"
        run = builder(name, kinds, operands)
        kind = "op"
        if name.startswith(("mbarrier.try_wait", "barrier.cluster.wait")):
            kind = "wait"
        if operation in ("bar", "barrier") and kinds[0] != "cluster":
            kind = "bar"
        if guard is not None and kind == "op":
            run = self.guarded(run, guard)
        return Instruction(kind, line, run, guard, -1, operation in ("elect", "shfl")), ""

    @staticmethod
    def guarded(run: Callable[..., Any], guard: tuple[str, bool]) -> Callable[..., Any]:
        def only(w: Warp, mask: np.ndarray | None) -> None:
            chosen = w.registers[guard[0]] == guard[1]
            chosen = chosen if mask is None else chosen & mask
            if chosen.any():
                run(w, chosen)

        return only

    # operands
    @staticmethod
    def source(text: str, kind: Any) -> Callable[[Warp], np.ndarray]:
        if text.startswith("PARAM"):
            value = np.full(LANES, PARAMS_AT + 4096 * int(text[5:]), dtype=np.uint64)
            return lambda w: value
        if text.startswith("__dynamic"):
            value = np.full(LANES, SHARED_BASE, dtype=np.uint32)
            return lambda w: value
        if text == "%tid.x":
            return lambda w: LANE + np.uint32(LANES * w.number)
        if text == "%laneid":
            return lambda w: LANE.copy()
        if text == "%cluster_ctarank":
            return lambda w: np.full(LANES, w.block.cluster.index(w.block), dtype=np.uint32)
        if found := re.fullmatch(r"%(n?)ctaid\.([xyz])", text):
            axis, size = "xyz".index(found[2]), bool(found[1])
            return lambda w: np.full(LANES, (w.block.grid if size else w.block.number)[axis], dtype=np.uint32)
        if text.startswith("0f"):
            value = np.full(LANES, int(text[2:], 16), dtype=np.uint32).view(kind)
            return lambda w: value
        if re.fullmatch(r"-?\d+", text):
            width = 8 * np.dtype(kind).itemsize
            bits = np.full(LANES, int(text) % (1 << width), dtype=np.uint32 if width == 32 else np.uint64)
            value = bits.view(kind)
            return lambda w: value
        unknown = np.full(LANES, -1, dtype=np.int64 if np.dtype(kind).itemsize == 8 else np.int32).view(kind)  # NaN
        return lambda w: w.registers[text].view(kind) if text in w.registers else unknown

    def address(self, text: str) -> Callable[[Warp], np.ndarray]:
        base, _, offset = text.strip("[]").partition("+")
        wide = base.startswith("%rd")
        kind = np.uint64 if wide else np.uint32
        read, plus = self.source(base, kind), kind(int(offset or 0))
        return lambda w: read(w) + plus

    # arithmetic
    def _map(self, operands: list[str], kind: Any, function: Callable[..., np.ndarray], out: Any = None) -> Any:
        target, reads = operands[0], [self.source(x, kind) for x in operands[1:]]
        result = out or kind

        def run(w: Warp, mask: np.ndarray | None) -> None:
            with np.errstate(all="ignore"):
                w.put(target, function(*(read(w) for read in reads)).astype(result, copy=False), mask)

        return run

    def op_mov(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if operands[0].startswith("{"):
            low, high = operands[0].strip("{} ").replace(" ", "").split(",")
            if kinds[0] == "b32":  # halves are kept as words
                word = self.source(operands[1], np.uint32)

                def halve(w: Warp, mask: np.ndarray | None) -> None:
                    value = word(w)
                    if low != "_":
                        w.put(low, value & np.uint32(0xFFFF), mask)
                    if high != "_":
                        w.put(high, value >> np.uint32(16), mask)

                return halve
            read = self.source(operands[1], np.uint64)

            def split(w: Warp, mask: np.ndarray | None) -> None:
                value = read(w)
                w.put(low, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)
                w.put(high, (value >> np.uint64(32)).astype(np.uint32), mask)

            return split
        if operands[1].startswith("{"):
            parts = [self.source(x, np.uint32) for x in operands[1].strip("{} ").replace(" ", "").split(",")]
            target = operands[0]

            def join(w: Warp, mask: np.ndarray | None) -> None:
                low, high = (part(w).astype(np.uint64) for part in parts)
                w.put(target, low | high << np.uint64(32), mask)

            return join
        if kinds[0] == "pred":
            source = operands[1]
            return lambda w, mask: w.put(operands[0], w.registers[source].copy(), mask)
        return self._map(operands, TYPES[kinds[0]], lambda x: x.copy())

    def op_add(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], np.add)

    def op_sub(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], np.subtract)

    def op_mul(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if "wide" in kinds:
            narrow, wide = TYPES[kinds[-1]], TYPES[kinds[-1].replace("32", "64")]
            return self._map(operands, narrow, lambda a, b: a.astype(wide) * b.astype(wide), wide)
        if "hi" in kinds:
            assert kinds[-1] in ("s32", "u32"), name
            narrow, wide = TYPES[kinds[-1]], TYPES[kinds[-1].replace("32", "64")]
            return self._map(operands, narrow, lambda a, b: (a.astype(wide) * b.astype(wide) >> 32).astype(narrow))
        assert "lo" in kinds or kinds[-1] in ("f16", "f32", "f64", "bf16"), name
        return self._map(operands, TYPES[kinds[-1]], np.multiply)

    def op_mad(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        assert "lo" in kinds, name
        return self._map(operands, TYPES[kinds[-1]], lambda a, b, c: a * b + c)

    def op_fma(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        wide = np.float64
        return self._map(operands, np.float32, lambda a, b, c: a.astype(wide) * b + c)

    def op_div(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], lambda a, b: np.trunc(a / np.where(b == 0, 1, b)))

    def op_rem(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], lambda a, b: np.fmod(a, np.where(b == 0, 1, b)))

    def op_min(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], np.fmin)

    def op_max(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], np.fmax)

    def op_abs(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], np.abs)

    def op_neg(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, TYPES[kinds[-1]], np.negative)

    def op_not(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if kinds[-1] == "pred":
            return lambda w, mask: w.put(operands[0], ~w.registers[operands[1]], mask)
        return self._map(operands, TYPES[kinds[-1]], np.invert)

    def _logic(self, kinds: list[str], operands: list[str], function: Any) -> Any:
        if kinds[-1] == "pred":
            a, b = operands[1:]
            return lambda w, mask: w.put(operands[0], function(w.registers[a], w.registers[b]), mask)
        return self._map(operands, TYPES[kinds[-1]], function)

    def op_and(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._logic(kinds, operands, np.bitwise_and)

    def op_or(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._logic(kinds, operands, np.bitwise_or)

    def op_xor(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._logic(kinds, operands, np.bitwise_xor)

    def _shift(self, kinds: list[str], operands: list[str], function: Any) -> Any:
        kind = TYPES[kinds[-1]]
        target, value, by = operands[0], self.source(operands[1], kind), self.source(operands[2], np.uint32)
        return lambda w, mask: w.put(target, function(value(w), by(w).astype(kind)), mask)

    def op_shl(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._shift(kinds, operands, np.left_shift)

    def op_shr(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._shift(kinds, operands, np.right_shift)

    def op_cvt(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if kinds[-1] == "f32" and kinds[-2].endswith("x2"):
            dtype = kinds[-2].removesuffix("x2")
            high, low = (self.source(x, np.float32) for x in operands[1:])

            def pack(w: Warp, mask: np.ndarray | None) -> None:
                with np.errstate(all="ignore"):
                    bits = round16(low(w), dtype).astype(np.uint32) | round16(high(w), dtype).astype(np.uint32) << 16
                w.put(operands[0], bits, mask)

            return pack
        if kinds[-1] in ("bf16", "f16"):
            dtype = kinds[-1]
            return self._map(operands, np.uint32, lambda x: numbers(x.astype(np.uint16), dtype), np.float32)
        to, of = TYPES[kinds[-2]], TYPES[kinds[-1]]
        return self._map(operands, of, lambda x: x.astype(to), to)

    def op_bmsk(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        assert kinds[0] == "clamp", name
        start, count = (self.source(x, np.uint32) for x in operands[1:])

        def run(w: Warp, mask: np.ndarray | None) -> None:
            first, number = (np.minimum(x(w), 32).astype(np.uint64) for x in (start, count))
            ones = ((np.uint64(1) << number) - np.uint64(1)) << first
            w.put(operands[0], (ones & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)

        return run

    def op_cvta(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, np.uint64, lambda x: x.copy())

    def op_ex2(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, np.float32, np.exp2)

    def op_lg2(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, np.float32, np.log2)

    def op_rcp(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        return self._map(operands, np.float32, np.reciprocal)

    def op_setp(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        comparison = kinds[0]
        functions: dict[str, Any] = {
            "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)), "leu": lambda a, b: ~(a > b),
            "ltu": lambda a, b: ~(a >= b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
            "neu": lambda a, b: ~(a == b),
        }  # fmt: skip
        kind = TYPES[kinds[-1]]
        a, b = (self.source(x, kind) for x in operands[1:])
        function = functions[comparison]
        if comparison == "ne" and kind is np.float32:  # ordered
            function = lambda a, b: (a < b) | (a > b)  # noqa: E731
        return lambda w, mask: w.put(operands[0], function(a(w), b(w)), mask)

    def op_selp(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        a, b = (self.source(x, TYPES[kinds[-1]]) for x in operands[1:3])
        return lambda w, mask: w.put(operands[0], np.where(w.registers[operands[3]], a(w), b(w)), mask)

    # between lanes
    def op_shfl(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        target = operands[0].split("|")[0]
        value, by = self.source(operands[1], np.uint32), self.source(operands[2], np.uint32)

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is None, "a shuffle of lanes that have parted"
            lane = by(w) if "idx" in kinds else LANE ^ by(w)
            w.put(target, value(w)[lane.astype(np.int64) & 31], mask)

        return run

    def op_vote(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        assert kinds[:2] == ["sync", "any"], name

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is None, "a vote of lanes that have parted"
            w.put(operands[0], np.full(LANES, w.registers[operands[1]].any()), mask)

        return run

    def op_elect(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        target = operands[0].split("|")[1]

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is None, "an election of lanes that have parted"
            w.put(target, LANE == 0, mask)

        return run

    # memory
    def op_ld(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        targets = operands[0].strip("{} ").replace(" ", "").split(",")
        kind = TYPES[kinds[-1]]
        size = np.dtype(kind).itemsize
        if "param" in kinds:
            base, _, offset = operands[1].strip("[]").partition("+")
            number, offset_bytes = int(base[5:]), int(offset or 0)

            def parameter(w: Warp, mask: np.ndarray | None) -> None:
                raw = w.block.params[number][offset_bytes : offset_bytes + size]
                value = np.full(LANES, np.frombuffer(raw, dtype=kind)[0])
                if targets[0].startswith("%rd"):  # a wider register: extended
                    value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64)
                w.put(targets[0], value, mask)

            return parameter
        at = self.address(operands[1])
        spaces = "shared" in kinds

        def run(w: Warp, mask: np.ndarray | None) -> None:
            chosen = FULL if mask is None else mask
            where = at(w)[chosen]
            width = size * len(targets)
            raw = w.block.words(where, width) if spaces else w.block.memory.load(where, width)
            values = np.ascontiguousarray(raw).view(kind)
            for n, target in enumerate(targets):
                if target == "_":
                    continue
                lanes = np.zeros(LANES, dtype=kind)
                lanes[chosen] = values[:, n]
                if target.startswith("%rd") and size == 4:
                    lanes = lanes.astype(np.int64 if lanes.dtype.kind == "i" else np.uint64)
                w.put(target, lanes, mask)

        return run

    def op_mapa(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        address, rank = (self.source(x, np.uint32) for x in operands[1:])
        return lambda w, mask: w.put(operands[0], address(w) + (rank(w) + 1 << RANK_SHIFT).astype(np.uint32), mask)

    def op_st(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if kinds[0] == "async":
            to, number, bar = self.address(operands[0]), self.source(operands[1], np.uint32), self.address(operands[2])

            def send(w: Warp, mask: np.ndarray | None) -> None:
                for lane in np.flatnonzero(FULL if mask is None else mask):
                    block, where = w.block.at(int(to(w)[lane]))
                    word = number(w)[lane : lane + 1].copy().view(np.uint8)
                    block.shared[where - SHARED_BASE : where - SHARED_BASE + 4] = word
                    same, barrier_at = w.block.at(int(bar(w)[lane]))
                    assert same is block, "a word for one CTA and the barrier of another"
                    block.barriers[barrier_at].bytes -= 4
                    block.barriers[barrier_at].check()

            return send
        kind = TYPES[kinds[-1]]
        at = self.address(operands[0])
        sources = [self.source(x, kind) for x in operands[1].strip("{} ").replace(" ", "").split(",")]

        def run(w: Warp, mask: np.ndarray | None) -> None:
            chosen = FULL if mask is None else mask
            values = np.stack([source(w) for source in sources], axis=1)[chosen]
            raw = np.ascontiguousarray(values).view(np.uint8)
            if "shared" in kinds:
                where = at(w)[chosen].astype(np.int64) - SHARED_BASE
                w.block.shared[where[:, None] + np.arange(raw.shape[1])] = raw
            else:
                w.block.memory.store(at(w)[chosen], raw)

        return run

    def op_atom(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        at, value = self.address(operands[1]), self.source(operands[2], np.uint32)

        def run(w: Warp, mask: np.ndarray | None) -> None:
            chosen = FULL if mask is None else mask
            before = np.zeros(LANES, dtype=np.uint32)
            for lane in np.flatnonzero(chosen):
                where = at(w)[lane : lane + 1]
                old = w.block.memory.load(where, 4).view(np.uint32)[0, 0]
                new = value(w)[lane] if "exch" in kinds else old + value(w)[lane]
                w.block.memory.store(where, np.array([new], dtype=np.uint32).view(np.uint8)[None])
                before[lane] = old
            w.put(operands[0], before, mask)

        return run

    def op_red(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        kind = TYPES[kinds[-1]]
        at = self.address(operands[0])
        sources = [self.source(x, kind) for x in operands[1].strip("{} ").replace(" ", "").split(",")]

        def run(w: Warp, mask: np.ndarray | None) -> None:
            for lane in np.flatnonzero(FULL if mask is None else mask):
                where = at(w)[lane : lane + 1]
                added = np.array([source(w)[lane] for source in sources], dtype=kind)
                sums = w.block.memory.load(where, added.nbytes).view(kind)[0] + added
                w.block.memory.store(where, sums.view(np.uint8)[None])

        return run

    def op_stmatrix(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        at = self.address(operands[0])
        sources = [self.source(x, np.uint32) for x in operands[1].strip("{} ").replace(" ", "").split(",")]

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is None
            for n, source in enumerate(sources):
                rows = at(w)[8 * n : 8 * n + 8].astype(np.int64) - SHARED_BASE
                matrix = source(w).copy().view(np.uint16).reshape(8, 8)
                raw = np.ascontiguousarray(matrix.T if "trans" in kinds else matrix).view(np.uint8)
                w.block.shared[rows[:, None] + np.arange(16)] = raw

        return run

    def op_ldmatrix(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        at = self.address(operands[1])
        targets = operands[0].strip("{} ").replace(" ", "").split(",")
        assert "trans" not in kinds, name

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is None
            where = at(w).astype(np.int64) - SHARED_BASE
            for n, target in enumerate(targets):
                raw = w.block.shared[where[8 * n : 8 * n + 8, None] + np.arange(16)]
                w.put(target, np.ascontiguousarray(raw).view(np.uint32).reshape(LANES), mask)

        return run

    # barriers
    def op_mbarrier(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if kinds[0] == "init":
            at, count = self.address(operands[0]), self.source(operands[1], np.uint32)

            def init(w: Warp, mask: np.ndarray | None) -> None:
                assert mask is not None and mask.sum() == 1, "by one lane"
                lane = int(np.flatnonzero(mask)[0])
                number = int(count(w)[lane])
                assert int(at(w)[lane]) not in w.block.barriers, "two barriers at one address"
                w.block.barriers[int(at(w)[lane])] = Barrier(number, number)

            return init
        if kinds[0] == "try_wait":
            at, phase = self.address(operands[1]), self.source(operands[2], np.uint32)

            def wait(w: Warp, mask: np.ndarray | None) -> bool:
                lane = 0 if mask is None else int(np.flatnonzero(mask)[0])
                done = w.block.barriers[int(at(w)[lane])].phase != int(phase(w)[lane])
                w.put(operands[0], np.full(LANES, done), mask)
                return done

            return wait
        expects = "expect_tx" in kinds
        at = self.address(operands[1])
        size = self.source(operands[2], np.uint32) if expects else None

        def arrive(w: Warp, mask: np.ndarray | None) -> None:
            for lane in np.flatnonzero(FULL if mask is None else mask):
                block, where = w.block.at(int(at(w)[lane]))
                barrier = block.barriers[where]
                if size is not None:
                    barrier.bytes += int(size(w)[lane])
                barrier.pending -= 1
                barrier.check()

        return arrive

    def op_bar(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if kinds[0] == "cluster":

            def meet(w: Warp, mask: np.ndarray | None) -> bool:
                assert mask is None, "a barrier of lanes that have parted"
                met, everybody = w.block.met, len(w.block.cluster) * self.threads
                if kinds[1] == "arrive":
                    w.met = met[1]
                    met[0] += LANES
                    if met[0] == everybody:
                        met[:] = 0, met[1] + 1
                return met[1] != w.met

            return meet
        number = self.source(operands[0], np.uint32)
        threads = self.source(operands[1], np.uint32) if len(operands) > 1 else None

        def run(w: Warp, mask: np.ndarray | None) -> tuple[int, int, bool]:
            assert mask is None, "a barrier of lanes that have parted"
            return int(number(w)[0]), self.threads if threads is None else int(threads(w)[0]), "sync" in kinds

        return run

    op_barrier = op_bar

    # the asynchronous units
    def op_cp(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        if "commit_group" in kinds:
            return lambda w, mask: w.stores.append([])
        if "wait_group" in kinds:
            allowed = int(operands[0])

            def wait(w: Warp, mask: np.ndarray | None) -> None:
                while len(w.stores) > allowed + 1:
                    for store in w.stores.pop(0):
                        store()

            return wait
        if kinds[0] == "reduce":
            return self.reduce(kinds, operands)
        rank = int(kinds[3].removesuffix("d"))
        storing = kinds[4] == "global"
        smem, tensor = (operands[1], operands[0]) if storing else (operands[0], operands[1])
        desc, coordinates = tensor.strip("[]").split(",", 1)
        descriptor = self.source(desc.strip(), np.uint64)
        reads = [self.source(x.strip(), np.int32) for x in coordinates.strip("{} ").split(",")]
        at = self.address(smem)
        bar = None if storing else self.address(operands[2])
        several = "multicast::cluster" in kinds
        mask_of = self.source(operands[3], np.uint32) if several else None

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is not None and mask.sum() == 1, "TMA by one lane"
            lane, block = int(np.flatnonzero(mask)[0]), w.block
            number = (int(descriptor(w)[lane]) - PARAMS_AT) // 4096
            view = TensorMap.of(block.params[number], rank)
            where = tuple(int(read(w)[lane]) for read in reads)
            start = int(at(w)[lane])
            assert start % 1024 == 0, "the swizzle's pattern begins elsewhere"
            assert view.box[0] in (32, 64), "a row of 128 bytes"

            def places(row: int, columns: int) -> np.ndarray:
                return swizzled(start + 128 * row + np.arange(view.width * columns)) - SHARED_BASE

            if storing:

                def store() -> None:
                    for row, (address, columns) in enumerate(view.rows(where)):
                        if columns:
                            raw = block.shared[places(row, columns)]
                            block.memory.store(np.array([address], dtype=np.uint64), raw[None])

                w.stores[-1].append(store)
                return
            barrier_at = int(bar(w)[lane])  # type: ignore[misc]
            ranks = int(mask_of(w)[lane]) & 0xFFFF if mask_of is not None else 1 << block.cluster.index(block)

            def land(there: Block) -> None:
                for row, (address, columns) in enumerate(view.rows(where)):
                    there.shared[places(row, view.box[0])] = 0
                    if columns:
                        size = view.width * columns
                        raw = block.memory.load(np.array([address], dtype=np.uint64), size)[0]
                        there.shared[places(row, columns)] = raw
                barrier = there.barriers[barrier_at]
                barrier.bytes -= 128 * view.box[1]
                barrier.check()

            for number, there in enumerate(block.cluster):
                if ranks >> number & 1:
                    if block.random.random() < 0.5:
                        land(there)
                    else:
                        late = block.time + block.random.randrange(1, 12)
                        block.flying.append((late, lambda there=there: land(there)))  # type: ignore[misc]

        return run

    def reduce(self, kinds: list[str], operands: list[str]) -> Any:
        """A box of 32 fp32 columns in shared memory, added to global memory."""
        rank = int(kinds[4].removesuffix("d"))
        desc, coordinates = operands[0].strip("[]").split(",", 1)
        descriptor = self.source(desc.strip(), np.uint64)
        reads = [self.source(x.strip(), np.int32) for x in coordinates.strip("{} ").split(",")]
        at = self.address(operands[1])

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is not None and mask.sum() == 1, "TMA by one lane"
            lane, block = int(np.flatnonzero(mask)[0]), w.block
            view = TensorMap.of(block.params[(int(descriptor(w)[lane]) - PARAMS_AT) // 4096], rank)
            where, start = tuple(int(read(w)[lane]) for read in reads), int(at(w)[lane])
            assert start % 1024 == 0, "the swizzle's pattern begins elsewhere"
            assert view.box[0] == 32, "a row of 128 bytes"

            def add() -> None:
                for row, (address, columns) in enumerate(view.rows(where)):
                    if columns:
                        places = swizzled(start + 128 * row + np.arange(4 * columns)) - SHARED_BASE
                        place = np.array([address], dtype=np.uint64)
                        sums = block.memory.load(place, 4 * columns).view(np.float32)
                        sums = sums + block.shared[places].view(np.float32)[None]
                        block.memory.store(place, sums.view(np.uint8))

            w.stores[-1].append(add)

        return run

    def op_wgmma(self, name: str, kinds: list[str], operands: list[str]) -> Any:
        m, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", kinds[3]).groups())  # type: ignore[union-attr]
        dtype = kinds[-1]
        assert (m, k) == (64, 16), name
        sums = operands[0].strip("{} ").replace(" ", "").split(",")
        from_registers = operands[1].startswith("{")
        held = [self.source(x, np.uint32) for x in operands[1].strip("{} ").replace(" ", "").split(",")]
        a_desc = None if from_registers else self.source(operands[1], np.uint64)
        b_desc = self.source(operands[2], np.uint64)
        add, turned = operands[3], operands[-1] == "1"
        a_turned = not from_registers and operands[-2] == "1"
        adds = self.source(add, np.uint32) if re.fullmatch(r"-?\d+", add) else None

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is None, "a product of lanes that have parted"
            block = w.block
            first, second = LANE // 4, 2 * (LANE % 4)
            if a_desc is None:
                a = np.zeros((16, 16), dtype=np.uint16)
                for number, source in enumerate(held):  # (row, low), (row + 8, low), (row, high), (row + 8, high)
                    value = source(w)
                    rows, columns = first + 8 * (number % 2), second + 8 * (number // 2)
                    a[rows, columns], a[rows, columns + 1] = value & 0xFFFF, value >> 16
            else:
                start, _, stride = fields(int(a_desc(w)[0]))
                row, depth = 16 * (w.number % 4) + np.arange(16)[:, None], np.arange(16)
                if a_turned:  # m contiguous in rows of 64
                    address = start + depth // 8 * stride + depth % 8 * 128 + 2 * row
                else:
                    address = start + row // 8 * stride + row % 8 * 128 + 2 * depth
                a = block.rows16(start, address)
            start, leading, stride = fields(int(b_desc(w)[0]))
            if turned:  # (k, n), n contiguous in rows of 64
                key, column = np.arange(16)[:, None], np.arange(n)
                address = start + column // 64 * leading + key // 8 * stride + key % 8 * 128 + 2 * (column % 64)
                b = block.rows16(start, address)
            else:
                row = np.arange(n)
                address = start + (row // 8 * stride + row % 8 * 128)[:, None] + 2 * np.arange(16)
                b = block.rows16(start, address).T
            with np.errstate(all="ignore"):
                product = numbers(a, dtype) @ numbers(np.ascontiguousarray(b), dtype)
            keep = w.registers[add] if adds is None else adds(w) != 0
            for e, name_of in enumerate(sums):
                c, half, j = e % 2, e // 2 % 2, e // 4
                value = product[first + 8 * half, 8 * j + second + c]
                if keep[0]:
                    value = value + w.registers[name_of].view(np.float32)
                w.put(name_of, np.ascontiguousarray(value.astype(np.float32)), None)

        return run


def fields(descriptor: int) -> tuple[int, int, int]:
    """(start address, leading byte offset, stride byte offset) of an operand in shared memory, 128-byte swizzled."""
    assert descriptor >> 62 == 1, "128-byte swizzle"
    return (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4


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
