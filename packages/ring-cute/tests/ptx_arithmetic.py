"""PTX on the CPU (`ptx_machine`): operands, arithmetic, and what lanes tell each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_machine import LANE, LANES, PARAMS_AT, SHARED_BASE, TYPES, Warp, numbers, round16


class Operands:
    """What operands stand for, and what operations on registers do."""

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
