"""What `test_direct` runs: python direct_checks.py CHECK."""

from __future__ import annotations

import ctypes
import sys
from typing import Any
from unittest.mock import patch

import torch
import triton
from fake_driver import inputs, no_gpu, no_gpu_backward, no_gpu_core, no_gpu_portable, parameters_of
from triton import knobs

from ring_core import merge_triton
from ring_core.backend import DeviceTable, Dropout, Flags, Params, on_device
from ring_core.comm import pack_triton, sum_triton
from ring_core.plan import Problem, make_plan
from ring_triton.hopper import backward_launch, launch
from ring_triton.portable import launch as portable


class Launched:
    """Takes what cuLaunchKernel would, and reads the parameters as the driver would."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> int:
        function, *numbers, stream, parameters, extra = arguments
        assert isinstance(function, ctypes.c_void_p) and extra is None
        self.calls.append((*(x.value for x in numbers), stream.value, list(parameters)))
        return 0


def table(length: int = 256) -> DeviceTable:
    plan = make_plan(Problem(length, length, length, length, None, 0, "contiguous", 1), 0, "gather")
    return on_device(plan.steps[0].forward, torch.device("cpu"))


def number(address: int, kind: Any) -> Any:
    return ctypes.cast(address, ctypes.POINTER(kind)).contents.value


def layout() -> None:
    """As many parameters as the kernel has, each of its size, with and without a state, sinks and flags."""
    given = table()
    ints = torch.zeros(64, dtype=torch.int32)
    for sinks in (None, torch.zeros(4)):
        for flags in (None, Flags(ints[3:7], ints[9:10])):
            q, k, v, out, lse = inputs()
            seen = Launched()
            with no_gpu(seen) as kernel:
                for _ in range(2):
                    launch.forward(q, k, v, out, lse, None, given, scale=0.1, sinks=sinks, flags=flags)
                assert kernel.compiled == 1 and len(seen.calls) == 1
                *_, parameters = seen.calls[0]
                sizes = parameters_of(kernel.last.asm["ptx"])
                assert len(parameters) == len(sizes), (len(parameters), sizes)
                known = list(given.host.cache["hopper forward"]._known.values())[-1]
                held = {ctypes.addressof(x): ctypes.sizeof(x) for x in known.numbers}
                maps = {place for place, _, _ in known._maps}
                for place, (address, size) in enumerate(zip(parameters, sizes, strict=True)):
                    want = 128 if place in maps else held.get(address, 8)
                    assert size == want, (place, size, want)


def pointers() -> None:
    """Those of the call, in the kernel's order; numbers as given; descriptors at the tensors' addresses."""
    given = table()
    first, second = inputs(), inputs()
    seen = Launched()
    sinks = torch.zeros(4)
    with no_gpu(seen) as kernel:
        launch.forward(*first, None, given, scale=0.5, sinks=sinks)
        launch.forward(*first, None, given, scale=0.5, sinks=sinks)
        launch.forward(*second, None, given, scale=0.5, sinks=sinks)
        names = [n for n, kind in kernel.last.src.signature.items() if kind != "constexpr"]
    assert len(seen.calls) == 2 and kernel.compiled == 1
    (known,) = given.host.cache["hopper forward"]._known.values()
    *grid, stream, parameters = seen.calls[-1]
    prepared = launch.prepare(given, 1, 256, launch.settings_for(128).block)
    assert grid[:3] == [min(132, 4 * prepared.count), 1, 1] and grid[3] == 32 * kernel.last.packed_metadata[0]
    assert grid[6] == kernel.last.metadata.shared and stream == 7
    _, _, _, out, lse = second
    want = [out, lse, None, sinks, prepared.items, prepared.walk]
    for got, x in zip(known._pointers, want, strict=False):
        assert got == (0 if x is None else x.data_ptr())
    ranks = {"q_desc": 4, "k_desc": 5, "v_desc": 5, "o_desc": 4, "out_desc": 4}
    place, values = 0, {}
    for name in names:
        values[name] = parameters[place]
        place += 1 + 2 * ranks.get(name, 0)
    assert place + 2 == len(parameters), "the scratch pointers come last"
    assert abs(number(values["scale"], ctypes.c_float) - 0.5 * 1.4426950408889634) < 1e-6
    assert number(values["total"], ctypes.c_int32) == 4 * prepared.count
    assert number(values["out_s"], ctypes.c_int32) == out.stride(1)
    assert number(parameters[1], ctypes.c_int32) == 1 and number(parameters[3], ctypes.c_int32) == 256
    assert [set(found) for _, _, found in known._maps] == [
        {first[n].data_ptr(), second[n].data_ptr()}
        for n in (0, 1, 2, 0, 3)  # o_desc: q where there is no state
    ]


def keys() -> None:
    """Whatever shapes a launch is compiled or prepared anew: strides, scale, state, alignment."""
    given = table()
    seen = Launched()
    q, k, v, out, lse = inputs()
    wide = torch.zeros(1, 256, 4, 256, dtype=torch.bfloat16)[..., :128]
    odd = torch.zeros(1 * 4 * 256 + 1)[1:].view(1, 4, 256)  # 4 bytes past a multiple of 16
    with no_gpu(seen) as kernel:
        launch.forward(q, k, v, out, lse, None, given, scale=0.5)
        for changed in ((wide, k, v, out, lse), (q, k, v, wide, lse)):
            launch.forward(*changed, None, given, scale=0.5)
        launch.forward(q, k, v, out, lse, None, given, scale=0.25)
        launch.forward(q, k, v, out, lse, torch.zeros(q.shape), given, scale=0.5)
        assert kernel.compiled == 5 and not seen.calls
        for _ in range(2):
            launch.forward(q, k, v, out, odd, None, given, scale=0.5)
        assert kernel.compiled == 7 and not seen.calls, "what is not aligned goes through Triton"
        launch.forward(q, k, v, out, lse, None, given, scale=0.25)
        assert kernel.compiled == 7 and len(seen.calls) == 1


def profilers() -> None:
    """Hooks see every launch."""
    given, seen = table(), Launched()
    hook = lambda *_: None  # noqa: E731
    with no_gpu(seen) as kernel:
        launch.forward(*inputs(), None, given, scale=0.5)
        knobs.runtime.launch_enter_hook.add(hook)
        launch.forward(*inputs(), None, given, scale=0.5)
        assert kernel.compiled == 2 and not seen.calls
        knobs.runtime.launch_enter_hook.remove(hook)
        launch.forward(*inputs(), None, given, scale=0.5)
        assert kernel.compiled == 2 and len(seen.calls) == 1


def copies() -> None:
    """Strides that TMA does not take: the launch is that of dense copies, now and later."""
    given, seen = table(), Launched()
    _, k, v, out, lse = inputs()
    odd = torch.zeros(1, 256, 4, 132, dtype=torch.bfloat16)[..., :128]  # 264 bytes a head
    assert "16-byte aligned" in launch.supports(odd, k, v)
    with no_gpu(seen) as kernel:
        for _ in range(2):
            launch.forward(odd, k, v, out, lse, None, given, scale=0.5)
        assert kernel.compiled == 1 and len(seen.calls) == 1
        (known,) = given.host.cache["hopper forward"]._known.values()
        assert odd.data_ptr() not in known._maps[0][2]


def portable_kernels() -> None:
    """Forward, prepare and backward, twice: the second time by the driver alone, with the second call's pointers."""
    problem = Problem(256, 256, 256, 256, None, 0, "contiguous", 1)
    step = make_plan(problem, 0, "gather").steps[0]
    forward, backward = (on_device(x, torch.device("cpu")) for x in (step.forward, step.backward))
    seen = Launched()
    params = Params(0.1, softcap=3.0, alibi_slopes=torch.zeros(4), dropout=Dropout(0.1, torch.zeros(1).long()))
    with no_gpu_portable(seen) as kernels:
        for _ in range(2):
            q, k, v, out, lse = inputs()
            portable.forward(q, k, v, out, lse, None, forward, params)
            state = portable.prepare(q, out, q, lse, None)
            dk, dv = torch.zeros(2, *k.shape)
            portable.backward(state, q, k, v, out, dk, dv, backward, params)
        assert [kernel.compiled for kernel in kernels.values()] == [1] * 4
    by_kernel = dict(zip(("forward", "prepare", "gradients_kv", "gradients_q"), seen.calls, strict=True))
    fresh: dict[str, list[torch.Tensor]] = {
        "forward": [q, k, v, out, lse],
        "prepare": [out, q, lse, lse, state.delta, state.scaled_lse],
        "gradients_kv": [q, k, v, out, dk, dv, state.scaled_lse, state.delta],
        "gradients_q": [q, k, v, out, state.dq, state.scaled_lse, state.delta],
    }
    for name, (*_, parameters) in by_kernel.items():
        kernel = kernels[f"{name}_kernel"].last
        assert len(parameters) == len(parameters_of(kernel.asm["ptx"])), name
        got = [number(address, ctypes.c_uint64) for address in parameters[: len(fresh[name])]]
        assert got == [x.data_ptr() for x in fresh[name]], name


