"""Time per call: warm-up by time, ranks lined up before each sample, variants interleaved, raw samples kept."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch

from ring_compare.ranks import Ranks
from ring_compare.suites import Timing

Call = Callable[[], object]
K = TypeVar("K")
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
_ESTIMATE = 5
_ROW_MS, _LONGEST_ROW = 15.0, 10
"""A row of calls takes some such time and no more calls."""
_HEAD_START, _LONGEST_HEAD_START_MS = 1.5, 60.0
"""In training the host enqueues attention while the GPU computes what comes before. So before a row the GPU is given
nothing to do for this many times what the host, by a call alone, will take to enqueue it: what the row then takes is
the GPUs' time, and the host's is a figure of its own. A host of one of our 4-GPU machines took 0.9 or 1.6 ms for the
same call, from one second to the next; calls of less than that measured nothing else without a head start."""
_CYCLES_PER_MS = 2e6
"""At an H200's fastest clock; at a slower one the head start is longer, which does no harm."""


class Sample(NamedTuple):
    """Milliseconds of a call: among others in a row, on the GPUs; alone; and until it, alone, returned on the host."""

    ms: float
    latency_ms: float
    host_ms: float


class Timer:
    """One sample at a time; every sample is the slowest rank's, hence all ranks take the same decisions from it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._gpu = ranks.device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self._gpu else 0, dtype=torch.int8, device=ranks.device)

    def sample(self, call: Call, in_a_row: int = 1) -> Sample:
        """One call alone, then on a GPU so many in a row; each time the maximum over ranks."""
        if self._gpu:
            latency, host_ms = self._on_gpu(call, 1)
            ms = self._on_gpu(call, in_a_row, _HEAD_START * in_a_row * host_ms)[0] if in_a_row > 1 else latency
        else:
            ms = latency = host_ms = self._on_cpu(call)
        found = self._ranks.maximum((ms, latency, host_ms))
        return Sample(*(round(x, 4) for x in found))  # 0.1 µs: clocks tell no more, and records stay small

    def _on_cpu(self, call: Call) -> float:
        self._ranks.barrier()
        return _host_ms(call, 1)

    def _on_gpu(self, call: Call, in_a_row: int, head_start_ms: float = 0.0) -> tuple[float, float]:
        """A call's milliseconds on the device and on the host, which begins so much earlier."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # a cold L2 for everyone
        if head_start_ms:
            torch.cuda._sleep(int(min(head_start_ms, _LONGEST_HEAD_START_MS) * _CYCLES_PER_MS))
        self._ranks.barrier()
        start.record()
        host_ms = _host_ms(call, in_a_row)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / in_a_row, host_ms / in_a_row


def _host_ms(call: Call, in_a_row: int) -> float:
    start = time.perf_counter()
    for _ in range(in_a_row):
        call()
    return (time.perf_counter() - start) * 1e3


def _warm_up(timer: Timer, call: Call, timing: Timing) -> float:
    """Call for `warmup_s`; returns the expected milliseconds per call. The first may compile: not counted."""
    timer.sample(call)
    samples: list[float] = []
    while not samples or sum(samples) < timing.warmup_s * 1e3:
        samples.append(timer.sample(call).ms)
    return statistics.median(samples[-_ESTIMATE:])


def sample_interleaved(
    calls: Mapping[K, Call], timing: Timing, ranks: Ranks, announce: Callable[[K, str], None]
) -> dict[K, list[Sample]]:
    """Raw samples per key. Rounds take one sample of each call, in an order drawn anew for each round (the same on all
    ranks), so that clocks and neighbours hit all alike: after kernels that draw much power a GPU is some 15 % slower.

    `announce(key, step)` is told what runs next: whoever watches can then say who hung.
    """
    timer = Timer(ranks)
    counts: dict[K, int] = {}
    rows: dict[K, int] = {}
    for key, call in calls.items():
        announce(key, "warm-up")
        expected = max(_warm_up(timer, call, timing), 1e-6)
        rows[key] = min(max(math.ceil(_ROW_MS / expected), 2), _LONGEST_ROW) if ranks.device.type == "cuda" else 1
        wanted = int(timing.measure_s * 1e3 / (expected * (rows[key] + 1)))
        counts[key] = min(max(wanted, timing.min_samples), timing.max_samples)
    samples: dict[K, list[Sample]] = {key: [] for key in calls}
    for turn in range(max(counts.values(), default=0)):
        for key in random.Random(turn).sample(list(calls), len(calls)):
            if turn < counts[key]:
                announce(key, "timing")
                samples[key].append(timer.sample(calls[key], rows[key]))
    return samples
