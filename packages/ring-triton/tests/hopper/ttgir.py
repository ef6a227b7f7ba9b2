"""A Triton GPU module, as text, turned into Python functions and run: the part of the dialects that the Hopper kernels
use. What each operation does is in `ttgir_operations`, what it does that to in `ttgir_machine`.
"""

from __future__ import annotations

import re

from ttgir_machine import Block, Operation, Scope, Steps, Thread
from ttgir_operations import function_of

LOCATION = re.compile(r'\s*loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*"|\([^()]*\))*\))*\))*\)')
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")


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
        operation.function = None if operation.name in CONTROL else function_of(operation)
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
