"""Every shipped setting compiled for sm_90a: registers, spills, wgmma, TMA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cute_compiling
import pytest
from cute_compiling import GROUPS

from ring_cute import settings

SCRIPT = Path(cute_compiling.__file__)
AT_ONCE = 2


@pytest.fixture(scope="module")
def compiling() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Each group, by a process of its own."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))

    def run(group: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), group]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {group: pool.submit(run, group) for group in GROUPS}
        pool.shutdown(cancel_futures=True)


def has_cuobjdump() -> bool:
    try:
        return bool(cute_compiling.cuobjdump())
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.skipif(not has_cuobjdump(), reason="no cuobjdump: pip install nvidia-cuda-cuobjdump")
@pytest.mark.parametrize("group", list(GROUPS))
def test_compiled_for_sm_90a(group: str, compiling: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = compiling[group].result()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_every_setting_is_among_them() -> None:
    assert {settings.padded_head_dim(dim) for group in GROUPS.values() for dim, _ in group} == set(settings.FORWARD)
