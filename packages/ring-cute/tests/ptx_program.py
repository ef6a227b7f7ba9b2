"""PTX on the CPU (`ptx_machine`): a kernel's text as instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_machine import Instruction, Warp
from ptx_units import Units


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


class Program(Units):
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
