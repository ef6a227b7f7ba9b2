"""Kernels called directly, table by table, against the contract's reference in fp64: for their authors.

Where `conformance` asks of a backend what its capabilities promise, this asks one kernel, with settings of one's
choice, on a GPU or on whatever runs it elsewhere: tables that plans make and ones that none makes, rows and keys that
no segment names full of NaN, everything that must stay untouched marked.
"""

from ring_core.testing.direct.backward import (
    BackwardCase,
    Functions,
    backward_plans,
    causal_keys,
    key_batches,
    key_steps,
    random_keys,
    run_backward,
    simple_backward,
)
from ring_core.testing.direct.forward import ForwardCase, forward_plans, random_queries, run_forward
from ring_core.testing.direct.tables import (
    causal_steps,
    causal_table,
    own_batches,
    short_strips,
    table_of,
)

__all__ = [
    "BackwardCase",
    "ForwardCase",
    "Functions",
    "backward_plans",
    "causal_keys",
    "causal_steps",
    "causal_table",
    "forward_plans",
    "key_batches",
    "key_steps",
    "own_batches",
    "random_keys",
    "random_queries",
    "run_backward",
    "run_forward",
    "short_strips",
    "simple_backward",
    "table_of",
]
