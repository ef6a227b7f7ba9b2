"""compute-sanitizer finds nothing in the kernels, where it is installed and takes the device.

racecheck knows no mbarrier and none of the copies of TMA, which are what the Hopper kernels synchronise by: there it
reports the word that the producer leaves for the consumers (128 threads store the same number, an mbarrier follows),
and Triton's own hand-over to the partitions of `warp_specialize`. Their order is what
`tests/hopper/test_hopper_simulated.py` tests instead. So racecheck is for the portable path.
"""

from __future__ import annotations

import pytest

from ring_core.testing.sanitizer import check_sanitizer

RUNS = [
    ("memcheck", "hopper"),
    ("synccheck", "hopper"),
    ("memcheck", "portable"),
    ("synccheck", "portable"),
    ("racecheck", "portable"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("check", "path"), RUNS)
def test_nothing_to_report(check: str, path: str) -> None:
    check_sanitizer(check, f"triton[{path}]")
