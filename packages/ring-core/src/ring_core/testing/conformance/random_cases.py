"""Kernel cases that nobody thought of: shapes, offsets, windows, padding and cuts, drawn by hypothesis.

    @given(case=random_kernel_cases(head_dims=(8, 40, 64)), seed=st.integers(0, 2**31))
    def test_random_case(case, seed):
        check_kernel_case(case, load_backend("triton"), seed=seed)

Few head dims: each is another compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from ring_core.layout import LAYOUTS
from ring_core.testing.conformance.kernel import KernelCase


@st.composite
def random_kernel_cases(draw: st.DrawFn, *, head_dims: Sequence[int], longest: int = 80) -> KernelCase:
    """Cases of up to `longest` queries and keys, of simulated ranks or with tables made by hand, in a backend's finest
    dtype."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "batch": draw(st.integers(1, 2)),
        "kv_heads": kv_heads,
        "q_heads": kv_heads * group,
        "head_dim": draw(st.sampled_from(list(head_dims))),
        "causal": draw(st.booleans()),
        "sinks": draw(st.booleans()),
    }
    bound = st.one_of(st.just(-1), st.integers(0, longest))
    options["window"] = (draw(bound), -1 if options["causal"] else draw(bound))
    if draw(st.booleans()):
        options |= _by_hand(draw, longest)
    else:
        options |= _of_ranks(draw, longest)
    return KernelCase(name=" ".join(f"{name}={value}" for name, value in options.items()), **options)


def _by_hand(draw: st.DrawFn, longest: int) -> dict[str, Any]:
    """Strips and blocks cut anywhere, over several calls and pieces."""
    length = st.integers(1, longest)
    return {
        "hand_made": True,
        "q_length": draw(length),
        "k_length": draw(length),
        "strip": draw(length),
        "block": draw(st.integers(max(1, longest // 8), longest)),
        "calls": draw(st.integers(1, 3)),
        "pieces": draw(st.integers(1, 3)),
        "per_entry": draw(st.booleans()),
    }


def _of_ranks(draw: st.DrawFn, longest: int) -> dict[str, Any]:
    """What a plan makes of it, with padding at the end of either sequence."""
    layout, ranks = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 4))
    unit = 2 * ranks if layout == "zigzag" else ranks
    length = st.integers(1, longest // unit).map(lambda n: n * unit)
    q_length, k_length = draw(length), draw(length)
    return {
        "layout": layout,
        "schedule": draw(st.sampled_from(["ring", "gather"])),
        "world_size": ranks,
        "q_length": q_length,
        "k_length": k_length,
        "q_total": draw(st.one_of(st.none(), st.integers(0, q_length))),
        "k_total": draw(st.one_of(st.none(), st.integers(0, k_length))),
    }
