"""The compiled Hopper forward, run on the CPU from its TTGIR: what Triton's passes made of it, not what was written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "hopper_simulating.py"


@pytest.mark.slow
@pytest.mark.parametrize("group", ["several_segments", "zigzag", "settings", "widths", "steps", "arrived"])
def test_what_the_compiler_made_of_it_is_right(group: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, SCRIPT, group], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
