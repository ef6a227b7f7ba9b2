"""Every shipped setting, compiled without a GPU: nothing spills more than its row of the table says, tensor cores are
used, shared memory suffices, and something was compiled at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import compiling
import pytest
import triton

ROOM = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
EMPTY = 40_000
"""Characters of PTX: the smallest kernel has twice that, and an empty one 3,000."""

RECORDED = "3.7."
"""The triton whose spills the tables have."""
OTHERS = 256
"""Bytes granted to others, whose register allocation differs: 3.6 spills up to 248 more where no row says otherwise."""


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, int]]:
    """In a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, compiling.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", compiling.shipped())
def test_setting(name: str, results: dict[str, dict[str, Any]]) -> None:
    target, kernel, _ = name.split("-", 2)
    _, _, setting, *_ = compiling.shipped()[name]
    found = results[name]
    assert found["ptx"] > EMPTY, "an empty kernel"
    assert found["products"] > 0, "no tensor cores"
    if target == "sm_90" and setting.precision == "ieee":
        assert found["wgmma"] > 0, "no wgmma"
    assert found["shared"] <= ROOM[target]
    if not name.endswith("features"):
        allowed = setting.spills + (0 if triton.__version__.startswith(RECORDED) else OTHERS)
        if setting.spills_36 is not None and triton.__version__.startswith("3.6."):
            allowed = setting.spills_36
        assert found["stack"] <= allowed, f"{kernel} spills {found['stack']} bytes"
