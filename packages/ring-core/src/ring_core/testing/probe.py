"""The frame of a probe: sections of checks and timings on a GPU, which a kernel that never ends cannot hold up.

    PROBE = Probe()
    def correct() -> None:
        PROBE.check(case.name, lambda: run_forward(case, forward, DEVICE))
    if __name__ == "__main__":
        sys.exit(PROBE.main({"correct": correct, "variants": variants}, usual=("correct",)))

Arguments name sections (those of `usual` where none is named); "only=WORD" picks the cases that WORD is part of. Each
case is named before it is launched. Exit status 1 if a check failed; a kernel that does not end in `hang` seconds, or
anything that takes longer than `slow`, ends the process there, since nothing more can run beside it.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]


class Probe:
    """failures: names of what failed. only: part of the names of the cases that are wanted."""

    def __init__(self, *, hang: float = 10.0, slow: float = 60.0) -> None:
        self.failures: list[str] = []
        self.only = ""
        self._hang, self._slow = hang, slow

    def begin(self, name: str) -> None:
        """Says what comes next, and arms a timer that tells where the host was if it takes too long, and ends it."""
        print(f"...  {name}", flush=True)
        faulthandler.dump_traceback_later(self._slow, exit=True)

    def finish(self, name: str) -> None:
        """Waits for the device, but not for ever."""
        if not torch.cuda.is_available():
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self._hang
        while not done.query():
            if time.monotonic() > deadline:
                failed = f"failed before: {self.failures}"
                print(f"HANG {name}: the device is still busy after {self._hang:.0f} s; {failed}", flush=True)
                os._exit(2)  # the interpreter's own end would wait for the device
            time.sleep(1e-4)

    def check(self, name: str, run: Callable[[], tuple[str, bool]]) -> None:
        """Runs a case, which says what came out and whether that is right, if it is wanted."""
        if self.only not in name:
            return
        self.begin(name)
        start = time.monotonic()
        try:
            message, fine = run()
            self.finish(name)
        except Exception:  # a probe goes on to the next case, and says what happened
            message, fine = traceback.format_exc(limit=-3), False
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {message} ({time.monotonic() - start:.1f} s)", flush=True)
        if not fine:
            self.failures.append(name)

    def show(self, title: str, fns: Mapping[str, Work], flops: float, *, ends: Sequence[str] = ()) -> None:
        """TFLOP/s of each, or microseconds of `ends`."""
        found = self.milliseconds(fns)
        rates = (f"{t * 1e3:.0f} us" if name in ends else f"{flops / t / 1e9:.0f}" for name, t in found.items())
        print(f"{title}: " + "; ".join(map(" ".join, zip(found, rates, strict=True))), flush=True)

    def milliseconds(self, fns: Mapping[str, Work], *, rounds: int = 3, budget: float = 0.12) -> dict[str, float]:
        """The best of the rounds' medians of each, interleaved so that clocks drift for all alike."""
        for name, fn in fns.items():
            self.begin(name)
            fn()
            self.finish(name)
        best = dict.fromkeys(fns, float("inf"))
        for _ in range(rounds):
            for name, fn in fns.items():
                best[name] = min(best[name], _median(fn, budget))
        return best

    def main(self, sections: Mapping[str, Work], usual: Sequence[str]) -> int:
        """Runs what the command line names; the exit status."""
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
        picked = [word for word in sys.argv[1:] if word.startswith("only=")]
        self.only = picked[-1].removeprefix("only=") if picked else ""
        for name in [word for word in sys.argv[1:] if word not in picked] or usual:
            print(f"== {name}", flush=True)
            start = time.monotonic()
            try:
                sections[name]()
            except Exception:  # the next section may still tell something
                self.failures.append(name)
                traceback.print_exc(limit=-4)
            faulthandler.cancel_dump_traceback_later()
            print(f"== {name}: {time.monotonic() - start:.1f} s", flush=True)
            if name == "smoke" and self.failures:
                break  # nothing else would tell more
        print(f"{len(self.failures)} failures: {self.failures}" if self.failures else "all checks passed", flush=True)
        return bool(self.failures)


def _median(fn: Work, budget: float) -> float:
    """Milliseconds of a launch, each timed with events, the L2 cleared in between."""
    cache = torch.empty(64 << 20, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.monotonic()
    fn()
    torch.cuda.synchronize()
    count = max(5, min(50, int(budget / max(time.monotonic() - start, 1e-5))))
    for _ in range(count // 3):  # clocks settle
        fn()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for first, last in pairs:
        cache.zero_()
        first.record()
        fn()
        last.record()
    torch.cuda.synchronize()
    return statistics.median([float(first.elapsed_time(last)) for first, last in pairs])


def host_microseconds(fn: Work) -> float:
    """Of the host for a call in steady state."""
    for _ in range(20):
        fn()
    torch.cuda.synchronize()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            fn()
        times.append((time.perf_counter() - start) / 50 * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def heat(seconds: float = 2.0) -> None:
    """What is measured first would be measured on a cool GPU, at a higher clock."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()