def core_kernels() -> None:
    """Merge, packing and the sum of contributions, twice: the second time by the driver alone, with its pointers."""
    seen = Launched()
    with no_gpu_core(seen) as kernels:
        for _ in range(2):
            out, block = torch.zeros(2, 1, 32, 4, 64)
            lse, block_lse = torch.zeros(2, 1, 4, 32)
            merge_triton.merge_kernel_(out, lse, block, block_lse, out)
            k, v = torch.zeros(2, 1, 32, 4, 64)
            target, places = torch.zeros(1, 16, 2, 4, 64), torch.tensor([[0, 4, 8], [16, 12, 4]], dtype=torch.int32)
            pack_triton.pack(k, v, target, places, 8)
            own, arrived = torch.zeros(2, 1, 16, 2, 4, 64)
            cells = torch.zeros(2, 5, dtype=torch.int32)
            sum_triton.sum_contributions(own, None, arrived, cells, 8, 0, 2, k, v, home_in_place=True)
        assert [kernel.compiled for kernel in kernels] == [1] * 3
    fresh = ([out, lse, block, block_lse, out], [k, v, target, places], [own, own, arrived, cells, k, v])
    for kernel, tensors, (*_, parameters) in zip(kernels, fresh, seen.calls, strict=True):
        assert len(parameters) == len(parameters_of(kernel.last.asm["ptx"]))
        got = [number(address, ctypes.c_uint64) for address in parameters[: len(tensors)]]
        assert got == [x.data_ptr() for x in tensors]


