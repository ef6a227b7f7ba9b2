"""The forward's own PTX and host code on the CPU (`ptx_machine`), against the contract's reference in fp64."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import gpu_probe
import pytest
import torch

from ring_core.backend import Flags, Params, on_device
from ring_core.segment import FIRST, LAST, Segment, Table
from ring_core.testing.direct import (
    ForwardCase,
    causal_steps,
    causal_table,
    own_batches,
    random_queries,
    run_forward,
    short_strips,
    table_of,
)
from ring_cute.hopper.launch import forward
from ring_cute.settings import Settings, settings_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the host code is linked by cc"),
]
CPU = torch.device("cpu")


def two_steps(q_len: int) -> list[Table]:
    """A strip whose first keys come second."""
    k_len = q_len // 2
    return [
        causal_table(q_len, k_len, causal=True, k_position=k_len, flags=FIRST),
        causal_table(q_len, k_len, causal=True, flags=LAST),
    ]


def case(name: str, tables: list[Table], q_len: int, **more: Any) -> ForwardCase:
    return ForwardCase(name, tables, q_len, **{"heads": (1, 1), "dim": 64, **more})


CAUSAL = causal_table(200, 300, causal=True, k_position=-100)
WINDOW = table_of([Segment(0, 200, 0, 0, 300, -90, 140, 0, 0, 1, -1, FIRST | LAST)])
STRIPES = table_of(
    [
        Segment(0, 200, 0, 0, 200, -200, 0, 3, 1, 4, -1, FIRST),
        Segment(0, 200, 1, 0, 200, -200, -1, 3, 6, 4, -1, LAST),
    ]
)
ENDS = [causal_table(130, 333, causal=True, k_position=-203)]
CASES = [
    case("two blocks", [causal_table(128, 256, causal=False)], 128, dim=128),
    case("causal, GQA", [causal_table(300, 300, causal=True)], 300, heads=(2, 1)),
    case("ends, padded head dim", ENDS, 130, dim=40),
    case("D 192", ENDS, 130, dim=192),
    case(
        "D 256, two batches",
        [causal_table(130, 200, causal=True, k_position=-70)],
        130,
        dim=256,
        batch=2,
        dtype=torch.float16,
    ),
    case("D 96, four steps", causal_steps(200, (3, 2, 1, 0)), 200, dim=96),
    case("D 200, four steps", causal_steps(200, (3, 2, 1, 0)), 200, dim=200),
    case(
        "clusters, two steps",
        two_steps(500),
        500,
        heads=(2, 1),
        settings=replace(settings_for(64), cluster=2, cache_hints=True),
    ),
    case(
        "clusters, no key",
        [causal_table(200, 0, causal=False)],
        200,
        heads=(9, 1),
        settings=replace(settings_for(64), cluster=2),
    ),
    case("fp16", [causal_table(128, 256, causal=False)], 128, dtype=torch.float16),
    case("short keys", [causal_table(200, 17, causal=False)], 200),
    case("no key", [causal_table(200, 0, causal=False)], 200),
    case("own batch entries", [own_batches()], 256, batch=2),
    case("four steps", causal_steps(400, (3, 2, 1, 0)), 400),
    case("four steps, sinks", causal_steps(200, (1, 0, 3, 2)), 200, dim=128, sinks=True),
    case("short strips", short_strips(), 700),
    case("softcap, GQA, D 128", [CAUSAL], 200, heads=(2, 1), dim=128, softcap=0.7),
    case("softcap, D 40, fp16", ENDS, 130, dim=40, dtype=torch.float16, softcap=50.0),
    case("softcap, four steps", causal_steps(400, (3, 2, 1, 0)), 400, softcap=2.0),
    case("softcap, four steps, sinks", causal_steps(200, (1, 0, 3, 2)), 200, dim=128, sinks=True, softcap=1.0),
    case("softcap, short strips", short_strips(), 700, softcap=1.0),
    replace(random_queries(4, heads=(1, 1), dim=64, softcap=0.5), name="softcap, random", batch=2),
    case("softcap, D 256", [causal_table(130, 200, causal=True)], 130, dim=256, softcap=1.0),
    case("ALiBi, GQA, D 128", [CAUSAL], 200, heads=(2, 1), dim=128, batch=2, alibi=True),
    case("ALiBi, D 40, fp16", ENDS, 130, dim=40, dtype=torch.float16, alibi=True),
    case("ALiBi, both sides of the diagonal", [WINDOW], 200, alibi=True),
    case("ALiBi, stripes of two pieces", [STRIPES], 200, alibi=True),
    case("ALiBi, four steps", causal_steps(400, (3, 2, 1, 0)), 400, alibi=True),
    case(
        "ALiBi and softcap, four steps, sinks",
        causal_steps(200, (1, 0, 3, 2)),
        200,
        dim=128,
        sinks=True,
        softcap=1.0,
        alibi=True,
    ),
    case("ALiBi, short strips", short_strips(), 700, alibi=True),
    replace(
        random_queries(4, heads=(1, 1), dim=64, softcap=0.5, alibi=True), name="ALiBi and softcap, random", batch=1
    ),
    case("ALiBi, D 256", [causal_table(130, 200, causal=True)], 130, dim=256, alibi=True),
    random_queries(1, heads=(1, 1), dim=64, batch=2),
    random_queries(6, heads=(1, 1), batch=1),
    *(
        case(name, [causal_table(200, 300, causal=True, k_position=-100)], 200, settings=chosen)
        for name, chosen in gpu_probe.VARIANTS[64].items()
    ),
    *(
        case(
            f"D 128, {changed}",
            [causal_table(200, 500, causal=True, k_position=-300)],
            200,
            dim=128,
            settings=replace(settings_for(128), **changed),
        )
        for changed in (
            {"query_columns": 128, "lazy": False, "overlap": True},
            {"block": 160},
            {"cluster": 2, "block": 176},
            {"cache_hints": True, "consumers": 3, "consumer_registers": 160, "block": 80},
        )
    ),
]


def emulated(*tensors: Any, params: Params, settings: Settings | None) -> None:
    """`launch.forward` on the machine."""
    from emulated import on_cpu

    with on_cpu(*tensors[:-1], params.sinks, params.alibi_slopes):
        gpu_probe.forward(*tensors, params=params, settings=settings)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: ForwardCase) -> None:
    message, fine = run_forward(case, emulated, CPU)
    assert fine, message


def test_flags() -> None:
    """Pieces that are there, and poison: the result is that without flags, and every kernel ends."""
    from emulated import on_cpu

    ends = {0: FIRST, 2: LAST}
    strip = [Segment(0, 200, c, 0, 100, -200, 100, 0, 0, 1, -1, ends.get(c, 0)) for c in range(3)]
    table = on_device(table_of(strip), CPU)
    kv = torch.randn(2, 3, 1, 100, 1, 64).bfloat16()
    q = torch.randn(1, 200, 2, 64).bfloat16()
    results = []
    for value, epoch in ((None, 0), (7, 7), (-1, 1 << 30)):
        out, lse = torch.empty_like(q), torch.empty(1, 2, 200)
        flags = None
        if value is not None:
            words = torch.full((3,), value, dtype=torch.int32), torch.full((1,), epoch, dtype=torch.int32)
            flags = Flags(*words)
        with on_cpu(q, *kv, out, lse, *(() if flags is None else (flags.values, flags.epoch))):
            forward(q, kv[0], kv[1], out, lse, None, table, scale=0.1, flags=flags)
        results.append((out, lse))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_the_machine_notices_early_reads() -> None:
    """Where barriers forget the bytes they expect, the kernel reads what has not arrived, and the machine lets it."""
    import ptx_machine

    def hasty(barrier: ptx_machine.Barrier) -> None:
        if barrier.pending == 0:
            barrier.phase ^= 1
            barrier.pending = barrier.count

    with patch.object(ptx_machine.Barrier, "check", hasty):
        _, fine = run_forward(case("hasty", [causal_table(128, 512, causal=False)], 128), emulated, CPU)
    assert not fine
