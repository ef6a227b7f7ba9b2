"""PTX on the CPU (`ptx_machine`): memory, barriers, TMA and wgmma."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from ptx_arithmetic import Operands
from ptx_machine import (
    FULL,
    LANE,
    LANES,
    PARAMS_AT,
    RANK_SHIFT,
    SHARED_BASE,
    TYPES,
    Barrier,
    Block,
    TensorMap,
    Warp,
    numbers,
    swizzled,
)


class Units(Operands):
    """What operations do outside a lane's registers: memory, barriers, the asynchronous units."""

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
        if kinds[2] == "shared::cluster" and kinds[3] == "shared::cta":
            return self.send_bytes(operands)
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

    def send_bytes(self, operands: list[str]) -> Any:
        """Shared memory of one CTA to that of another. What is sent is read when it lands, at once or late, when its
        bytes are counted."""
        to, source, bar = (self.address(operands[n]) for n in (0, 1, 3))
        size = self.source(operands[2], np.uint32)

        def run(w: Warp, mask: np.ndarray | None) -> None:
            assert mask is not None and mask.sum() == 1, "by one lane"
            lane, block = int(np.flatnonzero(mask)[0]), w.block
            there, start = block.at(int(to(w)[lane]))
            same, barrier_at = block.at(int(bar(w)[lane]))
            assert same is there, "bytes for one CTA and the barrier of another"
            first, count = int(source(w)[lane]), int(size(w)[lane])
            assert not (start % 16 or first % 16 or count % 16), "16 bytes at a time"
            assert first >> RANK_SHIFT == 0, "from its own shared memory"

            def land() -> None:
                raw = block.shared[first - SHARED_BASE : first - SHARED_BASE + count]
                there.shared[start - SHARED_BASE : start - SHARED_BASE + count] = raw
                barrier = there.barriers[barrier_at]
                barrier.bytes -= count
                barrier.check()

            if block.random.random() < 0.5:
                land()
            else:
                block.flying.append((block.time + block.random.randrange(1, 12), land))

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
