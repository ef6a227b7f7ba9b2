"""What runs under compute-sanitizer: kernel cases small enough for it, on one path. `sanitized.py PATH`."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from ring_core.backend import load_backend
from ring_core.testing.conformance import check_kernel_case, kernel_cases

NAMES = (
    "causal-contiguous-ring-3",  # several calls that accumulate
    "wide-stripe-gather-3",  # two-sided windows, segments of several pieces
    "packed-causal-sinks",
    "cuts-four-calls",
    "entries-everything",
    "heads-6-2-contiguous-ring-2",
    "deterministic-contiguous-gather-2",
)
DONE = "all cases ran"
SCALE = 9
"""Lengths of some 500 tokens, multiples of nothing: several tiles, the last of which is cut."""


def main(path: str) -> None:
    cases = {case.name: case for case in kernel_cases(scale=SCALE)}
    backend = load_backend(f"triton[{path}]")
    for name in NAMES:
        for head_dim in (64, 128):
            case = replace(cases[name], head_dim=head_dim, dtype=torch.bfloat16)
            check_kernel_case(case, backend, "cuda", seed=7)
            print(f"ran {name}, head dim {head_dim}", flush=True)
    print(DONE, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
