"""Whose kernels there are."""

from __future__ import annotations

from ring_native.providers.aten import Aten
from ring_native.providers.base import Provider
from ring_native.providers.cpu import Cpu
from ring_native.providers.cudnn import Cudnn
from ring_native.providers.fa3 import FlashAttention3
from ring_native.providers.fa4 import FlashAttention4
from ring_native.providers.flash_attn import FlashAttention2

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (FlashAttention2(), Aten(), Cudnn(), FlashAttention3(), FlashAttention4(), Cpu())
}
"""By name. Making them imports none of their libraries."""

__all__ = ["PROVIDERS", "Provider"]
