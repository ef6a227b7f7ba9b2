"""The contract with a kernel backend, what a backend says of itself, and how backends are found.

A backend computes blocks of attention; it knows no ranks, layouts or masks, only tables of segments (`ring_core.plan`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ring_core.segment import COLUMNS, Table

ENTRY_POINTS = "ring_core.backends"
_log = logging.getLogger(__name__)

ASKED_BY = {
    "alibi": "alibi_slopes was given",
    "deterministic": "deterministic=True was given",
    "dropout": "dropout_p > 0 was given",
    "gqa": "k and v have fewer heads than q",
    "lse_grad": "the loss depends on lse",
    "packed": "the call is about packed documents",
    "ring_alibi": "alibi_slopes on several ranks: the distances in a block are then those of its place in the sequence",
    "sinks": "sinks was given",
    "softcap": "softcap > 0 was given",
    "window": "window_size bounds more than causal does",
}
"""What makes a call ask for a feature, in words for its refusal."""

FEATURES = tuple(ASKED_BY)
"""What a call may ask of a backend; "ring_alibi" is asked beside "alibi" where there are several ranks, whose blocks
begin at any position. Bands at any offset are not among them: every layout needs those."""


class UnsupportedError(ValueError):
    """The backend cannot do what was asked; the message says which others can."""


@dataclass(frozen=True, slots=True)
class HeadDims:
    """Head dims a backend takes: multiples of `multiple` in [smallest, largest]."""

    smallest: int = 1
    largest: int = 256
    multiple: int = 1

    def __contains__(self, head_dim: int) -> bool:
        return self.smallest <= head_dim <= self.largest and head_dim % self.multiple == 0

    def __str__(self) -> str:
        if self.largest < self.smallest:
            return "none"
        return f"{self.smallest}-{self.largest}" + (f" (multiples of {self.multiple})" if self.multiple > 1 else "")


NO_HEAD_DIMS = HeadDims(1, 0)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do on one device: the one table behind error messages, tests, `ring-compare list` and docs."""

    available: bool
    reason: str = ""
    """Why not available here, and how to get it."""
    provider: str = ""
    """The library whose kernels run, where they are not the backend's own."""
    dtypes: frozenset[torch.dtype] = frozenset()
    head_dims: HeadDims = HeadDims()
    gradient_head_dims: HeadDims | None = None
    """Those of calls that need gradients, where its backward takes fewer; `NO_HEAD_DIMS` where it has none."""
    features: frozenset[str] = frozenset()
    accumulate: bool = True
    """Continues from (state, lse) and walks several segments a strip. Where False, ring-core merges."""
    writes_gradients: bool = False
    """Its `backward` writes dk and dv, of every key of the pieces, where others add to what they find there: ring-core
    then gives it buffers as they come instead of zeros."""
    final_gradients: bool = False
    """Its `backward` also takes dk and dv in k's dtype where sums have a wider one, without flags and departures, in
    the only call about these keys: it then writes every element of the pieces, summed as ever and rounded once, 0 for
    keys that the table does not name. ring-core gives it such buffers, as they come, where nothing travels."""
    rounds_gradients: bool = False
    """Its kernels give dk and dv in k's dtype, whatever the buffers have: nothing is lost where they lie in that dtype
    until the parts of others are added to them. ring-core then has those of own keys written to where they stay."""
    flags: bool = False
    """Waits in the kernel for pieces that are still arriving and counts departures, at least in some calls: see
    `StagedBackend`."""

    def takes(self, head_dim: int, *, gradients: bool) -> bool:
        """Whether there are kernels for that head dim, with gradients those for them, too."""
        return head_dim in self.head_dims and not (gradients and head_dim not in self._for_gradients)

    @property
    def _for_gradients(self) -> HeadDims:
        return self.head_dims if self.gradient_head_dims is None else self.gradient_head_dims

    def refusal(self, head_dim: int, *, gradients: bool) -> str:
        """Why it does not take that head dim; "" where it does."""
        if self.takes(head_dim, gradients=gradients):
            return ""
        if head_dim not in self.head_dims:
            return f"the head dim is {head_dim}, it takes {self.head_dims}"
        if self._for_gradients == NO_HEAD_DIMS:
            return "it computes no gradients, and an input requires them"
        return (
            f"the head dim is {head_dim} and an input requires gradients, which it computes for {self._for_gradients}"
        )


