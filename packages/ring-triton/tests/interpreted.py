"""What the ranks of a pool run, in Triton's interpreter; and cases small enough for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import fast_interpreter
from torch import Tensor

from ring_core.testing import conformance
from ring_core.testing.conformance import AttentionCase, PackedCase, RingCase

Case = TypeVar("Case", bound=AttentionCase)


def small(case: Case) -> Case:
    """One batch entry and one group of heads, where a case is not about those: the interpreter's time goes by the
    number of programs."""
    if case.kv_heads == 2 and not case.name.startswith("heads-"):
        case = replace(case, q_heads=case.q_heads // 2, kv_heads=1)
    one_entry = case.batch == 2 and case.alibi != "batch" and not getattr(case, "per_entry", False)
    return replace(case, batch=1) if one_entry else case


def run_ring_case(case: RingCase, seed: int) -> dict[str, Tensor] | None:
    fast_interpreter.install()
    return conformance.run_ring_case(case, "triton", seed)


def run_packed_case(case: PackedCase, seed: int) -> dict[str, Tensor] | None:
    fast_interpreter.install()
    return conformance.run_packed_case(case, "triton", seed)
