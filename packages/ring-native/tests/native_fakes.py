"""Kernels in plain PyTorch that stand for those that need a GPU: with the same masks and the same misreadings.

`Fake` stands for a provider; `FlashAttnKernel` for the compiled functions beneath the provider of flash-attn, which is
then the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ring_core.backend import Capabilities, HeadDims, Params, accumulation_dtype
from ring_core.testing import conformance
from ring_core.testing.conformance import PackedCase, RingCase
from ring_native.calls import Sequences
from ring_native.masks import Mask, Style
from ring_native.providers import PROVIDERS, Provider
from ring_native.providers.base import Gradients
from ring_native.providers.flash_attn import FlashAttention2

UNREAD = 1 << 40
"""A bound that is read as none."""


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

    @property
    def beside(self) -> bool:
        return self.writes

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
        for number, (rows, keys) in enumerate(_parts(q, k, sequences)):
            s, _ = _scores(q[..., rows, :, :], k[..., keys, :, :], self._shown(mask, rows, keys, sequences), params)
            s = s + self._bias(mask, rows, keys, sequences, params, number).to(s.dtype)
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
        dkv: tuple[Tensor, Tensor] | None,
        *,
        mask: Mask,
        sequences: Sequences | None,
        params: Params,
    ) -> Gradients:
        self._record("backward", q, k, mask, sequences)
        assert lse.is_contiguous()
        if dq is None or not self.writes:
            dq = torch.full(q.shape, torch.nan, dtype=q.dtype)
        if dkv is None or not self.writes:
            dkv = torch.full(k.shape, torch.nan, dtype=k.dtype), torch.full(k.shape, torch.nan, dtype=k.dtype)
        dk, dv = dkv
        sums = accumulation_dtype(q.dtype)
        for number, (rows, keys) in enumerate(_parts(q, k, sequences)):
            qs, ks, vs = q[..., rows, :, :], k[..., keys, :, :], v[..., keys, :, :]
            s, slope = _scores(qs, ks, self._shown(mask, rows, keys, sequences), params)
            s = s + self._bias(mask, rows, keys, sequences, params, number).to(s.dtype)
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
        left, right = self._read(mask, k_len, sequences)
        offset = j - i - (k_len - q_len)
        return (-left <= offset) & (offset <= right)

    def _read(self, mask: Mask, k_len: int, sequences: Sequences | None) -> Mask:
        """left and right as flash-attn takes them."""
        longest = k_len if sequences is None else sequences.max_k
        read = Mask(*(UNREAD if bound < 0 or bound >= longest else bound for bound in mask))
        if self.style is not Style.BOTTOM_RIGHT or read == (UNREAD, 0):
            return read
        return Mask(*(longest if bound == UNREAD != other else bound for bound, other in (read, read[::-1])))

    def _bias(
        self, mask: Mask, rows: slice, keys: slice, sequences: Sequences | None, params: Params, number: int
    ) -> Tensor:
        """What flash-attn 2.8 adds to the scores (..., H, Sq, Sk) of a sequence: under a causal mask slope * key, which
        lacks what is common to a row."""
        if params.alibi_slopes is None:
            return torch.zeros(())
        q_len, k_len = rows.stop - rows.start, keys.stop - keys.start
        slopes = params.alibi_slopes.double()
        if slopes.dim() == 2 and sequences is not None:
            slopes = slopes[number]
        i, j = torch.arange(q_len)[:, None], torch.arange(k_len)
        causal = self._read(mask, k_len, sequences) == (UNREAD, 0)
        distance = -j.expand(q_len, k_len) if causal else (i + k_len - q_len - j).abs()
        return -slopes[..., None, None] * distance


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


class FlashAttnKernel:
    """The functions of `flash_attn_2_cuda` 2.8.3 that the provider calls, with their arguments in their order."""

    def __init__(self) -> None:
        self.fake = flash_attn_like()
        self.causal: list[bool] = []
        """Of each call, whether its mask was read as causal."""

    def fwd(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, slopes: Tensor | None, *rest: Any) -> Any:
        dropout, scale, causal, left, right, softcap, return_p, generator = rest
        assert (dropout, return_p, generator) == (0.0, False, None)
        options = self._options(causal, left, right, k.shape[1], slopes, (q.shape[0], q.shape[2]), scale, softcap)
        return self.fake.forward(q, k, v, out, None, sequences=None, **options)

    def varlen_fwd(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, *rest: Any) -> Any:
        cu_q, cu_k, used, pad, pages, slopes, max_q, max_k, dropout, scale, zero, *rest = rest
        causal, left, right, softcap, return_p, generator = rest
        assert (used, pad, pages, dropout, zero, return_p, generator) == (None, None, None, 0.0, False, False, None)
        assert max_q > 1, "another path, whose lse has another layout"
        sequences = _sequences(cu_q, cu_k, max_q, max_k)
        options = self._options(causal, left, right, max_k, slopes, (len(cu_q) - 1, q.shape[1]), scale, softcap)
        return self.fake.forward(q, k, v, out, None, sequences=sequences, **options)

    def bwd(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> None:
        *gradients, slopes, dropout, scale, causal, left, right, softcap, _deterministic, generator, state = rest
        assert (dropout, generator, state) == (0.0, None, None)
        options = self._options(causal, left, right, k.shape[1], slopes, (q.shape[0], q.shape[2]), scale, softcap)
        found = self.fake.backward(q, k, v, out, dout, lse, None, None, None, sequences=None, **options)
        for gradient, value in zip(gradients, found, strict=True):
            gradient.copy_(value)

    def varlen_bwd(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> None:
        dq, dk, dv, cu_q, cu_k, slopes, max_q, max_k, dropout, scale, zero, *rest = rest
        causal, left, right, softcap, _deterministic, generator, state = rest
        assert (dropout, zero, generator, state) == (0.0, False, None, None)
        sequences = _sequences(cu_q, cu_k, max_q, max_k)
        options = self._options(causal, left, right, max_k, slopes, (len(cu_q) - 1, q.shape[1]), scale, softcap)
        found = self.fake.backward(q, k, v, out, dout, lse, None, None, None, sequences=sequences, **options)
        for gradient, value in zip((dq, dk, dv), found, strict=True):
            gradient.copy_(value)

    def _options(
        self,
        causal: bool,
        left: int,
        right: int,
        longest: int,
        slopes: Tensor | None,
        shape: tuple[int, int],
        scale: float,
        softcap: float,
    ) -> dict[str, Any]:
        """mask and params, as csrc/flash_attn/flash_api.cpp reads its arguments; shape: of slopes (B, H)."""
        left, right = (-1 if bound >= longest else bound for bound in (left, right))
        right = 0 if causal else right
        self.causal.append(left < 0 and right == 0)
        if slopes is not None:
            assert slopes.dtype == torch.float32 and slopes.stride(-1) == 1
            assert slopes.shape in (shape, shape[1:])
        return {"mask": Mask(left, right), "params": Params(scale, softcap, slopes)}


def _sequences(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Sequences:
    sequences = Sequences(tuple(cu_q.tolist()), tuple(cu_k.tolist()))
    assert max_q >= sequences.max_q and max_k == sequences.max_k
    return sequences


class FlashAttentionOnFake(FlashAttention2):
    """The provider itself, on functions in plain PyTorch."""

    name = "fake-flash-attn"

    def __init__(self) -> None:
        self._functions = FlashAttnKernel()

    def capabilities(self, device: torch.device) -> Capabilities:
        features = self._functions.fake.features | {"alibi"}
        return replace(self._functions.fake.capabilities(device), provider=self.name, features=features)

    def kernel(self) -> FlashAttnKernel:
        return self._functions


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


FAKES: dict[str, Callable[[], Provider]] = {
    "flash-attn": FlashAttentionOnFake,
    "aten": aten_like,
    "fa4": fa4_like,
    "cudnn": cudnn_like,
}
PROVIDERS.update({fake.name: fake for fake in (make() for make in FAKES.values())})
"""So that "native[fake-cudnn]" is a backend, in every process that imports this."""


def run_ring_case(case: RingCase, backend: str, seed: int) -> dict[str, Tensor] | None:
    """A rank's part, where the fakes are known."""
    return conformance.run_ring_case(case, backend, seed)


def run_packed_case(case: PackedCase, backend: str, seed: int) -> dict[str, Tensor] | None:
    """The same for packed documents."""
    return conformance.run_packed_case(case, backend, seed)
