"""Speed of the Hopper backward beside cuDNN and FA2, and of its settings beside each other, interleaved."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hopper_backward_cases import DEVICE, begin, one
from torch.nn.attention import SDPBackend, sdpa_kernel

from ring_core.backend import Params, on_device
from ring_triton.hopper import backward_launch as hopper
from ring_triton.hopper.backward_settings import BackwardSettings, backward_settings_for

PROBE = Path(__file__).with_name("gpu_probe_backward.py")


def tried(dim: int) -> dict[str, BackwardSettings]:
    """The settings to compare."""
    base = backward_settings_for(dim)
    if dim > 64:
        return {
            "order 1": base,
            "order 1, 4+2": replace(base, q_stages=4),
            "order 0": replace(base, order=0),
            "order 2": replace(base, order=2, q_stages=2),
            "order 2, packed": replace(base, order=2, q_stages=2, packed=True),
            "order 1, rows": replace(base, swap=False),
            "order 1, by piece": replace(base, by_piece=True),
        }
    narrow = replace(base, block=64, order=0, packed=False)
    wide = replace(base, block=128, order=2, packed=True, q_stages=2)
    return {
        "64, order 0": narrow,
        "64, order 1": replace(narrow, order=1),
        "64, order 2": replace(narrow, order=2),
        "128, order 2, packed": wide,
        "128, order 2": replace(wide, packed=False),
        "64, order 0, rows": replace(narrow, swap=False),
    }


class Call:
    """Randn inputs in bf16 and the ways to go backward through them."""

    def __init__(self, batch: int, length: int, heads: tuple[int, int], dim: int, causal: bool) -> None:
        self.table = on_device(one(length, length, causal=causal), DEVICE)
        self.causal, self.params = causal, Params(dim**-0.5)
        shape = (batch, length, heads[0], dim)
        self.q, self.dout = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.kv = torch.randn(2, 1, batch, length, heads[1], dim, device=DEVICE, dtype=torch.bfloat16)
        self.dkv = torch.zeros(self.kv.shape, device=DEVICE)
        self.group = heads[0] // heads[1]
        self.flops = 10.0 * batch * heads[0] * length * length * dim * (0.5 if causal else 1.0)
        self.leaves = [self.q.transpose(1, 2).detach().requires_grad_()]
        self.leaves += [
            x[0].repeat_interleave(self.group, dim=2).transpose(1, 2).detach().requires_grad_() for x in self.kv
        ]
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = torch.ops.aten._scaled_dot_product_flash_attention(*self.leaves, 0.0, causal)
        self.out, self.lse = flash[0].transpose(1, 2).contiguous(), flash[1].float()
        self.state = hopper.prepare(self.q, self.out, self.dout, self.lse, None)

    def main(self, settings: BackwardSettings | None = None) -> Callable[[], None]:
        arguments = (self.state, self.q, self.kv[0], self.kv[1], self.dout, self.dkv[0], self.dkv[1], self.table)
        return lambda: hopper.backward(*arguments, params=self.params, settings=settings)

    def whole(self, deterministic: bool = False) -> Callable[[], None]:
        params = replace(self.params, deterministic=deterministic)

        def go() -> None:
            state = hopper.prepare(self.q, self.out, self.dout, self.lse, None, deterministic=deterministic)
            hopper.backward(state, self.q, self.kv[0], self.kv[1], self.dout, self.dkv[0], self.dkv[1], self.table,
                            params=params)  # fmt: skip
            hopper.finish(state, params=params)

        return go

    def torch(self, backend: SDPBackend) -> Callable[[], None]:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*self.leaves, is_causal=self.causal)
        grad = self.dout.transpose(1, 2)

        def go() -> None:
            torch.autograd.grad(out, self.leaves, grad, retain_graph=True)

        return go


def compare(fns: dict[str, Callable[[], None]], flops: float, rounds: int = 3) -> dict[str, float]:
    """TFLOP/s of each, the best of interleaved rounds of about 12 ms."""
    number = {}
    for name, fn in fns.items():
        begin(name)
        fn()
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        number[name] = max(1, min(20, int(0.012 / (time.perf_counter() - start))))
    best = dict.fromkeys(fns, float("inf"))
    for _ in range(rounds):
        for name, fn in fns.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(number[name]):
                fn()
            b.record()
            b.synchronize()
            best[name] = min(best[name], a.elapsed_time(b) / number[name])
    return {name: flops / t / 1e9 for name, t in best.items()}


CELLS = [(max(1, 16384 // s), s, h, 128) for s in (4096, 8192, 16384, 32768) for h in ((16, 16), (32, 8))]
CELLS += [(4, 4096, (32, 32), 64), (1, 16384, (32, 32), 64)]


def speed() -> None:
    ratios: dict[int, list[float]] = {64: [], 128: []}
    for batch, length, heads, dim in CELLS:
        for causal in (True, False):
            call = Call(batch, length, heads, dim, causal)
            fns = {"main": call.main(), "whole": call.whole()}
            fns["cudnn"] = call.torch(SDPBackend.CUDNN_ATTENTION)
            fns["fa2"] = call.torch(SDPBackend.FLASH_ATTENTION)
            if length == 8192 or dim == 64:
                fns["ordered"] = call.whole(True)
            got = compare(fns, call.flops)
            ratios[dim].append(got["whole"] / got["cudnn"])
            print(f"B{batch} S{length} H{heads[0]}/{heads[1]} D{dim} {'causal' if causal else 'full':6}: "
                  + " ".join(f"{name} {x:.0f}" for name, x in got.items()) + f"  whole/cudnn {ratios[dim][-1]:.3f}",
                  flush=True)  # fmt: skip
            del call, fns
    for dim, found in ratios.items():
        print(f"D{dim}: whole/cudnn mean {sum(found) / len(found):.3f}, worst {min(found):.3f}", flush=True)


def warm(dim: str, name: str) -> None:
    """Compiles one variant into the cache."""
    call = Call(1, 256, (16, 16) if dim == "128" else (32, 32), int(dim), True)
    call.main(tried(int(dim))[name])()
    torch.cuda.synchronize()


def variants() -> None:
    """Settings beside each other."""
    work = [(str(dim), name) for dim in (128, 64) for name in tried(dim)]
    for process in [subprocess.Popen([sys.executable, PROBE, "warm", *w]) for w in work]:
        process.wait()
    for batch, length, heads, dim in (
        (4, 4096, (16, 16), 128),
        (1, 16384, (16, 16), 128),
        (4, 4096, (32, 32), 64),
        (1, 16384, (32, 32), 64),
    ):
        for causal in (True, False):
            call = Call(batch, length, heads, dim, causal)
            fns = {name: call.main(chosen) for name, chosen in tried(dim).items()}
            fns["cudnn"] = call.torch(SDPBackend.CUDNN_ATTENTION)
            got = compare(fns, call.flops)
            print(f"B{batch} S{length} D{dim} {'causal' if causal else 'full':6}: "
                  + "; ".join(f"{name} {x:.0f}" for name, x in got.items()), flush=True)  # fmt: skip
