"""Times launch settings on this GPU and keeps the fastest, for who asks: `ring_triton.tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from ring_core.backend import Params, on_device
from ring_core.plan import Problem, make_plan
from ring_triton import tuned
from ring_triton.backend import Direction, TritonBackend
from ring_triton.portable.settings import Kernel as PortableKernel
from ring_triton.portable.settings import place_of, setting_of
from ring_triton.tuned import Kernel, Place

Timer = Callable[[Callable[[], None]], float]
"""Milliseconds of a call."""


@dataclass(frozen=True, slots=True)
class Result:
    """What was found for one kernel. setting: the fastest; milliseconds: its time, and that of the table's setting."""

    place: Place
    setting: dict[str, Any]
    milliseconds: float
    before: float
    tried: int


def tune(
    head_dim: int = 128,
    *,
    causal: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    length: int = 8192,
    batch: int = 1,
    heads: tuple[int, int] = (16, 16),
    path: str | None = None,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
) -> list[Result]:
    """Times the candidate settings of the kernels that a call takes, forward and backward, and keeps the fastest in
    `ring_triton.tuned.cache_file()`. From then on this process takes them; others do with RING_TRITON_TUNE=1.

    Takes minutes for each kernel, most of it compiling. A result counts for all calls of that head dim, kind of
    mask (all visible or not) and size of elements, on this GPU and with this triton.

    Args:
        head_dim, causal, dtype, length, batch, heads: the call: heads are those of q and of k and v.
        path: whose kernels, as in `TritonBackend`; None: those that the call takes.
        device: the GPU.
        timer: instead of `triton.testing.do_bench`.

    Returns:
        One result for each kernel: the fastest setting, its time and that of the setting before in ms, how many tried.

    Raises:
        UnsupportedError: `path` cannot do the call.
        ValueError: there is no such path.
    """
    device = torch.device(device)
    backend, params = TritonBackend(path), Params(head_dim**-0.5)
    problem = Problem(length, length, length, length, None, 0 if causal else None, "contiguous", 1)
    step = make_plan(problem, 0, "gather").steps[0]
    tables = on_device(step.forward, device), on_device(step.backward, device)
    q, dout, out = torch.randn(3, batch, length, heads[0], head_dim, device=device).to(dtype)
    k, v, dk, dv = torch.randn(4, 1, batch, length, heads[1], head_dim, device=device)
    k, v = k.to(dtype), v.to(dtype)
    lse = torch.zeros(batch, heads[0], length, device=device)
    timer = timer or _median

    def forward() -> None:
        backend.forward(q, k, v, out, lse, None, tables[0], params=params)

    def backward_of(state: Any) -> Callable[[], None]:
        return lambda: backend.backward(state, q, k, v, dout, dk, dv, tables[1], params=params)

    results: list[Result] = []
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # whose events the timer takes
        for place, default in _places(backend, q, params, tuned.mask_of(step.forward)):
            if place.kernel.endswith("forward"):
                run = forward
            else:
                if not results:
                    forward()
                shape = torch.Size((batch, length, heads[1], head_dim))
                run = backward_of(backend.prepare(q, shape, out, dout, lse, None, params=params))
            results.append(_fastest(place, default, run, timer))
    for result in results:
        times = {"milliseconds": result.milliseconds, "before": result.before, "tried": result.tried}
        tuned.remember(result.place, device, {"setting": result.setting, **times})
    tuned.ask_for()
    return results


def _places(backend: TritonBackend, q: Tensor, params: Params, mask: tuned.Mask) -> Iterator[tuple[Place, Any]]:
    """The kernels that a call takes, and the table's settings for them."""
    head_dim, bits = q.shape[-1], q.dtype.itemsize * 8
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        if backend.path_of(direction, q, params) == "portable":
            both: tuple[PortableKernel, ...] = ("gradients_kv", "gradients_q")
            names: tuple[PortableKernel, ...] = ("forward",) if direction == "forward" else both
            for name in names:
                yield place_of(name, head_dim, mask, bits), setting_of(q.device, name, head_dim, bits)
        elif direction == "forward":
            from ring_triton.hopper.settings import padded_head_dim, settings_for

            yield Place("hopper forward", padded_head_dim(head_dim), mask, bits), settings_for(head_dim)
        else:
            from ring_triton.hopper.backward_settings import backward_head_dim, backward_settings_for

            yield Place("hopper backward", backward_head_dim(head_dim), mask, bits), backward_settings_for(head_dim)


def candidates(kernel: Kernel, default: Any) -> list[Any]:
    """Settings near the table's, which comes first."""
    found = [default]

    def add(**changes: Iterable[Any]) -> None:
        for name, values in changes.items():
            found.extend(replace(base, **{name: value}) for base in list(found) for value in values)

    if kernel == "hopper forward":
        add(block=(64, 128), stages=(2, 3), ping_pong=(True, False), overlap=(0, 1))
    elif kernel == "hopper backward":
        add(order=(0, 1), swap=(True, False), packed=(True, False))
    else:
        add(rows=(32, 64, 128), keys=(32, 64, 128), warps=(4, 8), stages=(1, 2, 3))
    return list(dict.fromkeys(found))


def _fastest(place: Place, default: Any, run: Callable[[], None], timer: Timer) -> Result:
    times: dict[Any, float] = {}
    for setting in candidates(place.kernel, default):
        with tuned.trying(place, asdict(setting)):
            try:
                times[setting] = timer(run)
            except (OutOfResources, PTXASError):  # more shared memory or registers than there are
                continue
    best = min(times, key=times.__getitem__)
    return Result(place, asdict(best), times[best], times.get(default, times[best]), len(times))


def _median(run: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median"))
