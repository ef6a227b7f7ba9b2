"""Ring attention: one sequence attended to by several ranks, each of which keeps its queries while keys and values
travel.

>>> out = ring_attention(q, k, v, causal=True, layout="zigzag")  # local parts of one sequence, on every rank
"""

from ring_core.backend import Backend, Capabilities, UnsupportedError, backend_names, load_backend
from ring_core.comm import RingCommError
from ring_core.functions import AttentionFunctions, flash_attn_functions
from ring_core.interface import ring_attention
from ring_core.layout import (
    join_shards,
    local_positions,
    pad_sequence,
    padded_length,
    shard_sequence,
    unshard_sequence,
)
from ring_core.packed import PackedPlan, global_cu_seqlens, plan_packed
from ring_core.packed_attention import ring_attention_packed
from ring_core.varlen import llama3_flash_attn_prepare_cu_seqlens

__all__ = [
    "AttentionFunctions",
    "Backend",
    "Capabilities",
    "PackedPlan",
    "RingCommError",
    "UnsupportedError",
    "backend_names",
    "flash_attn_functions",
    "global_cu_seqlens",
    "join_shards",
    "llama3_flash_attn_prepare_cu_seqlens",
    "load_backend",
    "local_positions",
    "pad_sequence",
    "padded_length",
    "plan_packed",
    "ring_attention",
    "ring_attention_packed",
    "shard_sequence",
    "unshard_sequence",
]
