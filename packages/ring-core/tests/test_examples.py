"""What the README shows runs, and is what lies in examples/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ring_core

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "ten_lines.py"


@pytest.mark.parametrize("readme", ["README.md", "packages/ring-core/README.md"])
def test_the_readme_shows_the_example(readme: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    assert EXAMPLE.read_text() in blocks


def loss_on_one_device() -> float:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1200, heads, 64, generator=generator).double().transpose(1, 2) for heads in (8, 2, 2))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.square().sum().item()


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
    losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == world_size
    assert sum(losses) == pytest.approx(loss_on_one_device(), rel=2e-6)
