"""Compiles kernels for a GPU that is not there, and counts what came out. Run in a process without TRITON_INTERPRET."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ring_triton.portable.forward import forward_kernel
from ring_triton.portable.gradients_kv import gradients_kv_kernel
from ring_triton.portable.gradients_q import gradients_q_kernel
from ring_triton.portable.launch import LOG2E
from ring_triton.portable.settings import Kernel, Setting, Target, listed, width_of

KERNELS = {"forward": forward_kernel, "gradients_kv": gradients_kv_kernel, "gradients_q": gradients_q_kernel}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OWN = {
    "forward": {"FUSED": True, "SINKS": False, "STATE": True},
    "gradients_kv": {},
    "gradients_q": {"FRESH": True},
}
INPUTS = {"q", "k", "v", "out", "dout"}
INTS = {"work", "segments", "numbers"}
FLOATS = {"scale", "score_scale", "cap_scale", "keep_scale"}
UNKNOWN = {"length", "num_heads", "group", "keep_from", "first_head"}
"""Numbers that may be anything; strides are multiples of 16."""


@dataclass(frozen=True)
class Compiled:
    """products: tensor core instructions in PTX; stack, registers: of a thread; shared: bytes of a block."""

    products: int
    wgmma: int
    stack: int
    registers: int
    shared: int
    ptx: int


def compiled(
    kernel: str, capability: int, setting: Setting, head_dim: int, dtype: torch.dtype, **features: bool
) -> Compiled:
    """One kernel under one setting. features: SOFTCAP, ALIBI, DROPOUT, SINKS, STATE, FUSED, FRESH, as constants; FINAL:
    dk and dv are in the inputs' dtype."""
    fn = KERNELS[kernel]
    final = INPUTS | ({"dk", "dv"} if features.pop("FINAL", False) else set())
    constants: dict[str, Any] = {
        "ROWS": setting.rows,
        "KEYS": setting.keys,
        "D": head_dim,
        "WIDTH": width_of(head_dim),
        "LONG": False,
        "ACC": tl.float32,
        "UNIT": LOG2E if dtype.itemsize == 2 else 1.0,
        "UPCAST": False,
        "PRECISION": setting.precision,
        "SOFTCAP": False,
        "ALIBI": False,
        "DROPOUT": False,
        **OWN[kernel],
        **features,
    }
    signature, aligned = {}, {}
    for number, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{SHORT[dtype]}" if name in final else _type(name)
        if name not in FLOATS | UNKNOWN:
            aligned[number,] = [["tt.divisibility", 16]]
    constexprs = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": setting.warps, "num_stages": setting.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    wgmma = ptx.count("wgmma.mma_async")
    registers, stack = _usage(made.asm["cubin"])
    return Compiled(wgmma + ptx.count("mma.sync"), wgmma, stack, registers, made.metadata.shared, len(ptx))


def _type(name: str) -> str:
    if name in INTS:
        return "*i32"
    if name == "seed":
        return "*i64"
    if name in FLOATS:
        return "fp32"
    pointers = {"lse", "state", "slopes", "sinks", "dk", "dv", "dq", "scaled_lse", "delta"}
    return "*fp32" if name in pointers else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def shipped() -> dict[str, tuple[Kernel, int, Setting, int, torch.dtype, dict[str, bool]]]:
    """Arguments of `compiled` by name: every setting once, and every kernel once with every feature."""
    targets: dict[Target, int] = {"sm_90": 90, "sm_80": 80, "sm_86": 80}
    found: dict[Any, str] = {}
    for target, capability in targets.items():
        for kernel in KERNELS:
            for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                for width in (16, 32, 64, 128, 256):
                    setting = listed(target, kernel, width, dtype.itemsize * 8)
                    key = kernel, capability, setting, width, dtype
                    found.setdefault(key, f"{target}-{kernel}-{width}-{short}")
    everything = {name: (*key, {}) for key, name in found.items()}
    for target, width in (("sm_90", 64), ("sm_90", 128), ("sm_90", 256), ("sm_80", 128), ("sm_86", 256)):
        setting = listed(target, "gradients_kv", width, 16)
        key = "gradients_kv", targets[target], setting, width, torch.bfloat16
        everything[f"{target}-gradients_kv-{width}-bf16-final"] = (*key, {"FINAL": True})
    for kernel in KERNELS:
        features = {"SOFTCAP": True, "ALIBI": True, "DROPOUT": True}
        features |= {"forward": {"SINKS": True, "FUSED": False}, "gradients_q": {"FRESH": False}}.get(kernel, {})
        setting = listed("sm_90", kernel, 128, 16)
        everything[f"sm_90-{kernel}-features"] = (kernel, 90, setting, 112, torch.float16, features)
    return everything


def _one(name: str) -> tuple[str, dict[str, int]]:
    *arguments, features = shipped()[name]
    return name, asdict(compiled(*arguments, **features))


if __name__ == "__main__":  # prints JSON: what became of the settings named, or of all
    names = sys.argv[1:] or list(shipped())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        print(json.dumps(dict(pool.map(_one, names))))
