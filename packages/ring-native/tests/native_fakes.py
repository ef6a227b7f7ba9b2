"""Kernels in plain PyTorch that stand for those that need a GPU: with the same masks and the same misreadings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ring_core.backend import Capabilities, HeadDims, Params, accumulation_dtype
from ring_core.testing import conformance
from ring_core.testing.conformance import PackedCase, RingCase
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers import PROVIDERS
from ring_native.providers.base import Gradients


@dataclass
class Fake:
    """A provider. `calls` says what it was called for: (phase, Sq, Sk, mask, number of sequences)."""

    name: str
    style: Style
    varlen: bool
    features: frozenset[str]
    writes: bool = True
    """Into the tensors it is given, or it returns others."""
    calls: list[tuple[str, int, int, Mask, int]] = field(default_factory=list)

    def capabilities(self, device: torch.device) -> Capabilities:
        return Capabilities(
            available=True,
            provider=self.name,
            dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
            head_dims=HeadDims(largest=1 << 16),
            features=self.features,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> tuple[Tensor, Tensor]:
        self._record("forward", q, k, mask, sequences)
        if out is None or not self.writes:
            out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        if lse is None or not self.writes:
            lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
            lse = torch.full(lse_shape, torch.nan, dtype=accumulation_dtype(q.dtype))
        for rows, keys in _parts(q, k, sequences):
            s, _ = _scores(q[..., rows, :, :], k[..., keys, :, :], self._shown(mask, rows, keys, sequences), params)
            lse[..., rows] = torch.logsumexp(s, dim=-1)
            p = torch.softmax(s, dim=-1)  # (..., H, Sq, Sk)
            weighted = torch.einsum("...hij,...jhd->...ihd", p, _wide(v[..., keys, :, :], q))
            out[..., rows, :, :] = weighted.to(q.dtype)
        return out, lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> Gradients:
        self._record("backward", q, k, mask, sequences)
        assert lse.is_contiguous()
        if dq is None or not self.writes:
            dq = torch.full(q.shape, torch.nan, dtype=q.dtype)
        dk, dv = (torch.full(k.shape, torch.nan, dtype=k.dtype) for _ in range(2))
        sums = accumulation_dtype(q.dtype)
        for rows, keys in _parts(q, k, sequences):
            qs, ks, vs = q[..., rows, :, :], k[..., keys, :, :], v[..., keys, :, :]
            s, slope = _scores(qs, ks, self._shown(mask, rows, keys, sequences), params)
            p = torch.exp(s - lse[..., rows, None])
            do = dout[..., rows, :, :].to(sums)
            delta = (do * out[..., rows, :, :].to(sums)).sum(dim=-1).transpose(-1, -2)  # (..., H, Sq)
            if dlse is not None:
                delta = delta - dlse[..., rows]
            dp = torch.einsum("...ihd,...jhd->...hij", do, _wide(vs, q))
            ds = p * (dp - delta[..., None]) * slope
            dq[..., rows, :, :] = torch.einsum("...hij,...jhd->...ihd", ds, _wide(ks, q)).to(q.dtype)
            dk[..., keys, :, :] = _narrow(torch.einsum("...hij,...ihd->...jhd", ds, qs.to(sums)), k)
            dv[..., keys, :, :] = _narrow(torch.einsum("...hij,...ihd->...jhd", p, do), v)
        return dq, dk, dv

    def _record(self, phase: str, q: Tensor, k: Tensor, mask: Mask, sequences: Sequences | None) -> None:
        assert sequences is None or self.varlen
        count = 0 if sequences is None else len(sequences.q_edges) - 1
        self.calls.append((phase, q.shape[-3], k.shape[-3], mask, count))

    def _shown(self, mask: Mask, rows: slice, keys: slice, sequences: Sequences | None) -> Tensor:
        """bool (Sq, Sk) of one sequence, misread as the kernel would."""
        q_len, k_len = rows.stop - rows.start, keys.stop - keys.start
        i, j = torch.arange(q_len)[:, None], torch.arange(k_len)
        if self.style is Style.SQUARES:  # aligned top-left, no windows
            assert mask.left < 0 and mask.right <= 0
            return (j <= i) if mask.right == 0 else torch.ones(q_len, k_len, dtype=torch.bool)
        longest = k_len if sequences is None else sequences.max_k
        left, right = (1 << 40 if bound < 0 or bound >= longest else bound for bound in mask)
        offset = j - i - (k_len - q_len)
        return (-left <= offset) & (offset <= right)


def _parts(q: Tensor, k: Tensor, sequences: Sequences | None) -> Iterator[tuple[slice, slice]]:
    if sequences is None:
        yield slice(0, q.shape[-3]), slice(0, k.shape[-3])
        return
    cu_q, cu_k = (edges.tolist() for edges in sequences.on(q.device))
    assert (cu_q[-1], cu_k[-1]) == (q.shape[-3], k.shape[-3])
    for number in range(len(cu_q) - 1):
        yield slice(cu_q[number], cu_q[number + 1]), slice(cu_k[number], cu_k[number + 1])


def _scores(q: Tensor, k: Tensor, shown: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """Scores (..., H, Sq, Sk), and what their gradient is times on its way to q . k."""
    product = torch.einsum("...ihd,...jhd->...hij", q.to(accumulation_dtype(q.dtype)), _wide(k, q)) * params.scale
    slope = torch.full_like(product, params.scale)
    if params.softcap:
        bent = torch.tanh(product / params.softcap)
        product, slope = params.softcap * bent, slope * (1 - bent**2)
    return product.masked_fill(~shown, -torch.inf), slope


def _wide(x: Tensor, q: Tensor) -> Tensor:
    """Keys for every query head, (..., S, Hq, D), in the accumulation dtype."""
    return x.to(accumulation_dtype(q.dtype)).repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2)


def _narrow(x: Tensor, k: Tensor) -> Tensor:
    """(..., S, Hq, D) summed over the query heads of a group."""
    return x.unflatten(-2, (k.shape[-2], -1)).sum(dim=-2).to(k.dtype)


def flash_attn_like() -> Fake:
    """As flash-attn 2: bottom-right bands, sequences of unequal lengths."""
    features = {"deterministic", "gqa", "packed", "softcap", "window"}
    return Fake("fake-flash-attn", Style.BOTTOM_RIGHT, True, frozenset(features))


def aten_like() -> Fake:
    """As the one in torch: it returns tensors of its own."""
    return Fake("fake-aten", Style.BOTTOM_RIGHT, True, frozenset({"gqa", "packed", "window"}), writes=False)


def fa4_like() -> Fake:
    """As flash-attn 4: lse has a gradient."""
    features = {"deterministic", "gqa", "lse_grad", "packed", "softcap", "window"}
    return Fake("fake-fa4", Style.BOTTOM_RIGHT, True, frozenset(features))


def cudnn_like() -> Fake:
    """As cuDNN: causal squares and rectangles, top-left, one block a call."""
    return Fake("fake-cudnn", Style.SQUARES, False, frozenset({"gqa", "packed"}), writes=False)


FAKES = {"flash-attn": flash_attn_like, "aten": aten_like, "fa4": fa4_like, "cudnn": cudnn_like}
PROVIDERS.update({fake.name: fake for fake in (make() for make in FAKES.values())})
"""So that "native[fake-cudnn]" is a backend, in every process that imports this."""


def run_ring_case(case: RingCase, backend: str, seed: int) -> dict[str, Tensor] | None:
    """A rank's part, where the fakes are known."""
    return conformance.run_ring_case(case, backend, seed)


def run_packed_case(case: PackedCase, backend: str, seed: int) -> dict[str, Tensor] | None:
    """The same for packed documents."""
    return conformance.run_packed_case(case, backend, seed)
