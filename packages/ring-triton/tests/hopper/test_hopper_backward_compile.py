"""Every shipped setting of the Hopper backward compiled for sm_90a, where TRITON_INTERPRET does not reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "hopper_compiling_backward.py"


@pytest.mark.slow
@pytest.mark.parametrize("group", ["128", "64", "final", "padded", "fp16", "ordered", "variants"])
def test_compiled_for_sm_90a(group: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, SCRIPT, group], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