def hopper_backward() -> None:
    """Prepare, backward with flags and counters, finish: the second time by the driver alone."""
    problem = Problem(256, 256, 256, 256, None, 0, "contiguous", 1)
    given = on_device(make_plan(problem, 0, "gather").steps[0].backward, torch.device("cpu"))
    seen, params = Launched(), Params(0.1)
    ints = torch.zeros(64, dtype=torch.int32)
    with no_gpu_backward(seen) as kernels:
        for _ in range(2):
            q, k, v, out, lse = inputs()
            dout = torch.zeros_like(q)
            state = backward_launch.prepare(q, out, dout, lse, None)
            dk, dv = torch.zeros(2, *k.shape)
            flags = Flags(ints[3:7], ints[9:10])
            backward_launch.backward(
                state, q, k, v, dout, dk, dv, given, params=params, flags=flags, departures=ints[17:20]
            )
            dq, _ = backward_launch.finish(state, params=params)
        assert [kernel.compiled for kernel in kernels.values()] == [1] * 3
    by_kernel = dict(zip(("prepare", "backward", "finish"), seen.calls, strict=True))
    for name, (*_, parameters) in by_kernel.items():
        kernel = kernels[f"{name}_kernel"].last
        (known,) = [
            x
            for found in (backward_launch._prepared, backward_launch._finished, given.host.cache["hopper backward"])
            for x in found._known.values()
            if list(x._parameters) == parameters
        ]
        maps, held = (
            {place for place, _, _ in known._maps},
            {ctypes.addressof(x): ctypes.sizeof(x) for x in known.numbers},
        )
        sizes = [128 if place in maps else held.get(address, 8) for place, address in enumerate(parameters)]
        assert sizes == parameters_of(kernel.asm["ptx"]), name
        if name == "backward":
            prepared = backward_launch.schedule_for(given, 1, backward_launch.backward_settings_for(128).block, True)
            want = (dk, dv, prepared.items, prepared.walk, flags.values, flags.epoch, ints[17:20])
            assert list(known._pointers) == [x.data_ptr() for x in want]
            assert state.sums is not None
            at = [q, k, v, dout, state.scaled_lse, state.delta, state.sums]
            assert [parameters[place] for place, _, _ in known._maps] == [
                known._maps[number][2][x.data_ptr()][0] for number, x in enumerate(at)
            ]
    assert [number(by_kernel["finish"][-1][n], ctypes.c_uint64) for n in range(2)] == [
        state.sums.data_ptr(),
        dq.data_ptr(),
    ]


