"""What a launch costs the host, in steady state. Recorded.

Without a GPU: everything up to the driver's door, ctypes included, on kernels compiled for sm_90a. On a GPU: the whole
launch; the limit is 25 µs, of which the driver takes 2 to 3.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ring_core.backend import DeviceTable, Params, on_device
from ring_core.plan import Problem, make_plan
from ring_triton import TritonBackend
from ring_triton.portable import launch as portable
from ring_triton.portable.settings import INTERPRETED

sys.path.insert(0, str(Path(__file__).parent / "hopper"))

LIMIT = 25e-6
PARAMS = Params(0.1)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")


def tables(device: torch.device) -> tuple[DeviceTable, DeviceTable]:
    """Of one rank's causal forward and backward."""
    step = make_plan(Problem(256, 256, 256, 256, None, 0, "contiguous", 1), 0, "gather").steps[0]
    for table in (step.forward, step.backward):
        table.cache.clear()  # plans are kept, and launches with them
    return on_device(step.forward, device), on_device(step.backward, device)


def test_hopper_forward_before_the_driver(benchmark: Any) -> None:
    from fake_driver import inputs, no_gpu, silent

    from ring_triton.hopper import launch

    table, _ = tables(torch.device("cpu"))
    tensors = inputs()
    with no_gpu(silent()) as kernel:
        launch.forward(*tensors, None, table, scale=0.1)
        benchmark(lambda: launch.forward(*tensors, None, table, scale=0.1))
        assert kernel.compiled == 1


def test_hopper_forward_by_triton_before_its_launcher(benchmark: Any) -> None:
    """For comparison: what Triton's binder takes to find the compiled kernel."""
    from fake_driver import inputs, no_gpu, silent

    from ring_core import direct
    from ring_triton.hopper import launch

    table, _ = tables(torch.device("cpu"))
    tensors = inputs()
    with no_gpu(silent()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "launchable", lambda kernel, arguments: False)
        launch.forward(*tensors, None, table, scale=0.1)
        benchmark(lambda: launch.forward(*tensors, None, table, scale=0.1))


def test_portable_forward_before_the_driver(benchmark: Any) -> None:
    from fake_driver import inputs, no_gpu_portable, silent

    table, _ = tables(torch.device("cpu"))
    tensors = inputs()
    with no_gpu_portable(silent()) as kernels:
        portable.forward(*tensors, None, table, PARAMS)
        benchmark(lambda: portable.forward(*tensors, None, table, PARAMS))
        assert kernels["forward_kernel"].compiled == 1


def test_portable_backward_before_the_driver(benchmark: Any) -> None:
    """Two launches."""
    from fake_driver import inputs, no_gpu_portable, silent

    _, table = tables(torch.device("cpu"))
    q, k, v, out, lse = inputs()
    dk, dv = torch.zeros(2, *k.shape)
    with no_gpu_portable(silent()) as kernels:
        state = portable.prepare(q, out, q, lse, None)
        run: Callable[[], None] = lambda: portable.backward(state, q, k, v, out, dk, dv, table, PARAMS)  # noqa: E731
        run()
        run()  # the first has written dq, the others add to it
        benchmark(run)
        assert kernels["gradients_kv_kernel"].compiled == 1 and kernels["gradients_q_kernel"].compiled == 2


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["portable", "hopper"])
def test_forward(benchmark: Any, path: str) -> None:
    """Through the backend, in bursts that the GPU keeps up with."""
    device = torch.device("cuda", torch.cuda.current_device())
    backend = TritonBackend(path)
    if not backend.capabilities(device).available:
        pytest.skip(backend.capabilities(device).reason)
    table, _ = tables(device)
    q, out = torch.zeros(2, 1, 256, 4, 128, dtype=torch.bfloat16, device=device)
    k, v = torch.zeros(2, 1, 1, 256, 2, 128, dtype=torch.bfloat16, device=device)
    lse = torch.zeros(1, 4, 256, device=device)
    times: list[float] = []

    def burst() -> None:
        start = time.perf_counter()
        for _ in range(50):
            backend.forward(q, k, v, out, lse, None, table, params=PARAMS)
        times.append((time.perf_counter() - start) / 50)
        torch.cuda.synchronize()

    burst()
    benchmark(burst)
    assert statistics.median(times) < LIMIT, f"{statistics.median(times) * 1e6:.1f} us a launch"
