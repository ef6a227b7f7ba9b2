import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)

# Spawned workers get the parent's sys.path and import the fakes by name; ranks of torchrun only see PYTHONPATH.
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture
def subprocess_env():
    """Environment for a command that is to find what this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
