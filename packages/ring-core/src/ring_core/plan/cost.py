"""What a plan costs, without running it."""

from __future__ import annotations


def attention_flops(pairs: int, *, batch: int, num_heads: int, head_dim: int, backward: bool = False) -> int:
    """FLOPs by the field's convention: two products forward, five backward, two operations a multiply-add."""
    return (10 if backward else 4) * pairs * batch * num_heads * head_dim


def message_bytes(tokens: int, *, batch: int, num_kv_heads: int, head_dim: int, element_size: int) -> int:
    """Bytes of a message that holds two tensors (keys and values, or their fp32 gradients) of so many tokens."""
    return 2 * tokens * batch * num_kv_heads * head_dim * element_size