@dataclass(frozen=True, slots=True)
class Dropout:
    """Philox dropout; see `ring_core.philox` for which element is kept."""

    probability: float
    seed: Tensor  # (1,) int64, on the device of the call
    first_head: int = 0  # the number, in the whole call, of the first head given


@dataclass(frozen=True, slots=True)
class Params:
    """How a score becomes a probability: s = scale q·k; s = softcap tanh(s / softcap); s -= slope |distance|; softmax
    with the sink as one more logit; dropout."""

    scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # (Hq,) or (B, Hq) fp32
    sinks: Tensor | None = None  # (Hq,)
    dropout: Dropout | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class HeadPart:
    """Some of a call's heads: each query head with its key head, so that they are computed by themselves."""

    kv: slice
    q: slice
    whole: bool  # all heads

    def rows(self, x: Tensor) -> Tensor:
        """(B, Sq, Hq, D) of these heads."""
        return x if self.whole else x[:, :, self.q]

    def lse(self, x: Tensor) -> Tensor:
        """(B, Hq, Sq) of these heads."""
        return x if self.whole else x[:, self.q]

    def params(self, params: Params) -> Params:
        """What these heads need to know."""
        if self.whole or (params.alibi_slopes is None and params.sinks is None and params.dropout is None):
            return params
        return replace(
            params,
            alibi_slopes=None if params.alibi_slopes is None else params.alibi_slopes[..., self.q],
            sinks=None if params.sinks is None else params.sinks[self.q],
            dropout=None if params.dropout is None else replace(params.dropout, first_head=self.q.start),
        )


def of_heads(kv: slice, num_kv_heads: int, num_heads: int) -> HeadPart:
    """The part of a call that the key heads `kv` make up."""
    return _heads_between(kv.start, kv.stop, num_kv_heads, num_heads)


@cache
def _heads_between(start: int, stop: int, num_kv_heads: int, num_heads: int) -> HeadPart:
    group = num_heads // num_kv_heads
    whole = start == 0 and stop == num_kv_heads
    return HeadPart(slice(start, stop), slice(start * group, stop * group), whole)


@dataclass(frozen=True, slots=True)
class Flags:
    """Arrival of pieces: piece c may be read once values[c] >= epoch[0]; POISON means give up. Whoever hands them over
    has enqueued all that raises them, so that waiting needs nothing but this device's copy engines."""

    values: Tensor  # (C,) int32, read as uint32
    epoch: Tensor  # (1,) int32


POISON = 0xFFFFFFFF


@dataclass(eq=False, slots=True)  # not frozen: one is made in every pass
class DeviceTable:
    """A segment table for one device; `host` is the same table as the planner made it."""

    host: Table
    device: torch.device

    @property
    def rows(self) -> Tensor:
        """int32 (N, 12), columns as in `ring_core.plan.Segment`."""
        return self._kept("rows", self.host.rows)

    @property
    def groups(self) -> Tensor:
        """int32 (G + 1,): rows of group g are rows[groups[g]:groups[g + 1]]."""
        return self._kept("groups", self.host.groups)

    def _kept(self, name: str, numbers: np.ndarray[Any, Any]) -> Tensor:
        """With the table, which knows nothing that knows it: it goes with the last who needs it."""
        found: Tensor | None = self.host.cache.get((name, self.device))
        if found is None:
            found = self.host.cache[name, self.device] = torch.from_numpy(numbers.copy()).to(self.device)
        return found


def on_device(table: Table, device: torch.device) -> DeviceTable:
    """The table's copy on `device`, kept with the table (which is kept with the plan)."""
    return DeviceTable(table, device)


