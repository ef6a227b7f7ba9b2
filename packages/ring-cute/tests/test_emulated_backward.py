"""The backward's own PTX and host code on the CPU (`ptx_machine`), against the contract's reference in fp64."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from backward_cases import Case, chunks, one, own_batches, random_case, run, table_of
from torch import Tensor

from ring_core.backend import Flags, Params, on_device
from ring_core.segment import Segment
from ring_cute.hopper import backward_launch
from ring_cute.hopper.backward_settings import BackwardSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the host code is linked by cc"),
]
CPU = torch.device("cpu")
CAUSAL = one(200, 300, causal=True, offset=100)
STRIPES = table_of([Segment(0, 100, 0, 0, 150, -100, 40, 3, 1, 4, -1, 3)])
WINDOW = table_of([Segment(0, 200, 0, 0, 200, -60, 20, 0, 0, 1, -1, 3)])
CASES = [
    Case("one block", [one(64, 128)], 64, heads=(1, 1)),
    Case("causal, two heads a key head", [CAUSAL], 200),
    Case("causal, few heads: several CTAs add", [CAUSAL], 200, heads=(4, 1)),
    Case("D 64", [CAUSAL], 200, dim=64),
    Case("padded head dim", [one(130, 200, causal=True, offset=70)], 130, dim=40, dlse=True),
    Case("fp16, D 96", [one(100, 128)], 100, dim=96, dtype=torch.float16),
    Case("few keys", [one(200, 17)], 200),
    Case("few rows", [one(5, 300)], 5, sinks=True),
    Case("final", [one(200, 256, causal=True, offset=56)], 200, heads=(2, 2), final=True),
    Case("final, keys that nobody names", [one(64, 128)], 64, heads=(1, 1), piece_length=140, final=True),
    Case("plain", [CAUSAL], 200, settings=BackwardSettings()),
    Case("plain, D 64, wide", [CAUSAL], 200, dim=64, settings=BackwardSettings(block=96)),
    Case("rolling, D 64", [CAUSAL], 200, dim=64, settings=BackwardSettings(block=96, q_stages=3, rolling=True)),
    replace(chunks(64, batch=1, heads=(1, 1)), name="four steps", departures=True),
    replace(own_batches(64), name="own batch entries"),
    random_case(1, 64),
    random_case(2, 128),
    Case("softcap, GQA", [CAUSAL], 200, softcap=0.7),
    Case("softcap, D 40", [one(130, 200, causal=True, offset=70)], 130, dim=40, dlse=True, softcap=2.0),
    Case("softcap, ahead", [CAUSAL], 200, dim=64, heads=(4, 1), softcap=1.0, dtype=torch.float16),
    Case("softcap, window, final", [WINDOW], 200, heads=(1, 1), softcap=3.0, final=True),
    replace(chunks(64, batch=1, heads=(1, 1)), name="softcap, four steps", softcap=1.0),
    random_case(3, 64, softcap=0.5),
    Case("ALiBi, GQA, two batches", [CAUSAL], 200, batch=2, alibi=True),
    Case("ALiBi, D 40", [one(130, 200, causal=True, offset=70)], 130, dim=40, dlse=True, alibi=True),
    Case("ALiBi, both sides of the diagonal", [WINDOW], 200, dim=64, heads=(4, 1), final=True, alibi=True),
    Case("ALiBi, stripes", [STRIPES], 100, dim=64, alibi=True, dtype=torch.float16),
    replace(chunks(64, batch=1, heads=(1, 1)), name="ALiBi, four steps", alibi=True),
    Case("ALiBi and softcap", [CAUSAL], 200, softcap=0.7, alibi=True),
    Case("ALiBi and softcap, stripes", [STRIPES], 100, dim=64, softcap=0.7, alibi=True),
]


def emulated(processors: int = 2) -> dict[str, Any]:
    """`backward_launch` on the machine."""
    from emulated import backward_on_cpu

    def prepare(*tensors: Tensor) -> backward_launch.BackwardState:
        with backward_on_cpu(*tensors):
            return backward_launch.prepare(*tensors)  # type: ignore[arg-type]

    def backward(state: backward_launch.BackwardState, *tensors: Any, **others: Any) -> None:
        flags = others.get("flags")
        words = () if flags is None else (flags.values, flags.epoch)
        more = others.get("departures"), others["params"].alibi_slopes
        with backward_on_cpu(state.memory, *tensors[:-1], *more, *words, processors=processors):
            backward_launch.backward(state, *tensors, **others)

    def finish(state: backward_launch.BackwardState, **others: Any) -> Any:
        with backward_on_cpu(state.memory):
            return backward_launch.finish(state, **others)

    return {"prepare": prepare, "backward": backward, "finish": finish}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    message, fine = run(case, CPU, **emulated())
    assert fine, message


ORDERED = [replace(own_batches(64), heads=(1, 1)), random_case(1, 64), Case("two heads", [CAUSAL], 200, dim=64)]


@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.name)
def test_deterministic(case: Case) -> None:
    """By one CTA, since the machine runs one after the other and they would wait for each other."""
    message, fine = run(replace(case, deterministic=True), CPU, **emulated(1))
    assert fine, message


def test_flags() -> None:
    """Pieces that are there, and poison: the result is that without flags, and every kernel ends."""
    on = emulated()
    strips = [[Segment(0, 64, c, 0, 128, -64, 128, 0, 0, 1, -1, 3)] for c in range(2)]
    table = on_device(table_of(*strips), CPU)
    q, dout, out = (torch.randn(1, 64, 1, 64).bfloat16() for _ in range(3))
    kv = torch.randn(2, 2, 1, 128, 1, 64).bfloat16()
    state = on["prepare"](q, out, dout, torch.full((1, 1, 64), 4.0), None)
    results = []
    for value, epoch in ((None, 0), (7, 7), (-1, 1 << 30)):
        dkv = torch.zeros(kv.shape)
        flags = None
        if value is not None:
            words = torch.full((2,), value, dtype=torch.int32), torch.full((1,), epoch, dtype=torch.int32)
            flags = Flags(*words)
        on["backward"](state, q, kv[0], kv[1], dout, dkv[0], dkv[1], table, params=Params(0.1), flags=flags)
        results.append(dkv)
    assert results[0].any()
    assert all(torch.equal(x, results[0]) for x in results[1:])


def test_the_machine_notices_early_reads() -> None:
    """Where barriers forget the bytes they expect, the kernel reads what has not arrived, and the machine lets it."""
    import ptx_machine

    def hasty(barrier: ptx_machine.Barrier) -> None:
        if barrier.pending == 0:
            barrier.phase ^= 1
            barrier.pending = barrier.count

    on = emulated()
    with patch.object(ptx_machine.Barrier, "check", hasty):
        _, fine = run(Case("hasty", [one(256, 128)], 256, heads=(1, 1), dim=64), CPU, **on)
    assert not fine
