"""Ring attention on our own Triton kernels.

>>> out = triton_zigzag_ring_flash_attn_func(q, k, v, causal=True)  # local parts of one sequence, on every rank

`TritonBackend().capabilities(device)` says what runs there. On machines without a GPU: TRITON_INTERPRET=1.
"""

from ring_core.functions import flash_attn_functions as _functions
from ring_triton.backend import PATHS, TritonBackend
from ring_triton.tuning import tune

_family = _functions("triton", prefix="triton_", module=__name__)
triton_ring_flash_attn_func = _family.ring_flash_attn_func
triton_ring_flash_attn_kvpacked_func = _family.ring_flash_attn_kvpacked_func
triton_ring_flash_attn_qkvpacked_func = _family.ring_flash_attn_qkvpacked_func
triton_zigzag_ring_flash_attn_func = _family.zigzag_ring_flash_attn_func
triton_zigzag_ring_flash_attn_kvpacked_func = _family.zigzag_ring_flash_attn_kvpacked_func
triton_zigzag_ring_flash_attn_qkvpacked_func = _family.zigzag_ring_flash_attn_qkvpacked_func
triton_stripe_flash_attn_func = _family.stripe_flash_attn_func
triton_stripe_flash_attn_kvpacked_func = _family.stripe_flash_attn_kvpacked_func
triton_stripe_flash_attn_qkvpacked_func = _family.stripe_flash_attn_qkvpacked_func
triton_ring_flash_attn_varlen_func = _family.ring_flash_attn_varlen_func
triton_ring_flash_attn_varlen_kvpacked_func = _family.ring_flash_attn_varlen_kvpacked_func
triton_ring_flash_attn_varlen_qkvpacked_func = _family.ring_flash_attn_varlen_qkvpacked_func
triton_zigzag_ring_flash_attn_varlen_func = _family.zigzag_ring_flash_attn_varlen_func
triton_zigzag_ring_flash_attn_varlen_kvpacked_func = _family.zigzag_ring_flash_attn_varlen_kvpacked_func
triton_zigzag_ring_flash_attn_varlen_qkvpacked_func = _family.zigzag_ring_flash_attn_varlen_qkvpacked_func
triton_balanced_ring_flash_attn_varlen_func = _family.balanced_ring_flash_attn_varlen_func
triton_balanced_ring_flash_attn_varlen_kvpacked_func = _family.balanced_ring_flash_attn_varlen_kvpacked_func
triton_balanced_ring_flash_attn_varlen_qkvpacked_func = _family.balanced_ring_flash_attn_varlen_qkvpacked_func
triton_llama3_flash_attn_varlen_func = _family.llama3_flash_attn_varlen_func
triton_llama3_flash_attn_varlen_kvpacked_func = _family.llama3_flash_attn_varlen_kvpacked_func
triton_llama3_flash_attn_varlen_qkvpacked_func = _family.llama3_flash_attn_varlen_qkvpacked_func

__all__ = [
    "PATHS",
    "TritonBackend",
    "triton_balanced_ring_flash_attn_varlen_func",
    "triton_balanced_ring_flash_attn_varlen_kvpacked_func",
    "triton_balanced_ring_flash_attn_varlen_qkvpacked_func",
    "triton_llama3_flash_attn_varlen_func",
    "triton_llama3_flash_attn_varlen_kvpacked_func",
    "triton_llama3_flash_attn_varlen_qkvpacked_func",
    "triton_ring_flash_attn_func",
    "triton_ring_flash_attn_kvpacked_func",
    "triton_ring_flash_attn_qkvpacked_func",
    "triton_ring_flash_attn_varlen_func",
    "triton_ring_flash_attn_varlen_kvpacked_func",
    "triton_ring_flash_attn_varlen_qkvpacked_func",
    "triton_stripe_flash_attn_func",
    "triton_stripe_flash_attn_kvpacked_func",
    "triton_stripe_flash_attn_qkvpacked_func",
    "triton_zigzag_ring_flash_attn_func",
    "triton_zigzag_ring_flash_attn_kvpacked_func",
    "triton_zigzag_ring_flash_attn_qkvpacked_func",
    "triton_zigzag_ring_flash_attn_varlen_func",
    "triton_zigzag_ring_flash_attn_varlen_kvpacked_func",
    "triton_zigzag_ring_flash_attn_varlen_qkvpacked_func",
    "tune",
]
