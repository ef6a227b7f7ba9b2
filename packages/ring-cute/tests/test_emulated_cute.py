"""The forward's own PTX and host code on the CPU (`ptx_machine`), against the contract's reference in fp64."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import gpu_probe
import pytest
import torch
from gpu_probe import VARIANTS, causal_steps, causal_table, random_table, short_strips, table_of
from torch import Tensor

from ring_core.backend import DeviceTable, Flags, on_device
from ring_core.segment import FIRST, LAST, Segment, Table
from ring_cute.hopper.launch import forward
from ring_cute.settings import settings_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the host code is linked by cc"),
]
CPU = torch.device("cpu")
OWN = table_of(
    [Segment(0, 200, 0, 0, 300, -200, 300, 0, 0, 1, 0, FIRST | LAST)],
    [Segment(50, 100, 0, 0, 77, -100, 5, 0, 0, 1, 1, FIRST | LAST)],
)


def two_steps(q_len: int) -> list[Table]:
    """A strip whose first keys come second."""
    k_len = q_len // 2
    return [
        causal_table(q_len, k_len, causal=True, k_position=k_len, flags=FIRST),
        causal_table(q_len, k_len, causal=True, flags=LAST),
    ]


CASES: dict[str, dict[str, Any]] = {
    "two blocks": {"tables": [causal_table(128, 256, causal=False)], "q_len": 128, "dim": 128},
    "causal, GQA": {"tables": [causal_table(300, 300, causal=True)], "q_len": 300, "heads": (2, 1)},
    "ends, padded head dim": {
        "tables": [causal_table(130, 333, causal=True, k_position=-203)],
        "q_len": 130,
        "dim": 40,
    },
    "D 192": {"tables": [causal_table(130, 333, causal=True, k_position=-203)], "q_len": 130, "dim": 192},
    "D 256, two batches": {
        "tables": [causal_table(130, 200, causal=True, k_position=-70)],
        "q_len": 130,
        "dim": 256,
        "batch": 2,
        "dtype": torch.float16,
    },
    "D 200, four steps": {"tables": causal_steps(200, (3, 2, 1, 0)), "q_len": 200, "dim": 200},
    "clusters, two steps": {
        "tables": two_steps(500),
        "q_len": 500,
        "heads": (2, 1),
        "settings": replace(settings_for(64), cluster=2, cache_hints=True),
    },
    "clusters, no key": {
        "tables": [causal_table(200, 0, causal=False)],
        "q_len": 200,
        "heads": (9, 1),
        "settings": replace(settings_for(64), cluster=2),
    },
    "fp16": {"tables": [causal_table(128, 256, causal=False)], "q_len": 128, "dtype": torch.float16},
    "short keys": {"tables": [causal_table(200, 17, causal=False)], "q_len": 200},
    "no key": {"tables": [causal_table(200, 0, causal=False)], "q_len": 200},
    "own batch entries": {"tables": [OWN], "q_len": 256, "batch": 2},
    "four steps": {"tables": causal_steps(400, (3, 2, 1, 0)), "q_len": 400},
    "four steps, sinks": {"tables": causal_steps(200, (1, 0, 3, 2)), "q_len": 200, "dim": 128, "with_sinks": True},
    "short strips": {"tables": short_strips(), "q_len": 700},
    "softcap, GQA, D 128": {
        "tables": [causal_table(200, 300, causal=True, k_position=-100)],
        "q_len": 200,
        "heads": (2, 1),
        "dim": 128,
        "softcap": 0.7,
    },
    "softcap, D 40, fp16": {
        "tables": [causal_table(130, 333, causal=True, k_position=-203)],
        "q_len": 130,
        "dim": 40,
        "dtype": torch.float16,
        "softcap": 50.0,
    },
    "softcap, four steps": {"tables": causal_steps(400, (3, 2, 1, 0)), "q_len": 400, "softcap": 2.0},
    "softcap, four steps, sinks": {
        "tables": causal_steps(200, (1, 0, 3, 2)),
        "q_len": 200,
        "dim": 128,
        "with_sinks": True,
        "softcap": 1.0,
    },
    "softcap, short strips": {"tables": short_strips(), "q_len": 700, "softcap": 1.0},
    "softcap, random": {"tables": [random_table(4)[0]], "q_len": random_table(4)[1], "batch": 2, "softcap": 0.5},
    "softcap, D 256": {"tables": [causal_table(130, 200, causal=True)], "q_len": 130, "dim": 256, "softcap": 1.0},
    "ALiBi, GQA, D 128": {
        "tables": [causal_table(200, 300, causal=True, k_position=-100)],
        "q_len": 200,
        "heads": (2, 1),
        "dim": 128,
        "batch": 2,
        "alibi": True,
    },
    "ALiBi, D 40, fp16": {
        "tables": [causal_table(130, 333, causal=True, k_position=-203)],
        "q_len": 130,
        "dim": 40,
        "dtype": torch.float16,
        "alibi": True,
    },
    "ALiBi, both sides of the diagonal": {
        "tables": [table_of([Segment(0, 200, 0, 0, 300, -90, 140, 0, 0, 1, -1, FIRST | LAST)])],
        "q_len": 200,
        "alibi": True,
    },
    "ALiBi, stripes of two pieces": {
        "tables": [
            table_of(
                [
                    Segment(0, 200, 0, 0, 200, -200, 0, 3, 1, 4, -1, FIRST),
                    Segment(0, 200, 1, 0, 200, -200, -1, 3, 6, 4, -1, LAST),
                ]
            )
        ],
        "q_len": 200,
        "alibi": True,
    },
    "ALiBi, four steps": {"tables": causal_steps(400, (3, 2, 1, 0)), "q_len": 400, "alibi": True},
    "ALiBi and softcap, four steps, sinks": {
        "tables": causal_steps(200, (1, 0, 3, 2)),
        "q_len": 200,
        "dim": 128,
        "with_sinks": True,
        "softcap": 1.0,
        "alibi": True,
    },
    "ALiBi, short strips": {"tables": short_strips(), "q_len": 700, "alibi": True},
    "ALiBi and softcap, random": {
        "tables": [random_table(4)[0]],
        "q_len": random_table(4)[1],
        "softcap": 0.5,
        "alibi": True,
    },
    "ALiBi, D 256": {"tables": [causal_table(130, 200, causal=True)], "q_len": 130, "dim": 256, "alibi": True},
    "random 1": {"tables": [random_table(1)[0]], "q_len": random_table(1)[1], "batch": 2},
    "random 6": {"tables": [random_table(6)[0]], "q_len": random_table(6)[1], "dim": 128},
    **{
        f"{name}": {"tables": [causal_table(200, 300, causal=True, k_position=-100)], "q_len": 200, "settings": chosen}
        for name, chosen in VARIANTS[64].items()
    },
    **{
        f"D 128, {changed}": {
            "tables": [causal_table(200, 500, causal=True, k_position=-300)],
            "q_len": 200,
            "dim": 128,
            "settings": replace(settings_for(128), **changed),
        }
        for changed in (
            {"query_registers": True, "lazy": False, "overlap": True},
            {"ping_pong": True, "block": 160},
            {"cluster": 2, "block": 176},
            {"cache_hints": True, "consumers": 3, "consumer_registers": 160, "block": 80},
        )
    },
}


@pytest.fixture(autouse=True)
def on_the_machine() -> Iterator[None]:
    """The probe's cases, with kernels run here."""
    from emulated import on_cpu

    def emulated(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Tensor | None,
        table: DeviceTable,
        **others: Any,
    ) -> None:
        with on_cpu(q, k, v, out, lse, state, others["sinks"], others["slopes"]):
            forward(q, k, v, out, lse, state, table, **others)

    with (
        patch.object(gpu_probe, "forward", emulated),
        patch.object(gpu_probe, "DEVICE", CPU),
        patch.object(gpu_probe, "begin", lambda name: None),
        patch.object(gpu_probe, "finish", lambda name: None),
        patch.object(gpu_probe, "failures", []),
    ):
        yield


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    gpu_probe.check(name, **{"heads": (1, 1), "dim": 64, **CASES[name]})
    assert not gpu_probe.failures


def test_flags() -> None:
    """Pieces that are there, and poison: the result is that without flags, and every kernel ends."""
    from emulated import on_cpu

    ends = {0: FIRST, 2: LAST}
    strip = [Segment(0, 200, c, 0, 100, -200, 100, 0, 0, 1, -1, ends.get(c, 0)) for c in range(3)]
    table = on_device(table_of(strip), CPU)
    kv = gpu_probe.keys(table.host, 1, 1, 64, torch.bfloat16)
    q = torch.randn(1, 200, 2, 64, dtype=torch.bfloat16)
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
        gpu_probe.check("hasty", [causal_table(128, 512, causal=False)], q_len=128, heads=(1, 1), dim=64)
    assert gpu_probe.failures == ["hasty"]
