"""Every shipped setting compiled for sm_90a: registers, spills, wgmma, TMA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import cute_compiling
import pytest

SCRIPT = Path(cute_compiling.__file__)


def has_cuobjdump() -> bool:
    try:
        return bool(cute_compiling.cuobjdump())
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.skipif(not has_cuobjdump(), reason="no cuobjdump: pip install nvidia-cuda-cuobjdump")
@pytest.mark.parametrize("group", list(cute_compiling.GROUPS))
def test_compiled_for_sm_90a(group: str) -> None:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    done = subprocess.run([sys.executable, SCRIPT, group], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
