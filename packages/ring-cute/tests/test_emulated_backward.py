"""The backward's own PTX and host code on the CPU (`ptx_machine`), against the contract's reference in fp64."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from itertools import islice
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ring_core.backend import Flags, Params, on_device
from ring_core.segment import Segment
from ring_core.testing.direct import (
    BackwardCase,
    Functions,
    backward_plans,
    causal_keys,
    key_batches,
    key_steps,
    random_keys,
    run_backward,
    table_of,
)
from ring_cute.hopper import backward_launch
from ring_cute.hopper.backward_settings import BackwardKind, BackwardSettings, backward_settings_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the host code is linked by cc"),
]
CPU = torch.device("cpu")
CAUSAL = causal_keys(200, 300, causal=True, offset=100)
STRIPES = table_of([Segment(0, 100, 0, 0, 150, -100, 40, 3, 1, 4, -1, 3)])
WINDOW = table_of([Segment(0, 200, 0, 0, 200, -60, 20, 0, 0, 1, -1, 3)])
WIDE = causal_keys(200, 150, causal=True, offset=-50)
PAIRED = backward_settings_for(192)
MORE_STAGES = replace(PAIRED, q_stages=3, dq_buffers=2)
FEWER_STAGES = replace(PAIRED, do_stages=1, k_columns=0)
ALONE = BackwardSettings(dq_buffers=3, k_columns=128, v_columns=128)
STEPS = [table_of([Segment(0, 90, n, 0, 60, -90, -40 * n, 0, 60 * n, 1, -1, 3)]) for n in range(2)]
CASES = [
    BackwardCase("one block", [causal_keys(64, 128)], 64, heads=(1, 1)),
    BackwardCase("causal, two heads a key head", [CAUSAL], 200),
    BackwardCase("causal, few heads: several CTAs add", [CAUSAL], 200, heads=(4, 1)),
    BackwardCase("D 64", [CAUSAL], 200, dim=64),
    BackwardCase("padded head dim", [causal_keys(130, 200, causal=True, offset=70)], 130, dim=40, dlse=True),
    BackwardCase("fp16, D 96", [causal_keys(100, 128)], 100, dim=96, dtype=torch.float16),
    BackwardCase("few keys", [causal_keys(200, 17)], 200),
    BackwardCase("few rows", [causal_keys(5, 300)], 5, sinks=True),
    BackwardCase("final", [causal_keys(200, 256, causal=True, offset=56)], 200, heads=(2, 2), final=True),
    BackwardCase(
        "final, keys that nobody names", [causal_keys(64, 128)], 64, heads=(1, 1), piece_length=140, final=True
    ),
    BackwardCase("blocks of 64", [CAUSAL], 200, settings=BackwardSettings()),
    BackwardCase("D 64, blocks of 96", [CAUSAL], 200, dim=64, settings=BackwardSettings(block=96)),
    BackwardCase("three stages, D 64", [CAUSAL], 200, dim=64, settings=BackwardSettings(block=96, q_stages=3)),
    replace(key_steps(64, batch=1, heads=(1, 1)), name="four steps", departures=True),
    replace(key_batches(64), name="own batch entries"),
    random_keys(1, 64),
    random_keys(2, 128),
    BackwardCase("D 256, one block", [causal_keys(64, 64)], 64, heads=(1, 1), dim=256),
    BackwardCase("D 256, two heads a key head", [WIDE], 200, dim=256, dlse=True),
    BackwardCase(
        "D 256, final", [causal_keys(200, 130, causal=True, offset=-70)], 200, dim=256, final=True, heads=(2, 2)
    ),
    BackwardCase("D 256, few heads: several CTAs add", [WIDE], 200, dim=256, heads=(6, 1)),
    BackwardCase("D 192, two heads a key head", [WIDE], 200, dim=192, dlse=True),
    BackwardCase("D 192, one block", [causal_keys(64, 128)], 64, heads=(1, 1), dim=192),
    BackwardCase("D 192, one block, few keys", [causal_keys(40, 64)], 40, heads=(1, 1), dim=192),
    BackwardCase("D 192, a tile of 62 keys", [causal_keys(200, 190)], 200, heads=(2, 1), dim=192, final=True),
    BackwardCase(
        "D 192, tiles without a block", [causal_keys(70, 400, causal=True, offset=-100)], 70, heads=(1, 1), dim=192
    ),
    BackwardCase("D 192, few heads: several pairs add", [WIDE], 200, dim=192, heads=(6, 1)),
    BackwardCase("D 192, three stages of Q, two buffers of dq", [WIDE], 200, dim=192, settings=MORE_STAGES),
    BackwardCase("D 192, one stage of dO, no K in registers", [WIDE], 200, dim=192, settings=FEWER_STAGES),
    replace(random_keys(0, 192), settings=FEWER_STAGES, name="D 192, one stage of dO, random"),
    BackwardCase("D 192, alone", [WIDE], 200, dim=192, settings=ALONE),
    BackwardCase("D 192, alone, two buffers of dq", [WIDE], 200, dim=192, settings=BackwardSettings()),
    BackwardCase("fp16, D 200", [causal_keys(130, 100, causal=True, offset=-30)], 130, dim=200, dtype=torch.float16),
    BackwardCase("D 136, few keys", [causal_keys(200, 17)], 200, dim=136, sinks=True),
    BackwardCase("D 160, two steps", STEPS[::-1], 90, heads=(1, 1), dim=160, departures=True, piece_length=60),
    key_batches(192),
    random_keys(0, 256),
    random_keys(2, 192),
    random_keys(3, 144, final=True),
    *(replace(case, heads=(2, 1)) for case in islice(backward_plans(192), 3, None, 9)),
    BackwardCase("softcap, GQA", [CAUSAL], 200, softcap=0.7),
    BackwardCase("softcap, D 40", [causal_keys(130, 200, causal=True, offset=70)], 130, dim=40, dlse=True, softcap=2.0),
    BackwardCase("softcap, fp16", [CAUSAL], 200, dim=64, heads=(4, 1), softcap=1.0, dtype=torch.float16),
    BackwardCase("softcap, window, final", [WINDOW], 200, heads=(1, 1), softcap=3.0, final=True),
    replace(key_steps(64, batch=1, heads=(1, 1), softcap=1.0), name="softcap, four steps"),
    replace(random_keys(3, 64, softcap=0.5), name="softcap, random"),
    BackwardCase("ALiBi, GQA, two batches", [CAUSAL], 200, batch=2, alibi=True),
    BackwardCase("ALiBi, D 40", [causal_keys(130, 200, causal=True, offset=70)], 130, dim=40, dlse=True, alibi=True),
    BackwardCase("ALiBi, both sides of the diagonal", [WINDOW], 200, dim=64, heads=(4, 1), final=True, alibi=True),
    BackwardCase("ALiBi, stripes", [STRIPES], 100, dim=64, alibi=True, dtype=torch.float16),
    replace(key_steps(64, batch=1, heads=(1, 1), alibi=True), name="ALiBi, four steps"),
    BackwardCase("ALiBi and softcap", [CAUSAL], 200, softcap=0.7, alibi=True),
    BackwardCase("ALiBi and softcap, stripes", [STRIPES], 100, dim=64, softcap=0.7, alibi=True),
    BackwardCase("softcap, D 256", [WIDE], 200, dim=256, softcap=0.7),
    BackwardCase("ALiBi, D 192", [WIDE], 200, dim=192, alibi=True),
    BackwardCase("softcap, fp16, D 160", [WIDE], 200, dim=160, softcap=0.7, dtype=torch.float16),
    BackwardCase("ALiBi and softcap, stripes, D 192", [STRIPES], 100, dim=192, softcap=0.7, alibi=True),
    BackwardCase("ALiBi and softcap, stripes, D 256", [STRIPES], 100, dim=256, softcap=0.7, alibi=True),
]


def emulated(processors: int = 2) -> Functions:
    """`backward_launch` on the machine."""
    from emulated import backward_on_cpu

    def prepare(*tensors: Tensor, params: Params) -> backward_launch.BackwardState:
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

    return Functions(prepare, backward, finish)


def test_settings_in_which_loads_and_products_wait_in_a_circle_are_refused() -> None:
    from ring_cute.hopper.backward import HopperBackward

    settings = BackwardSettings(q_stages=1, dq_buffers=3)
    with pytest.raises(AssertionError, match="a stage of its own"):
        HopperBackward(BackwardKind("bfloat16", 192, "final", False, False, settings))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: BackwardCase) -> None:
    message, fine = run_backward(case, emulated(), CPU)
    assert fine, message


ORDERED = [replace(key_batches(64), heads=(1, 1)), random_keys(1, 64), BackwardCase("two heads", [CAUSAL], 200, dim=64)]
ORDERED += [BackwardCase(f"D {dim}", [WIDE], 200, dim=dim) for dim in (192, 256)]
ORDERED += [random_keys(1, 192), BackwardCase("D 192, a tile of 62 keys", [causal_keys(100, 190)], 100, dim=192)]


@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.name)
def test_deterministic(case: BackwardCase) -> None:
    """By one CTA or pair, since the machine runs one after the other and they would wait for each other."""
    processors = (case.settings or backward_settings_for(case.dim)).cluster
    message, fine = run_backward(replace(case, deterministic=True), emulated(processors), CPU)
    assert fine, message


@pytest.mark.parametrize("dim", [64, 192])
def test_flags(dim: int) -> None:
    """Pieces that are there, and poison: the result is that without flags, and every kernel ends."""
    on = emulated()
    strips = [[Segment(0, 64, c, 0, 128, -64, 128, 0, 0, 1, -1, 3)] for c in range(2)]
    table = on_device(table_of(*strips), CPU)
    q, dout, out = (torch.randn(1, 64, 1, dim).bfloat16() for _ in range(3))
    kv = torch.randn(2, 2, 1, 128, 1, dim).bfloat16()
    state = on.prepare(q, out, dout, torch.full((1, 1, 64), 4.0), None, params=Params(0.1))
    results = []
    for value, epoch in ((None, 0), (7, 7), (-1, 1 << 30)):
        dkv = torch.zeros(kv.shape)
        flags = None
        if value is not None:
            words = torch.full((2,), value, dtype=torch.int32), torch.full((1,), epoch, dtype=torch.int32)
            flags = Flags(*words)
        on.backward(state, q, kv[0], kv[1], dout, dkv[0], dkv[1], table, params=Params(0.1), flags=flags)
        results.append(dkv)
    assert results[0].any()
    assert all(torch.equal(x, results[0]) for x in results[1:])


@pytest.mark.parametrize("dim", [64, 256])
def test_the_machine_notices_early_reads(dim: int) -> None:
    """Where barriers forget the bytes they expect, the kernel reads what has not arrived, and the machine lets it."""
    import ptx_machine

    def hasty(barrier: ptx_machine.Barrier) -> None:
        if barrier.pending == 0:
            barrier.phase ^= 1
            barrier.pending = barrier.count

    on = emulated()
    with patch.object(ptx_machine.Barrier, "check", hasty):
        _, fine = run_backward(BackwardCase("hasty", [causal_keys(256, 128)], 256, heads=(1, 1), dim=dim), on, CPU)
    assert not fine