@runtime_checkable
class Backend(Protocol):
    """One way to compute blocks of attention.

    Shapes: q, out, dout (B, Sq, Hq, D); k, v (C, B, S, Hkv, D): C pieces of keys in global order, laid out so that
    k.transpose(0, 1).flatten(1, 2) is a view (B, C * S, Hkv, D); lse (B, Hq, Sq), natural log. Any strides with the
    last dimension dense: a call may be about some heads of larger tensors. Sums are kept in fp32 (fp64 for fp64
    inputs): lse, state, dk and dv have that dtype (but see `Capabilities.final_gradients`). Query head h reads key head
    h // (Hq / Hkv).
    """

    name: str

    def capabilities(self, device: torch.device) -> Capabilities:
        """What it can do on `device`. Cheap, never raises: what is missing is said in `reason`."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Tensor | None,
        table: DeviceTable,
        *,
        params: Params,
        flags: Flags | None = None,
    ) -> None:
        """Walks a query-major table. Rows of a segment flagged FIRST start empty (with sinks: m = sink, l = 1, O = 0),
        others continue from m = lse, l = 1, O = state (lse = -inf: empty, state is not read). Rows flagged LAST write
        `out` (q's dtype) and lse, others `state` (B, Sq, Hq, D) and lse. `state` is None where every strip begins and
        ends in this table. Rows that see nothing: out 0, lse -inf (with a sink: the sink). A segment may have k_len =
        0."""
        ...

    def prepare(
        self,
        q: Tensor,
        k_shape: torch.Size,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        *,
        params: Params,
    ) -> Any:
        """Once per backward: delta = rowsum(dout · out) - dlse and a zeroed accumulator for dq. Returns the backend's
        own state."""
        ...

    def backward(
        self,
        state: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        dk: Tensor,
        dv: Tensor,
        table: DeviceTable,
        *,
        params: Params,
        flags: Flags | None = None,
        departures: Tensor | None = None,
    ) -> None:
        """Once per step, on a key-major table: adds into dq (in `state`) and into dk, dv (shaped as k, summed over the
        query heads of a group, zeroed or partly summed on entry), or writes these, if it `writes_gradients`, or if it
        gives `final_gradients` and they have k's dtype, not that of sums. A key of a batch entry is in one strip at
        most. departures: see `departures_of`."""
        ...

    def finish(self, state: Any, *, params: Params) -> tuple[Tensor, Tensor | None]:
        """Once per backward: (dq in q's dtype, dsinks (Hq,) or None). dsinks is this rank's part."""
        ...


@runtime_checkable
class StagedBackend(Backend, Protocol):
    """A backend whose kernels watch pieces come and go: what `Capabilities.flags` promises."""

    def stages(self, q: Tensor, dout: Tensor | None, *, params: Params) -> bool:
        """Whether a call on q, a backward where dout is given, takes flags (and departures). Cheap. The keys will be
        those of a transport: in q's dtype, whole tokens of k and v side by side."""
        ...


def takes_flags(backend: Backend, q: Tensor, dout: Tensor | None, params: Params) -> bool:
    """Whether the backend may be given arrival flags, and in a backward departure counters, on this call."""
    if not backend.capabilities(q.device).flags:
        return False
    assert isinstance(backend, StagedBackend), f"backend {backend.name!r} has flags=True, but cannot say when"
    return backend.stages(q, dout, params=params)


def departures_of(table: Table, pieces: int, batch: int, num_kv_heads: int) -> tuple[int, ...]:
    """What the departure counter of each piece, int32 read as uint32 and zeroed by ring-core, comes to: for every strip
    of a key-major table, kv head and batch entry, its number of keys. Kernels add, once a tile's dk and dv are in
    memory, the tile's number of keys, by a release at system scope: so the sum does not depend on the size of tiles."""
    key = ("departures", pieces, batch)
    counts: tuple[int, ...] | None = table.cache.get(key)
    if counts is None:
        counted = [0] * pieces
        for strip in table.grouped:
            entries = {segment.batch for segment in strip}
            counted[strip[0].piece] += strip[0].k_len * (batch if -1 in entries else len(entries))
        counts = table.cache[key] = tuple(counted)
    return tuple(count * num_kv_heads for count in counts)


def names_every_key(table: Table, pieces: int, tokens: int, batch: int) -> bool:
    """Whether each of `tokens` keys of each piece and batch entry is in some strip of a key-major table."""
    key = ("names every key", pieces, tokens, batch)
    known: bool | None = table.cache.get(key)
    if known is None:
        if (table.rows[:, COLUMNS.index("batch")] < 0).all():
            strips = table.rows[table.groups[:-1], COLUMNS.index("k_len")]
            named = int(strips.sum(dtype=np.int64)) * batch
        else:
            named = sum(departures_of(table, pieces, batch, 1))
        known = table.cache[key] = named == pieces * tokens * batch
    return known


def has_wider_sums(dtype: torch.dtype) -> bool:
    """Whether dk and dv of such inputs are final in this dtype and sums in a wider one: 16-bit ones."""
    return accumulation_dtype(dtype) != dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _registered() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


class _Cached(Protocol):
    def cache_clear(self) -> None: ...


C = TypeVar("C", bound=_Cached)
_of_backends: list[_Cached] = []


def of_backends(cached: C) -> C:
    """A decorator for what is remembered only as long as a name means the same backend."""
    _of_backends.append(cached)
    return cached


def backend_names() -> tuple[str, ...]:
    """Names of the installed backends, none imported."""
    return tuple(sorted({"reference", *_registered()}))


@of_backends
@cache
def load_backend(name: str) -> Backend:
    """The backend of that name, imported now. "native[cudnn]" is the backend "native" made with the option "cudnn".

    Raises:
        ValueError: no installed package registers it, or it does not know the option or has none.
        ImportError: from its package, where something that needs is missing.
    """
    base, _, option = name.removesuffix("]").partition("[")
    if base not in backend_names() or name != (f"{base}[{option}]" if option else base):
        raise ValueError(
            f"there is no backend {name!r} here; installed: {', '.join(backend_names())}. Backends come with "
            f"packages of their own: pip install ring-native, ring-triton or ring-cute. Kernels of others are "
            f'options of the first: "native[flash-attn]"'
        )
    make: Callable[..., Backend] = _registered()[base].load() if base in _registered() else _reference()
    if option and getattr(make, "__init__", None) is object.__init__:  # a class that cannot be given anything
        raise ValueError(f"backend {base!r} has no options, got {option!r}")
    return make(option) if option else make()


def _reference() -> type[Backend]:
    """For a source tree that was never installed, which has no entry points."""
    from ring_core.reference import ReferenceBackend

    return ReferenceBackend


def register_backend(name: str, backend: Backend) -> None:
    """Makes a backend known in this process without an entry point (tests, experiments)."""

    class Point:
        @staticmethod
        def load() -> Any:
            return lambda: backend

    _registered()[name] = Point()
    forget_backends()


def forget_backends() -> None:
    """Nothing is remembered any more of what a name meant."""
    for remembered in _of_backends:
        remembered.cache_clear()


AUTOMATIC = ("cute", "triton", "native", "reference")
"""What `backend=None` tries on CUDA, fastest first; other devices take the reference backend."""


@of_backends
@cache
def check_supported(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: frozenset[str],
    gradients: bool = False,
) -> None:
    """Raises UnsupportedError, naming the argument and the alternatives, unless the backend can do all of it."""
    asked = device, dtype, head_dim, features, gradients
    problems = _shortcomings(load_backend(name).capabilities(device), *asked)
    if not problems:
        return
    able = [
        other
        for other in backend_names()
        if other != name and not _shortcomings(_capabilities_or_none(other, device), *asked)
    ]
    alternatives = f"backends here that can: {', '.join(able)}" if able else "no backend installed here can"
    raise UnsupportedError(f"backend {name!r} cannot do this call: {'; '.join(problems)}; {alternatives}")


@of_backends
@cache
def choose_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, features: frozenset[str], gradients: bool = False
) -> str:
    """What `backend=None` means for a call: by capability, fastest first. Logged once per kind of call."""
    candidates = AUTOMATIC if device.type == "cuda" else ("reference",)
    for name in candidates:
        if name in backend_names() and not _shortcomings(
            _capabilities_or_none(name, device), device, dtype, head_dim, features, gradients
        ):
            _log.info("backend=None on %s, %s, head dim %d: %s", device.type, dtype, head_dim, name)
            return name
    return "reference"  # whose error says what no backend can do


def _capabilities_or_none(name: str, device: torch.device) -> Capabilities:
    try:
        return load_backend(name).capabilities(device)
    except ImportError as error:
        return Capabilities(available=False, reason=str(error))


def _shortcomings(
    can: Capabilities,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: frozenset[str],
    gradients: bool,
) -> list[str]:
    if not can.available:
        return [can.reason or f"it does not run on {device.type}"]
    problems = []
    if dtype not in can.dtypes:
        problems.append(f"q, k, v are {dtype}, it takes {', '.join(sorted(map(str, can.dtypes)))}")
    if refusal := can.refusal(head_dim, gradients=gradients):
        problems.append(refusal)
    lacking = sorted(features - can.features)
    problems += [f"{feature} is not among its features ({ASKED_BY[feature]})" for feature in lacking]
    return problems
