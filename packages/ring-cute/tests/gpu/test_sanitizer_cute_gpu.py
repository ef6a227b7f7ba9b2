"""compute-sanitizer finds nothing in the kernels, where it is installed and takes the device.

Not racecheck: it knows no mbarrier and none of the copies of TMA, which are what the kernels synchronise by. Their
order is what `tests/test_emulated_cute.py` tests instead.
"""

from __future__ import annotations

import pytest

from ring_core.testing.sanitizer import check_sanitizer


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["memcheck", "synccheck"])
def test_nothing_to_report(check: str) -> None:
    check_sanitizer(check, "cute")
