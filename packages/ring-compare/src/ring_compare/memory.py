"""Peak memory of a call on one rank."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ring_core import comm

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes beyond the baseline, or None where the platform offers no measure; `method` names the measure."""

    method: str
    bytes: int | None = None


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(match[1]) * 1024


def _trim() -> None:
    """Hand freed heap pages back, otherwise a call that reuses them would seem to need none (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def allocated(device: torch.device) -> int:
    """Bytes that torch holds on the device now; 0 on the CPU, where the baseline is taken right before the call."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def arena_bytes(device: torch.device) -> int:
    """Bytes of peer-accessible memory that ring_core holds in this process: torch's allocator does not see them."""
    return comm.arena_bytes() if device.type == "cuda" else 0


@contextlib.contextmanager
def peak_memory(device: torch.device, baseline: int) -> Iterator[Peak]:
    """Measure the calls inside. On GPUs beyond `baseline` (from `allocated`), so that buffers kept between calls count.

    On the CPU the growth of the resident set: libraries loaded by the first call must not count, so callers warm up.
    """
    if device.type == "cuda":
        peak = Peak("torch.cuda.max_memory_allocated")
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - baseline)
        return
    peak = Peak("VmHWM growth")
    try:
        _trim()
        _CLEAR.write_text("5")  # resets VmHWM to VmRSS
        before = _status_bytes("VmRSS")
    except OSError as error:
        peak.method = f"n/a ({error.__class__.__name__} on /proc/self)"
        yield peak
        return
    yield peak
    peak.bytes = max(0, _status_bytes("VmHWM") - before)
