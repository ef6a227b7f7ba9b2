"""Where a run took place: versions, devices, clocks, revision. No host names and no paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "ring-core",
    "ring-native",
    "ring-triton",
    "ring-cute",
    "ring-compare",
    "flash-attn",
    "flash-attn-4",
    "ring-flash-attn",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_SMI_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


def _output(*command: str) -> str:
    """Standard output of a command that may not be there; "" when it fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions.setdefault("torch", torch.__version__)
    return versions


REVISION_VARIABLE = "RING_COMPARE_REVISION"
"""What to record as the revision, where the code does not run from a checkout of it."""


def _revision() -> str:
    """What the variable says, else the revision of the checkout this package lives in or the command runs in; `+` marks
    local changes."""
    if given := os.environ.get(REVISION_VARIABLE):
        return given
    for folder in (str(Path(__file__).parent), "."):
        revision = _output("git", "-C", folder, "rev-parse", "HEAD")
        if revision:
            dirty = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
            return revision + ("+" if dirty else "")
    return "norev"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _slug(name: str) -> str:
    """`NVIDIA H200` -> `h200`, for file names."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in ("", "nvidia", "tesla", "geforce")]
    return "-".join(words) or "gpu"


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU now; nothing where it is not there."""
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # its name before driver 535
        text = _output("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)},{reasons}", "--format=csv,noheader,nounits")
        if text:
            names = (*_SMI_FIELDS, "throttle_reasons")
            return [dict(zip(names, (x.strip() for x in line.split(",")), strict=False)) for line in text.splitlines()]
    return []


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, but for the output folder, which is nobody's business."""
    words, hide = ["ring-compare"], False
    for word in arguments:
        words.append("DIR" if hide else "--out=DIR" if word.startswith("--out=") else word)
        hide = word == "--out"
    return shlex.join(words)


def describe(device: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The environment row's fields."""
    cpu: dict[str, Any] = {"name": _cpu(), "count": os.cpu_count()}
    if device == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        capability = ".".join(str(x) for x in torch.cuda.get_device_capability(0))
        place = {"type": "cuda", "slug": _slug(names[0]), "names": names, "compute_capability": capability}
    else:
        place = {"type": "cpu", "slug": "cpu", "names": [cpu["name"]]}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "command": command_line(arguments),
        "device": place,
        "cpu": cpu,
        "versions": _versions(),
        "cuda": torch.version.cuda,
        "nvidia_smi": gpus(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
