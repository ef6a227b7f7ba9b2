"""What the README shows runs, and is what lies in examples/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import ring_core

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "ten_lines.py"
PACKED = ROOT / "examples" / "packed.py"


@pytest.mark.parametrize("readme", ["README.md", "packages/ring-core/README.md"])
def test_the_readme_shows_the_example(readme: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
    assert EXAMPLE.read_text() in blocks


def test_ring_cores_readme_shows_packed_documents() -> None:
    text = (ROOT / "packages/ring-core/README.md").read_text()
    assert PACKED.read_text() in re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def loss_on_one_device(example: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    ends = [0, 1200] if example == EXAMPLE else [0, 700, 701, 1000, 1937]
    q, k, v = (torch.randn(ends[-1], heads, 64, generator=generator).double().transpose(0, 1) for heads in (8, 2, 2))
    loss = 0.0
    for a, b in pairwise(ends):
        x = (tensor[None, :, a:b] for tensor in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
        loss += out.square().sum().item()
    return loss


@pytest.mark.parametrize(("example", "world_size"), [(EXAMPLE, 1), (EXAMPLE, 3), (PACKED, 3)])
def test_the_example_agrees_with_one_device(example: Path, world_size: int) -> None:
    # Ranks of torchrun find this process's ring_core wherever it came from.
    paths = [str(Path(ring_core.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world_size}",
        str(example),
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
    assert sum(losses) == pytest.approx(loss_on_one_device(example), rel=2e-6)
