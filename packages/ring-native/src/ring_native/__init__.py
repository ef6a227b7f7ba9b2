"""Ring attention on ready-made kernels: flash-attn, cuDNN, FlashAttention-3 and -4, and those inside torch.

>>> out = zigzag_ring_flash_attn_func(q, k, v, causal=True)  # local parts of one sequence, on every rank

Nothing is imported or compiled before it is used; `NativeBackend().capabilities(device)` says whose kernels would run.
"""

from ring_core.functions import AttentionFunctions
from ring_core.functions import flash_attn_functions as _functions
from ring_native.backend import NativeBackend
from ring_native.providers import PROVIDERS


def flash_attn_functions(provider: str | None = None) -> AttentionFunctions:
    """The family of functions on one provider's kernels, whatever the default is.

    >>> zigzag = flash_attn_functions("fa4").zigzag_ring_flash_attn_func

    Raises:
        ValueError: there is no such provider.
    """
    return _functions(NativeBackend(provider).name, module=__name__)


_family = _functions("native", module=__name__)
ring_flash_attn_func = _family.ring_flash_attn_func
ring_flash_attn_kvpacked_func = _family.ring_flash_attn_kvpacked_func
ring_flash_attn_qkvpacked_func = _family.ring_flash_attn_qkvpacked_func
zigzag_ring_flash_attn_func = _family.zigzag_ring_flash_attn_func
zigzag_ring_flash_attn_kvpacked_func = _family.zigzag_ring_flash_attn_kvpacked_func
zigzag_ring_flash_attn_qkvpacked_func = _family.zigzag_ring_flash_attn_qkvpacked_func
stripe_flash_attn_func = _family.stripe_flash_attn_func
stripe_flash_attn_kvpacked_func = _family.stripe_flash_attn_kvpacked_func
stripe_flash_attn_qkvpacked_func = _family.stripe_flash_attn_qkvpacked_func
ring_flash_attn_varlen_func = _family.ring_flash_attn_varlen_func
ring_flash_attn_varlen_kvpacked_func = _family.ring_flash_attn_varlen_kvpacked_func
ring_flash_attn_varlen_qkvpacked_func = _family.ring_flash_attn_varlen_qkvpacked_func
zigzag_ring_flash_attn_varlen_func = _family.zigzag_ring_flash_attn_varlen_func
zigzag_ring_flash_attn_varlen_kvpacked_func = _family.zigzag_ring_flash_attn_varlen_kvpacked_func
zigzag_ring_flash_attn_varlen_qkvpacked_func = _family.zigzag_ring_flash_attn_varlen_qkvpacked_func
balanced_ring_flash_attn_varlen_func = _family.balanced_ring_flash_attn_varlen_func
balanced_ring_flash_attn_varlen_kvpacked_func = _family.balanced_ring_flash_attn_varlen_kvpacked_func
balanced_ring_flash_attn_varlen_qkvpacked_func = _family.balanced_ring_flash_attn_varlen_qkvpacked_func
llama3_flash_attn_varlen_func = _family.llama3_flash_attn_varlen_func
llama3_flash_attn_varlen_kvpacked_func = _family.llama3_flash_attn_varlen_kvpacked_func
llama3_flash_attn_varlen_qkvpacked_func = _family.llama3_flash_attn_varlen_qkvpacked_func

__all__ = [
    "PROVIDERS",
    "NativeBackend",
    "balanced_ring_flash_attn_varlen_func",
    "balanced_ring_flash_attn_varlen_kvpacked_func",
    "balanced_ring_flash_attn_varlen_qkvpacked_func",
    "flash_attn_functions",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
]
