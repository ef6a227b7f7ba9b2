"""Which cases the GPU tests run: data, so that `needed.py` knows on a machine without a GPU which kernels they take."""

from __future__ import annotations

from dataclasses import replace

import torch

from ring_core.testing.conformance import (
    KernelCase,
    PackedCase,
    RingCase,
    StagedCase,
    kernel_cases,
    packed_cases,
    ring_cases,
)

SCALE = 31
"""Lengths of about 2,000 tokens, multiples of nothing."""
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 24, 40, 64, 80, 96, 112, 128, 136, 160, 192, 200, 256)
WIDE_HEAD_DIMS = (192, 256)
WIDE = (
    "full-contiguous-ring-3", "causal-zigzag-gather-4", "causal-stripe-ring-3", "two-sided-zigzag-ring-4",
    "window-unseen-rows-zigzag-gather-2", "cuts-single-rows", "entries", "packed-causal-sinks",
    "heads-6-2-contiguous-ring-2", "strided-zigzag-ring-2", "sinks-stripe-gather-3",
    "deterministic-packed-state-stripe-ring-3", "final-causal-zigzag-ring-1", "final-unseen-strips", "final-packed",
    "final-fp16-deterministic-contiguous-ring-1",
)  # fmt: skip
"""Cases of the contract that wide heads, whose backward has consumers of its own, are run through as well."""
PROPERTY_HEAD_DIMS = (64, 128)
STAGED = [
    StagedCase(),
    StagedCase(causal=True, head_dim=64, dtype=torch.float16),
    StagedCase(layout="zigzag", causal=True, world_size=2, rank=1),
    StagedCase(layout="zigzag", causal=True, rank=0),
    StagedCase(layout="stripe", causal=True, head_dim=64, rank=2),
    StagedCase(length=4000, layout="stripe", head_dim=256, heads=(6, 2), rank=1),
    StagedCase(length=4000, layout="zigzag", causal=True, head_dim=192, rank=3),
]
LONG_STAGED = StagedCase(length=32768, heads=(16, 4))


def kernels() -> list[KernelCase]:
    """Every case of the contract; where it leaves the dtype open, in both."""
    return [
        replace(case, dtype=dtype, name=f"{case.name}-{str(dtype).removeprefix('torch.')}")
        for case in kernel_cases(scale=SCALE)
        for dtype in ([case.dtype] if case.dtype else DTYPES)
    ]


def head_dims() -> list[KernelCase]:
    (case,) = (case for case in kernel_cases(scale=SCALE) if case.name == "causal-contiguous-ring-3")
    return [
        replace(case, name=f"dim {head_dim}", head_dim=head_dim, dtype=torch.bfloat16, batch=1)
        for head_dim in HEAD_DIMS
    ]


def shaped() -> list[KernelCase]:
    """Softcap and ALiBi, which have settings of their own, at head dims other than most cases have, in one step and in
    steps, and in a fixed order."""
    found = {case.name: case for case in kernel_cases(scale=SCALE)}
    return [
        replace(
            found[name], name=f"{scores} {name} {head_dim}", head_dim=head_dim, dtype=torch.bfloat16, softcap=softcap,
            alibi=alibi, deterministic=head_dim == 128,
        )
        for name in ("causal-stripe-ring-3", "causal-zigzag-gather-4")
        for head_dim in (40, 128, 256)
        for scores, softcap, alibi in (("softcap", 1.5, ""), ("ALiBi", 0.0, "batch"), ("both", 1.5, "batch"))
    ]  # fmt: skip


def wide() -> list[KernelCase]:
    return [
        replace(case, name=f"{case.name} of dim {head_dim}", head_dim=head_dim, dtype=case.dtype or torch.bfloat16)
        for case in kernel_cases(scale=SCALE)
        if case.name in WIDE
        for head_dim in WIDE_HEAD_DIMS
    ]


def rings() -> list[RingCase]:
    """On 1, 2 and 4 ranks; where the case leaves the dtype open, in bf16."""
    cases = ring_cases([1, 2, 4], scale=SCALE, through=("collectives", "peer_memory"))
    return [replace(case, dtype=case.dtype or torch.bfloat16) for case in cases]


def packed() -> list[PackedCase]:
    return packed_cases([1, 2, 4])
