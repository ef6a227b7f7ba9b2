"""Compiles the Hopper backward for sm_90a without a GPU and holds what comes out to account.

    python hopper_compiling_backward.py [GROUP…]

It goes through `ring_triton.hopper.backward_launch`, so arguments and descriptors are those of a call. All products on
wgmma and in flight side by side (ptxas warns where it serializes them), no more spills than the table here says, shared
memory within its limit. Prints a table; exit status 1 if a check failed. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from hopper_compiling import SHARED_LIMIT, Compiled, NoGpu
from triton.backends.nvidia.compiler import get_ptxas

from ring_core.backend import Flags, Params, on_device
from ring_core.plan import Problem, make_plan
from ring_triton.hopper import backward_launch
from ring_triton.hopper.backward_settings import BackwardSettings, backward_head_dim, backward_settings_for


class WarmUp:
    """Stands for a kernel: compiles it for the arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **constants)

        return launch


def compile_backward(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: tuple[int, int] = (4, 2),
    flags: bool = False,
    departures: bool = False,
    ordered: bool = False,
    final: bool = False,
    parts: int = 1,
    settings: BackwardSettings | None = None,
    **changed: Any,
) -> Compiled:
    """The backward kernel of these settings for sm_90a."""
    triton.runtime.driver.set_active(NoGpu())
    chosen = replace(settings or backward_settings_for(head_dim, ordered=ordered), **changed)
    length = 256
    plan = make_plan(Problem(length, length, length, length, None, 0, "contiguous", 1), 0, "gather")
    q = torch.zeros(1, length, heads[0], head_dim, dtype=dtype)
    kv = torch.zeros(2, 1, 1, length, heads[1], head_dim, dtype=dtype)
    dkv = torch.zeros(kv.shape, dtype=dtype if final else torch.float32)
    kernel, other = WarmUp(backward_launch.backward_kernel), WarmUp(backward_launch.prepare_kernel)
    last = WarmUp(backward_launch.finish_kernel)
    params = Params(0.1, deterministic=ordered)
    ints = torch.zeros(1, dtype=torch.int32)
    with (
        mock.patch.object(backward_launch, "backward_kernel", kernel),
        mock.patch.object(backward_launch, "prepare_kernel", other),
        mock.patch.object(backward_launch, "finish_kernel", last),
        mock.patch.object(backward_launch, "_split", return_value=parts),
        mock.patch.object(backward_launch, "processors", return_value=132),
        mock.patch.object(backward_launch.portable, "launch_gradients_q"),
    ):
        lse = torch.zeros(1, heads[0], length)
        state = backward_launch.prepare(q, q, q, lse, None, deterministic=ordered)
        backward_launch.backward(
            state,
            q,
            kv[0],
            kv[1],
            q,
            dkv[0],
            dkv[1],
            on_device(plan.steps[0].backward, torch.device("cpu")),
            params=params,
            flags=Flags(ints, ints) if flags else None,
            departures=ints if departures else None,
            settings=chosen,
        )
        backward_launch.finish(state, params=params)
    assert kernel.compiled is not None and other.compiled is not None
    assert ordered or last.compiled is not None
    return examine(kernel.compiled)


def examine(kernel: Any) -> Compiled:
    """Assembles a compiled kernel once more, to hear what ptxas says of it."""
    ptxas = Path(get_ptxas(90).path)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        said = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", ptx, "-o", cubin], capture_output=True, text=True, check=True
        ).stderr
        sass = subprocess.run(
            [ptxas.parent / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    number = lambda pattern: sum(map(int, re.findall(pattern, said)))  # noqa: E731
    return Compiled(
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill"),
        shared=kernel.metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        # C7519: an arrive is put before products that read registers; nothing waits for it
        warnings=[s for s in said.splitlines() if ("arning" in s or "C75" in s) and "C7519" not in s],
        ptx=kernel.asm["ptx"],
        sass=sass,
    )


SPILLED: dict[tuple[int, int, int], int] = {
    (128, 64, 1): 200,
    (128, 64, 0): 240,
    (128, 64, 2): 200,
    (64, 128, 2): 400,
}
"""Bytes, by head dim, block and order: in blocks at an edge, and addresses before the loop."""
GROUPS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "128": [(128, {}), (128, {"flags": True, "departures": True}), (128, {"heads": (4, 1), "parts": 4})],
    "final": [
        (128, {"final": True}),
        (64, {"final": True}),
        (40, {"final": True, "dtype": torch.float16}),
        (128, {"final": True, "ordered": True}),
        (128, {"final": True, "heads": (4, 1), "parts": 4}),
    ],
    "64": [(64, {}), (64, {"flags": True, "departures": True}), (64, {"heads": (4, 1), "parts": 4})],
    "padded": [(8, {}), (40, {}), (96, {})],
    "fp16": [(64, {"dtype": torch.float16}), (128, {"dtype": torch.float16})],
    "ordered": [(64, {"ordered": True}), (128, {"ordered": True})],
    "variants": [
        (128, {"q_stages": 4}),
        (128, {"order": 0}),
        (128, {"order": 2, "q_stages": 2}),
        (128, {"order": 2, "q_stages": 2, "packed": True}),
        (128, {"swap": False}),
        (64, {"order": 1}),
        (64, {"order": 2}),
        (64, {"swap": False}),
        (64, {"order": 2, "packed": True, "q_stages": 2, "block": 128}),
    ],
}


def problems(compiled: Compiled, head_dim: int, changed: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    width = backward_head_dim(head_dim)
    chosen = backward_settings_for(head_dim, ordered=changed.get("ordered", False))
    block, order = changed.get("block", chosen.block), changed.get("order", chosen.order)
    dq = 0 if changed.get("ordered") else 128 // 16
    begin, rest = 2 * (width // 16), 2 * (block // 16) + dq
    products = begin + rest if order == 2 else 2 * begin + 2 * rest
    wrong = {
        f"{compiled.hgmma} wgmma instructions, not {products}": compiled.hgmma != products,
        f"{compiled.spills} bytes spilled": compiled.spills > SPILLED.get((width, block, order), 0),
        f"{compiled.shared} bytes of shared memory": compiled.shared > SHARED_LIMIT,
        "; ".join(compiled.warnings): bool(compiled.warnings),
        "not for sm_90a": ".target sm_90a" not in compiled.ptx,
    }
    return [message for message, is_so in wrong.items() if is_so]


def main() -> int:
    print("triton", triton.__version__, flush=True)
    failed = 0
    for group in sys.argv[1:] or GROUPS:
        for head_dim, changed in GROUPS[group]:
            got = compile_backward(head_dim, **changed)
            wrong = problems(got, head_dim, changed)
            failed += bool(wrong)
            print(
                f"D {head_dim} {changed or ''}: {got.registers} registers, {got.spills} B spilled, "
                f"{got.shared} B shared, {got.hgmma} wgmma {wrong or ''}",
                flush=True,
            )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
