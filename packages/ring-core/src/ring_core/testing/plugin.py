"""pytest plugin: ranks, seeds and GPU markers. Load it with `-p ring_core.testing.plugin` or `pytest_plugins`.

`ranks(world_size, function, *args, **kwargs)` runs a module-level function on every rank of a cached pool.
`seed` is a fresh number for each test, printed if the test fails; RING_TEST_SEED=<number> brings it back.
Markers: `gpu` needs a CUDA device, `multi_gpu(n)` needs n; without them a test is skipped, and says why. With
RING_TEST_SHARE_GPUS=1 one device is enough: its ranks share it, slowly, but through the same kernels and transports.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest
import torch

from ring_core.testing.pool import RankError, close_pools, get_pool

SEED_VARIABLE = "RING_TEST_SEED"
SHARE_VARIABLE = "RING_TEST_SHARE_GPUS"

RunRanks = Callable[..., list[Any]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "multi_gpu(n): needs n CUDA devices")


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = _gpus_needed(item)
    if needed:
        _skip_without_gpus(needed)


def pytest_unconfigure(config: pytest.Config) -> None:
    close_pools()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for this test, or RING_TEST_SEED."""
    given = os.environ.get(SEED_VARIABLE)
    value = secrets.randbits(31) if given is None else int(given)
    request.node.add_report_section("setup", "seed", f"rerun this test with {SEED_VARIABLE}={value}")
    return value


@pytest.fixture
def ranks(request: pytest.FixtureRequest, seed: int) -> RunRanks:
    """`ranks(world_size, function, *args, device=None, timeout=None, may_die=(), env=None, **kwargs)`: results by rank.

    device: default "cuda" for a test marked gpu or multi_gpu, else "cpu". Ranks are seeded with the `seed` fixture.
    Skips with the reason if there are fewer GPUs than ranks, and when a rank calls pytest.skip. Raises as
    `WorkerPool.run` does.
    """
    default_device = "cuda" if _gpus_needed(request.node) else "cpu"

    def run(
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        device: str | None = None,
        timeout: float | None = None,
        may_die: Collection[int] = (),
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        device = default_device if device is None else device
        if device == "cuda":
            _skip_without_gpus(world_size)
        try:
            return get_pool(world_size, device).run(
                function, *args, timeout=timeout, may_die=may_die, seed=seed, env=env, **kwargs
            )
        except RankError as error:
            if error.type_name == "Skipped":
                pytest.skip(f"rank {error.rank}: {error.original_message}")
            raise

    return run


def _gpus_needed(item: pytest.Item) -> int:
    needed = 1 if item.get_closest_marker("gpu") else 0
    for marker in item.iter_markers("multi_gpu"):
        count = marker.args[0] if marker.args else marker.kwargs.get("n")
        if not isinstance(count, int):
            raise pytest.UsageError(f"{item.nodeid}: multi_gpu needs the number of devices, as in multi_gpu(2)")
        needed = max(needed, count)
    return needed


def _skip_without_gpus(needed: int) -> None:
    present = torch.cuda.device_count()  # does not initialise CUDA in this process
    if present < (1 if os.environ.get(SHARE_VARIABLE) == "1" else needed):
        pytest.skip(f"needs {needed} CUDA device(s), this machine has {present}")