def hopper_backward_final() -> None:
    """dk and dv in the inputs' dtype: the kernel's own where it writes them all, zeroed first where it does not, and
    made from sums in fp32 where several programs have a part of each."""

    def backward_table(length: int, left: int | None) -> DeviceTable:
        problem = Problem(256, length, 256, length, left, 0, "contiguous", 1)
        return on_device(make_plan(problem, 0, "gather").steps[0].backward, torch.device("cpu"))

    seen, params = Launched(), Params(0.1)
    given = backward_table(256, None)
    q, k, v, out, lse = inputs()

    def run(k: torch.Tensor, v: torch.Tensor, table: DeviceTable, dtype: torch.dtype) -> list[torch.Tensor]:
        state = backward_launch.prepare(q, out, q, lse, None)
        gradients = [torch.full(k.shape, 7.0, dtype=dtype) for _ in range(2)]
        backward_launch.backward(state, q, k, v, q, *gradients, table, params=params)
        return gradients

    with no_gpu_backward(seen) as kernels:
        compiled = kernels["backward_kernel"]
        for times in (1, 2):
            dk, dv = run(k, v, given, torch.bfloat16)
            assert compiled.compiled == 1 and len(seen.calls) == 2 * (times - 1), "prepare and backward, once more"
            assert (dk == 7).all() and (dv == 7).all(), "the kernel writes every key: nothing to do before"
        (known,) = given.host.cache["hopper backward"]._known.values()
        assert list(known._pointers)[:2] == [dk.data_ptr(), dv.data_ptr()]
        assert compiled.last.src.signature["dk"] == compiled.last.src.signature["dv"] == "*bf16"
        run(k, v, given, torch.float32)
        assert compiled.compiled == 2 and compiled.last.src.signature["dk"] == "*fp32"
        wide_k, wide_v = torch.zeros(2, 1, 1, 400, 2, 128, dtype=torch.bfloat16)
        for _ in range(2):  # keys that no window reaches
            assert not any(x.any() for x in run(wide_k, wide_v, backward_table(400, 30), torch.bfloat16))
        with patch.object(backward_launch, "_split", lambda *_: 2):
            table = backward_table(256, 200)  # another plan, with a cache of its own
            for times in (1, 2):
                calls = len(seen.calls)
                dk, dv = run(k, v, table, torch.bfloat16)
                assert not dk.any() and not dv.any(), "sums that the kernel has left as they were: zeros"
                assert len(seen.calls) == calls + times, "prepare alone, then both"
            (known,) = table.host.cache["hopper backward"]._known.values()
            assert dk.data_ptr() not in list(known._pointers)
            assert compiled.last.src.signature["dk"] == "*fp32"


if __name__ == "__main__":
    print(triton.__version__)
    globals()[sys.argv[1]]()
