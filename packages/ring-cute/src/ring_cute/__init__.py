"""Ring attention on our own kernels in CUTLASS CuTe DSL, for compute capability 9.0.

>>> out = cute_zigzag_ring_flash_attn_func(q, k, v, causal=True)  # local parts of one sequence, on every rank

Importing it imports neither the DSL nor a kernel, and needs no GPU; `CuteBackend().capabilities(device)` says what runs
there, and what is missing. `python -m ring_cute.compile` compiles kernels ahead of time.
"""

from ring_core.functions import flash_attn_functions as _functions
from ring_cute.backend import CuteBackend

_family = _functions("cute", prefix="cute_", module=__name__)
cute_ring_flash_attn_func = _family.ring_flash_attn_func
cute_ring_flash_attn_kvpacked_func = _family.ring_flash_attn_kvpacked_func
cute_ring_flash_attn_qkvpacked_func = _family.ring_flash_attn_qkvpacked_func
cute_zigzag_ring_flash_attn_func = _family.zigzag_ring_flash_attn_func
cute_zigzag_ring_flash_attn_kvpacked_func = _family.zigzag_ring_flash_attn_kvpacked_func
cute_zigzag_ring_flash_attn_qkvpacked_func = _family.zigzag_ring_flash_attn_qkvpacked_func
cute_stripe_flash_attn_func = _family.stripe_flash_attn_func
cute_stripe_flash_attn_kvpacked_func = _family.stripe_flash_attn_kvpacked_func
cute_stripe_flash_attn_qkvpacked_func = _family.stripe_flash_attn_qkvpacked_func
cute_ring_flash_attn_varlen_func = _family.ring_flash_attn_varlen_func
cute_ring_flash_attn_varlen_kvpacked_func = _family.ring_flash_attn_varlen_kvpacked_func
cute_ring_flash_attn_varlen_qkvpacked_func = _family.ring_flash_attn_varlen_qkvpacked_func
cute_zigzag_ring_flash_attn_varlen_func = _family.zigzag_ring_flash_attn_varlen_func
cute_zigzag_ring_flash_attn_varlen_kvpacked_func = _family.zigzag_ring_flash_attn_varlen_kvpacked_func
cute_zigzag_ring_flash_attn_varlen_qkvpacked_func = _family.zigzag_ring_flash_attn_varlen_qkvpacked_func
cute_balanced_ring_flash_attn_varlen_func = _family.balanced_ring_flash_attn_varlen_func
cute_balanced_ring_flash_attn_varlen_kvpacked_func = _family.balanced_ring_flash_attn_varlen_kvpacked_func
cute_balanced_ring_flash_attn_varlen_qkvpacked_func = _family.balanced_ring_flash_attn_varlen_qkvpacked_func
cute_llama3_flash_attn_varlen_func = _family.llama3_flash_attn_varlen_func
cute_llama3_flash_attn_varlen_kvpacked_func = _family.llama3_flash_attn_varlen_kvpacked_func
cute_llama3_flash_attn_varlen_qkvpacked_func = _family.llama3_flash_attn_varlen_qkvpacked_func

__all__ = [
    "CuteBackend",
    "cute_balanced_ring_flash_attn_varlen_func",
    "cute_balanced_ring_flash_attn_varlen_kvpacked_func",
    "cute_balanced_ring_flash_attn_varlen_qkvpacked_func",
    "cute_llama3_flash_attn_varlen_func",
    "cute_llama3_flash_attn_varlen_kvpacked_func",
    "cute_llama3_flash_attn_varlen_qkvpacked_func",
    "cute_ring_flash_attn_func",
    "cute_ring_flash_attn_kvpacked_func",
    "cute_ring_flash_attn_qkvpacked_func",
    "cute_ring_flash_attn_varlen_func",
    "cute_ring_flash_attn_varlen_kvpacked_func",
    "cute_ring_flash_attn_varlen_qkvpacked_func",
    "cute_stripe_flash_attn_func",
    "cute_stripe_flash_attn_kvpacked_func",
    "cute_stripe_flash_attn_qkvpacked_func",
    "cute_zigzag_ring_flash_attn_func",
    "cute_zigzag_ring_flash_attn_kvpacked_func",
    "cute_zigzag_ring_flash_attn_qkvpacked_func",
    "cute_zigzag_ring_flash_attn_varlen_func",
    "cute_zigzag_ring_flash_attn_varlen_kvpacked_func",
    "cute_zigzag_ring_flash_attn_varlen_qkvpacked_func",
]
