"""What the README shows runs, and is what lies in examples/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ring_core

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "ten_lines.py"


def test_the_readme_shows_the_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "packages/ring-core/README.md").read_text(), re.DOTALL)
    assert EXAMPLE.read_text() in blocks


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_example_agrees_with_one_device(world_size: int) -> None:
    # Ranks of torchrun find this process's ring_core wherever it came from.
    paths = [str(Path(ring_core.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world_size}",
        str(EXAMPLE),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(x) for x in re.findall(r"one device (\d\.\de-\d\d)", done.stdout)]
    assert len(errors) == world_size
    assert max(errors) < 2e-6
