"""torch's context parallelism (`torch.distributed.tensor.experimental`, prototype) over the cuDNN attention in torch.

Its public face is a context manager that patches `scaled_dot_product_attention` and shards whole buffers on entry. What
it runs per call are the two templates used here, on local shards, so that neither the patching nor any resharding is
timed, nor the dispatch through DTensor: a little more than its users get. The names are private; torch 2.11 and 2.13
have them alike, with the same arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ring_compare.implementations import Traits
from ring_compare.suites import Cell

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
_NAMES = ("_templated_ring_attention", "_templated_ring_attention_backward", "_cp_options", "_RotateMethod")
_SEQUENCE = 2  # (B, H, S, D)
_ROTATIONS = {"": "ALL_GATHER", "all-gather": "ALL_GATHER", "all-to-all": "ALL_TO_ALL"}

aten = torch.ops.aten


def load_library() -> ModuleType:
    """torch's module with the templates; ImportError where this torch has none, or keeps them elsewhere."""
    module = importlib.import_module(_MODULE)
    absent = [name for name in _NAMES if not hasattr(module, name)]
    if absent:
        raise ImportError(f"torch {torch.__version__} has no {', '.join(absent)} in {_MODULE}")
    return module


class _Kernels:
    """Forward and backward as the templates call them, and what the backward needs besides out and lse."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    @property
    def forward(self) -> Callable[..., Any]:
        if not self.on_gpu:
            return aten._scaled_dot_product_flash_attention_for_cpu
        return partial(aten._scaled_dot_product_cudnn_attention, attn_bias=None, compute_log_sumexp=True)

    @property
    def backward(self) -> Callable[..., Any]:
        if not self.on_gpu:
            return aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return aten._scaled_dot_product_cudnn_attention_backward.default

    def saved(self, rest: tuple[Any, ...]) -> dict[str, Any]:
        if not self.on_gpu:
            return {"dropout_p": 0.0}
        cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, _ = rest
        lengths = {"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, "max_q": max_q, "max_k": max_k}
        return {**lengths, "philox_seed": seed, "philox_offset": offset, "attn_bias": None, "dropout_p": 0.0}


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        library: ModuleType,
        kernels: _Kernels,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *rest = library._templated_ring_attention(
            group, _SEQUENCE, kernels.forward, query=q, key=k, value=v, is_causal=causal
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest, ctx.causal, ctx.library, ctx.kernels, ctx.group = tuple(rest), causal, library, kernels, group
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv, *_rest = ctx.library._templated_ring_attention_backward(
            ctx.group,
            _SEQUENCE,
            ctx.kernels.backward,
            grad_out=dout,
            grad_out_name="grad_out",
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=lse,
            is_causal=ctx.causal,
            **ctx.kernels.saved(ctx.rest),
        )
        return dq, dk, dv, None, None, None, None


class TorchContextParallel:
    """K and V by one all-gather (the default of torch) or, with the option "all-to-all", hop by hop."""

    def __init__(self, option: str = "") -> None:
        if option not in _ROTATIONS:
            raise ValueError(f"torch-cp has no option {option!r}; there are all-gather and all-to-all")
        self.name = f"torch-cp[{option}]" if option else "torch-cp"
        self.traits = Traits(own_schedule=True, label=self.name, omits=frozenset(("lse",)))
        self._library = load_library()
        self._rotation = self._library._RotateMethod[_ROTATIONS[option]]

    def provider(self, device: torch.device) -> str:
        """cuDNN; on a CPU, for tests of this module, torch's flash kernel."""
        return "cudnn" if device.type == "cuda" else "torch"

    def supports(self, cell: Cell, device: torch.device) -> str | None:
        """Causal with its head-tail balancing, which is the zigzag layout; full on contiguous chunks."""
        if cell.world_size == 1:
            return "context parallelism needs several ranks"
        if cell.Hq != cell.Hkv:
            return "it takes as many key heads as query heads"
        if cell.documents or cell.mask == "window" or cell.Sq != cell.Sk:
            return "it has causal and full masks of one sequence only"
        if device.type == "cuda" and cell.dtype not in ("bfloat16", "float16"):
            return f"cuDNN's attention takes no {cell.dtype}"
        if cell.layout != ("zigzag" if cell.causal else "contiguous"):
            return "compared on zigzag (its head-tail balancing) when causal, on contiguous chunks when full"
        return None

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, cell: Cell, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """The two templates, over (B, H, S, D) views."""
        options = self._library._cp_options
        # Global state of torch, which nothing else in these processes reads.
        options.enable_load_balance, options.rotate_method = cell.causal, self._rotation
        ranks = dist.group.WORLD if group is None else group
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, _ = _ContextParallel.apply(*heads_first, cell.causal, self._library, _Kernels(q.device), ranks)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2), None
