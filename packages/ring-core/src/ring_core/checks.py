"""Checks of what users pass that several public functions share: on the host, without waiting for the GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import SymInt, Tensor

from ring_core.plan import SCHEDULES
from ring_core.plan.problem import UNBOUNDED

BATCHED = "(batch, sequence, heads, head_dim)"


class Form(NamedTuple):
    """What checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def form_of(name: str, x: Tensor) -> Form:
    """Raises TypeError unless it is a tensor."""
    _check_is_tensor(name, x)
    return Form(x.shape, x.dtype, x.device)


def _check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_tensors(q: Form, k: Form, v: Form, form: str) -> None:
    """Raises TypeError or ValueError unless q, k and v fit together and have the dimensions that `form` names."""
    dims = form.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != dims:
            raise ValueError(f"{name} must be {form}, got shape {tuple(x.shape)}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q, k, v must be floating point, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast them with .to(dtype)")
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}: move them with .to(device)"
        )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if (dims == 4 and q.shape[0] != k.shape[0]) or q.shape[-1] != k.shape[-1]:
        agree = "batch and head_dim" if dims == 4 else "head_dim"
        raise ValueError(f"q and k must agree in {agree}, got shapes {tuple(q.shape)} and {tuple(k.shape)} {form}")
    if not k.shape[-2] or not q.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the number of query heads must be a positive multiple of the number of key heads, got {q.shape[-2]} and "
            f"{k.shape[-2]}"
        )


def check_schedule(schedule: str) -> None:
    """Raises ValueError unless there is such a schedule."""
    if schedule != "auto" and schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are 'auto', {', '.join(map(repr, SCHEDULES))}")


def check_backend(backend: str | None) -> str:
    """The name, "" for none. Raises TypeError unless it is one."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be the name of a backend or None, got {type(backend).__name__}")
    return backend or ""


def is_whole(x: object) -> bool:
    """Whether it is an int, numpy's or a compiler's included."""
    return isinstance(x, (int, np.integer, SymInt))


def check_window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """Left and right, -1 for unbounded, with the causal mask in `right`. Raises TypeError or ValueError."""
    wanted = "window_size must be (left, right), two ints, each >= 0 or -1 for unbounded"
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"{wanted}, got {window_size!r}")
    if len(window_size) != 2:
        raise ValueError(f"{wanted}, got {window_size!r}")
    left, right = window_size
    if not is_whole(left) or not is_whole(right):
        raise TypeError(f"{wanted}, got {window_size!r}")
    if left < -1 or right < -1:
        raise ValueError(f"{wanted}, got {window_size!r}")
    left, right = (-1 if side >= UNBOUNDED else side for side in (left, right))
    return left, 0 if causal else right


def check_scores(q: Tensor, softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    """Raises TypeError or ValueError unless what changes the scores of q (B, Sq, Hq, D), or without B, fits."""
    if not softcap >= 0:
        raise ValueError(f"softcap must be >= 0 (0 is none), got {softcap}")
    batch, num_heads = q.shape[0] if q.dim() == 4 else 1, q.shape[-2]
    if alibi_slopes is not None:
        _check_is_tensor("alibi_slopes", alibi_slopes)
        if alibi_slopes.shape not in ((num_heads,), (batch, num_heads)):
            raise ValueError(
                f"alibi_slopes must be ({num_heads},) or ({batch}, {num_heads}), got {tuple(alibi_slopes.shape)}"
            )
        if alibi_slopes.dtype not in (torch.float32, torch.float64) or alibi_slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes must be fp32 or fp64 on {q.device}, got {alibi_slopes.dtype} on {alibi_slopes.device}"
            )
    if sinks is not None:
        _check_is_tensor("sinks", sinks)
        if sinks.shape != (num_heads,) or not sinks.is_floating_point() or sinks.device != q.device:
            raise ValueError(
                f"sinks must be ({num_heads},), floating point, on {q.device}, got {tuple(sinks.shape)}, "
                f"{sinks.dtype}, on {sinks.device}"
            )


def scale_of(q: Tensor | Form, softmax_scale: float | None) -> float:
    """The scale of q·k: 1 / sqrt(head_dim) where none is given."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    return float(softmax_scale)


def seed_of(q: Tensor, dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor | None:
    """int64 (1,) on q's device, without waiting for it."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p == 0.0:
        return None
    if dropout_seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1 or dropout_seed.device != q.device:
            raise ValueError(
                f"dropout_seed must be an int or one int64 on {q.device}, got {dropout_seed.numel()} "
                f"{dropout_seed.dtype} on {dropout_seed.device}"
            )
        return dropout_seed.reshape(1)
    if not isinstance(dropout_seed, int):
        raise TypeError(f"dropout_seed must be an int or one int64 on {q.device}, got {type(dropout_seed).__name__}")
    if not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed must be an int that fits into 64 bits, with its sign, got {dropout_seed}")
    return torch.full((1,), dropout_seed, dtype=torch.int64, device=q.device)
