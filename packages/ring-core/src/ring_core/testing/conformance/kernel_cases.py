"""The cases that every backend must pass in one process.

Not the full product: geometry (which segments), features (what happens to a score) and numerics (dtypes, inputs, head
dims) are varied one at a time around a common middle, because a kernel handles them in different places; then the pairs
that do meet in a kernel's code are combined by hand (a feature with a state that travels, with bands, with grouped
heads, with rows that see nothing).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ring_core.testing.conformance.kernel import KernelCase
from ring_core.testing.measure import INPUT_KINDS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernel_cases(scale: int = 1) -> list[KernelCase]:
    """All kernel-level cases; `str(case)` is a test id.

    scale: lengths, windows and blocks are multiplied by it. 1 suits interpreters (tens of tokens); use an odd number on
    a GPU, so that lengths stay multiples of nothing (31: about 2,000 tokens).
    """
    cases = [*_geometry(), *_hand_made(), *_heads(), *_features(), *_numerics(), *_final()]
    return [case if scale == 1 else _scaled(case, scale) for case in cases]


def _planned(name: str, layout: str, schedule: str, world_size: int, **options: Any) -> KernelCase:
    """Simulated ranks; lengths of 15 tokens a rank (16 zigzag) unless given, neither a multiple of a tile."""
    chunk = 18 if layout == "zigzag" else 15
    options = {"q_length": chunk * world_size, "k_length": chunk * world_size} | options
    return KernelCase(
        name=f"{name}-{layout}-{schedule}-{world_size}",
        layout=layout,
        schedule=schedule,
        world_size=world_size,
        **options,
    )


def _geometry() -> Iterator[KernelCase]:
    """Every kind of segment that plans make. Three ranks: first, last and one between; four give zigzag halves that
    touch."""
    masks: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "narrow": {"causal": True, "window": (5, 0)},  # narrower than a chunk: whole chunks are never seen
        "wide": {"causal": True, "window": (23, 0)},  # wider than a chunk: three chunks, two of them cut
        "two-sided": {"window": (7, 18)},
    }
    for mask, options in masks.items():
        # One call over all that is seen, and one call a chunk with (state, lse) between: either could be wrong alone.
        yield _planned(mask, "contiguous", "ring", 3, **options)
        yield _planned(mask, "zigzag", "gather" if mask in ("full", "narrow") else "ring", 4, **options)
        yield _planned(mask, "stripe", "ring" if mask != "wide" else "gather", 3, **options)
    yield _planned("causal", "contiguous", "gather", 3, causal=True, flags=True)
    yield _planned("causal", "zigzag", "gather", 4, causal=True, flags=True)
    yield _planned("ahead", "stripe", "gather", 2, window=(-1, 4))  # only the right side is bounded
    yield _planned("itself", "contiguous", "gather", 2, window=(0, 0))  # lse is the score, out is v
    # Bottom-right alignment: more keys than queries, and more queries than keys, whose first rows see nothing.
    yield _planned("causal-long-keys", "contiguous", "ring", 2, causal=True, q_length=26, k_length=50)
    yield _planned("causal-long-keys", "stripe", "ring", 3, causal=True, q_length=21, k_length=60)
    yield _planned("causal-unseen-rows", "contiguous", "ring", 2, causal=True, q_length=50, k_length=26)
    yield _planned("window-unseen-rows", "zigzag", "gather", 2, window=(3, 2), q_length=52, k_length=20)
    # Padding: keys beyond the true length and rows beyond it hold NaN here.
    yield _planned("padding", "contiguous", "ring", 3, q_total=38, k_total=38)
    yield _planned("padding-causal", "zigzag", "gather", 2, causal=True, q_total=29, k_total=29)
    yield _planned("padding-unequal", "stripe", "ring", 3, causal=True, q_total=40, k_total=32, sinks=True)
    yield _planned("no-true-keys", "contiguous", "gather", 2, q_total=28, k_total=0)
    yield _planned("one-token", "contiguous", "ring", 2, q_length=2, k_length=2, causal=True)
    # Rows beyond one strip of the planner (128), in one process.
    yield _planned("long", "contiguous", "gather", 1, causal=True, window=(140, 0), q_length=333, k_length=333, batch=1)


def _hand_made() -> Iterator[KernelCase]:
    """Tables that plans for one sequence do not make: the contract says what they mean all the same."""
    shape: dict[str, Any] = {"hand_made": True, "q_length": 47, "k_length": 61}
    yield KernelCase(name="cuts-one-call", strip=17, block=13, causal=True, **shape)
    yield KernelCase(name="cuts-four-calls", strip=17, block=13, calls=4, causal=True, **shape)
    yield KernelCase(name="cuts-pieces-full", strip=20, block=19, calls=2, pieces=3, flags=True, **shape)
    yield KernelCase(name="cuts-single-rows", strip=1, block=7, calls=2, window=(9, 3), causal=True, **shape)
    # A row of the table for each batch entry, cut at places of its own.
    yield KernelCase(name="entries", strip=17, block=13, per_entry=True, batch=3, **shape)
    yield KernelCase(
        name="entries-everything",
        strip=11,
        block=13,
        calls=3,
        pieces=2,
        per_entry=True,
        batch=3,
        causal=True,
        window=(19, 0),
        alibi="batch",
        dropout_p=0.2,
        sinks=True,
        softcap=3.0,
        **shape,
    )
    # Documents: an empty one, one of one token, one without keys, one without queries, q and k of different lengths;
    # before the first and after the last are rows of nobody.
    packed: dict[str, Any] = {
        "hand_made": True,
        "batch": 1,
        "q_length": 70,
        "k_length": 77,
        "cu_q": (4, 4, 5, 20, 29, 29, 62),
        "cu_k": (3, 3, 4, 30, 30, 41, 69),
    }
    yield KernelCase(name="packed-full", **packed)
    yield KernelCase(name="packed-causal-sinks", causal=True, sinks=True, **packed)
    yield KernelCase(name="packed-window-cuts", window=(4, 6), strip=9, block=7, calls=3, **packed)
    yield KernelCase(
        name="packed-alibi-dropout",
        causal=True,
        alibi="head",
        dropout_p=0.15,
        strip=16,
        block=16,
        pieces=2,
        calls=2,
        **packed,
    )


def _heads() -> Iterator[KernelCase]:
    """Grouping of heads, and head dims, on a causal ring of two so that the state is grouped too."""
    for q_heads, kv_heads in ((1, 1), (3, 3), (6, 2), (5, 1)):
        yield _planned(
            f"heads-{q_heads}-{kv_heads}", "contiguous", "ring", 2, q_heads=q_heads, kv_heads=kv_heads, causal=True
        )
    for head_dim in (16, 40, 96, 128, 256):
        yield _planned(f"dim-{head_dim}", "contiguous", "ring", 2, head_dim=head_dim, causal=True, batch=1)
    yield _planned("strided", "zigzag", "ring", 2, causal=True, strided=True)


def _features() -> Iterator[KernelCase]:
    """What happens to a score, each with a state between calls and with rows that see nothing, and all together."""
    features: dict[str, dict[str, Any]] = {
        "scale": {"scale": 0.31},
        "softcap": {"softcap": 1.5, "scale": 0.4},  # scores of a few times the cap: tanh is bent
        "sinks": {"sinks": True},
        "alibi": {"alibi": "head"},
        "alibi-batch": {"alibi": "batch"},
        "dropout": {"dropout_p": 0.25},
    }
    for name, options in features.items():
        yield _planned(name, "contiguous", "ring", 3, causal=True, **options)
        # Stripes: positions go in steps of the world size, which distances and dropout must know.
        yield _planned(name, "stripe", "gather", 3, **options)
    yield _planned("sinks-unseen-rows", "contiguous", "ring", 2, causal=True, sinks=True, q_length=40, k_length=20)
    yield _planned("alibi-window", "zigzag", "ring", 2, alibi="head", window=(9, 9))
    # One rank alone, which may be all that a backend has slopes for: distances under every kind of mask.
    alone: dict[str, Any] = {"alibi": "batch", "batch": 3}
    yield _planned("alibi-alone-full", "contiguous", "ring", 1, **alone, q_length=33, k_length=50)
    yield _planned("alibi-alone-long-queries", "contiguous", "ring", 1, alibi="head", q_length=50, k_length=33)
    yield _planned("alibi-alone-causal", "contiguous", "ring", 1, **alone, causal=True, q_length=33, k_length=50)
    yield _planned("alibi-alone-unseen-rows", "contiguous", "ring", 1, **alone, causal=True, q_length=50, k_length=33)
    yield _planned("alibi-alone-window", "contiguous", "ring", 1, **alone, window=(9, 6), q_length=50, k_length=33)
    yield _planned(
        "alibi-alone-padded", "contiguous", "ring", 1, **alone, window=(9, 0), q_length=50, k_length=43, k_total=40
    )
    yield _planned("no-lse-gradient", "contiguous", "ring", 2, dlse=False, sinks=True, causal=True)
    # v one-hot and small scores: every probability is in out, so the mask is seen bit by bit.
    mask: dict[str, Any] = {"reveal": True, "dropout_p": 0.5, "scale": 0.01, "inputs": "randn"}
    yield _planned("dropout-mask", "contiguous", "gather", 1, q_length=90, k_length=60, **mask)
    yield _planned("dropout-mask", "stripe", "ring", 3, q_length=60, k_length=60, causal=True, **mask)
    everything: dict[str, Any] = {
        "softcap": 4.0,
        "sinks": True,
        "alibi": "batch",
        "dropout_p": 0.1,
        "window": (31, 0),
        "causal": True,
    }
    yield _planned("everything", "zigzag", "ring", 3, **everything, q_heads=6, q_total=47, k_total=47)
    yield _planned("everything", "stripe", "gather", 3, **everything, q_heads=6, strided=True, q_length=36)
    yield _planned("deterministic", "contiguous", "gather", 2, deterministic=True, causal=True, q_heads=6)
    yield _planned("deterministic-packed-state", "stripe", "ring", 3, deterministic=True, window=(20, 3), sinks=True)


def _numerics() -> Iterator[KernelCase]:
    """Every dtype with every kind of input, the state crossing calls; and a one-call case a dtype with the features
    that scale."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for kind in INPUT_KINDS:
            yield _planned(
                f"{short}-{kind}",
                "contiguous",
                "ring",
                2,
                dtype=dtype,
                inputs=kind,
                causal=True,
                q_length=58,
                k_length=58,
            )
        yield _planned(f"{short}-features", "zigzag", "gather", 2, dtype=dtype, sinks=True, softcap=5.0, alibi="head")


