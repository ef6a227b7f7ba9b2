"""Settings that `ring_triton.tune` has timed on this machine: where they are kept, and whether they are asked for.

They are asked for with RING_TRITON_TUNE=1, or from `tune` on in the process that called it. Otherwise the tables count,
so that what runs does not depend on what somebody once tried.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton

from ring_core.segment import Table

Kernel = Literal[
    "hopper forward", "hopper backward", "portable forward", "portable gradients_kv", "portable gradients_q"
]
Mask = Literal["full", "banded"]


KERNELS = 2
"""Counts the kernels' and their settings' changes: what was found for others does not count."""


class Place(NamedTuple):
    """What settings are for. width: the head dim as it is computed with; bits: of an element of q."""

    kernel: Kernel
    width: int
    mask: Mask
    bits: int

    def on(self, device: torch.device) -> str:
        """Its name in the file: with the GPU, the compiler and the kernels, others of which may want other settings."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        made = f"triton {triton.__version__}, kernels {KERNELS}"
        return f"{gpu}, {made}, {self.kernel}, head dim {self.width}, {self.mask}, {self.bits} bits"


class _State:
    asked_for = os.environ.get("RING_TRITON_TUNE") == "1"
    tried: tuple[Place, dict[str, Any]] | None = None
    serial = 0


def serial() -> int:
    """Changes whenever the settings of a call may."""
    return _State.serial


def ask_for() -> None:
    """From now on tuned settings count."""
    _State.asked_for = True
    _State.serial += 1


def cache_file() -> Path:
    """Where winners are kept: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ring-triton" / "tuned.json"


def mask_of(table: Table) -> Mask:
    """Whether every query of a table's segments sees every key of them."""
    if "mask" not in table.cache:
        some = [s for s in table.segments if s.k_len]
        full = all(s.lower <= 1 - s.q_len and s.upper >= s.k_len - 1 for s in some)
        table.cache["mask"] = "full" if full else "banded"
    found: Mask = table.cache["mask"]
    return found


def lookup(place: Place, device: torch.device) -> dict[str, Any] | None:
    """The fields of the settings that are tried or were found best there; None: those of the table count."""
    if _State.tried is not None and _State.tried[0] == place:
        return _State.tried[1]
    if not _State.asked_for:
        return None
    row = _read(cache_file(), _State.serial).get(place.on(device))
    return None if row is None else row["setting"]


@contextmanager
def trying(place: Place, setting: dict[str, Any]) -> Iterator[None]:
    """Launches there take this setting while it lasts."""
    _State.tried, _State.serial = (place, setting), _State.serial + 1
    try:
        yield
    finally:
        _State.tried, _State.serial = None, _State.serial + 1


def remember(place: Place, device: torch.device, row: dict[str, Any]) -> None:
    """Adds a row to the file, whole or not at all."""
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = load(file) | {place.on(device): row}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as written:
        json.dump(rows, written, indent=1, sort_keys=True)
    os.replace(written.name, file)
    _State.serial += 1


def load(file: Path) -> dict[str, dict[str, Any]]:
    """All rows of a file, none where there is no file.

    Raises:
        ValueError: it is not one of these files.
    """
    if not file.exists():
        return {}
    try:
        rows: dict[str, dict[str, Any]] = json.loads(file.read_text())
        good = all(isinstance(row["setting"], dict) for row in rows.values())
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold settings of ring_triton.tune: delete it, or tune again") from error
    if not good:
        raise ValueError(f"{file} does not hold settings of ring_triton.tune: delete it, or tune again")
    return rows


@lru_cache(maxsize=1)
def _read(file: Path, serial: int) -> dict[str, dict[str, Any]]:
    return load(file)
