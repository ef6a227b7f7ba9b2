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
import cute_compiling_backward
import pytest

from ring_cute import settings
from ring_cute.hopper.backward_settings import BACKWARD, backward_head_dim

SCRIPTS = {
    **dict.fromkeys(cute_compiling.GROUPS, cute_compiling.__file__),
    **dict.fromkeys(cute_compiling_backward.GROUPS, cute_compiling_backward.__file__),
}
AT_ONCE = 2
Compiling = dict[str, "Future[subprocess.CompletedProcess[str]]"]


def has_cuobjdump() -> bool:
    try:
        return bool(cute_compiling.cuobjdump())
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def compiling(request: pytest.FixtureRequest) -> Iterator[Compiling]:
    """Each group that is tested, by a process of its own."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    groups = [call.params["group"] for call in calls if call is not None and "group" in call.params]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)

    def run(group: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, SCRIPTS[group], group]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {group: pool.submit(run, group) for group in groups if group in SCRIPTS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.skipif(not has_cuobjdump(), reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("group", list(SCRIPTS))
def test_compiled_for_sm_90a(group: str, compiling: Compiling) -> None:
    done = compiling[group].result()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_every_setting_is_among_them() -> None:
    forward = {settings.padded_head_dim(dim) for group in cute_compiling.GROUPS.values() for dim, _ in group}
    assert forward == set(settings.FORWARD)
    backward = {kind for group in cute_compiling_backward.GROUPS.values() for kind in group}
    assert {backward_head_dim(kind.head_dim) for kind in backward} == set(BACKWARD)