def _final() -> Iterator[KernelCase]:
    """dk and dv in the inputs' dtype, written: what no pair reaches is 0, whatever was there."""
    half: dict[str, Any] = {"final": True, "dtype": torch.bfloat16}
    for layout in ("contiguous", "zigzag", "stripe"):
        yield _planned("final-causal", layout, "ring", 1, causal=True, q_length=46, k_length=46, **half)
    # keys before the window of the first query, and padding: the table does not name them
    yield _planned("final-unseen-keys", "contiguous", "ring", 1, **half, window=(5, 2), q_length=33, k_length=80)
    yield _planned("final-padding", "contiguous", "ring", 1, **half, q_length=50, k_length=50, q_total=41, k_total=38)
    for q_heads, kv_heads in ((3, 3), (6, 1)):
        heads = {"q_heads": q_heads, "kv_heads": kv_heads}
        yield _planned(f"final-heads-{q_heads}-{kv_heads}", "contiguous", "ring", 1, **half, **heads, causal=True)
    for head_dim in (40, 128, 256):
        yield _planned(f"final-dim-{head_dim}", "contiguous", "ring", 1, **half, head_dim=head_dim, batch=1)
    fp16 = half | {"dtype": torch.float16, "strided": True, "deterministic": True}
    yield _planned("final-fp16-deterministic", "contiguous", "ring", 1, causal=True, **fp16)
    everything: dict[str, Any] = {"softcap": 4.0, "sinks": True, "alibi": "batch", "dropout_p": 0.1, "window": (31, 0)}
    yield _planned("final-everything", "contiguous", "ring", 1, **half, **everything, causal=True, q_heads=6)
    shape: dict[str, Any] = {"hand_made": True, "q_length": 47, "k_length": 61}
    # strips that the table names and no query sees, and several calls, each about other keys
    yield KernelCase(name="final-unseen-strips", strip=17, block=7, window=(4, 2), **shape, **half)
    yield KernelCase(name="final-pieces", strip=20, block=19, calls=2, pieces=3, causal=True, **shape, **half)
    yield KernelCase(name="final-entries", strip=17, block=13, per_entry=True, batch=3, **shape, **half)
    packed: dict[str, Any] = {"cu_q": (4, 4, 5, 20, 29, 29, 62), "cu_k": (3, 3, 4, 30, 30, 41, 69)}
    packed |= {"hand_made": True, "batch": 1, "q_length": 70, "k_length": 77}
    yield KernelCase(name="final-packed", causal=True, **packed, **half)


def _scaled(case: KernelCase, scale: int) -> KernelCase:
    """All lengths times `scale`; unbounded windows, and cases whose v must be one-hot, stay."""
    if case.reveal:
        return case

    def times(n: int) -> int:
        return n * scale if 0 < n < 1 << 20 else n

    return replace(
        case,
        q_length=times(case.q_length),
        k_length=times(case.k_length),
        q_total=None if case.q_total is None else times(case.q_total),
        k_total=None if case.k_total is None else times(case.k_total),
        window=(times(case.window[0]), times(case.window[1])),
        strip=times(case.strip) if case.strip > 1 else case.strip * scale - scale // 3,
        block=times(case.block),
        cu_q=None if case.cu_q is None else tuple(map(times, case.cu_q)),
        cu_k=None if case.cu_k is None else tuple(map(times, case.cu_k)),
    )
