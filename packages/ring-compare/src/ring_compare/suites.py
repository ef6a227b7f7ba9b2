"""What is compared: cells (one problem each) and the suites that list them. Data only, no torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Layout = Literal["contiguous", "zigzag", "stripe", "balanced"]
Schedule = Literal["ring", "gather", "auto", "own"]

T = TypeVar("T")

PHASES = ("fwd", "fwd+bwd")
"""What is timed of rings."""
KERNEL_PHASES = ("fwd", "bwd", "fwd+bwd")
"""All there are. `bwd` is the backward alone: its forward ran once, before the clock."""
MASKS = ("full", "causal", "window")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag", "stripe")
DOCUMENT_LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag", "balanced")
"""Of packed documents."""
SCHEDULES: tuple[Schedule, ...] = ("ring", "gather", "auto")
OWN: Schedule = "own"
"""What an implementation's route is called that has one schedule, its own: it is measured once per layout."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
NO_WINDOW = (-1, -1)


@dataclass(frozen=True)
class Cell:
    """One problem. Lengths are those of the whole sequence, over all ranks; names as in the record schema."""

    B: int
    Sq: int
    Sk: int
    Hq: int
    Hkv: int
    D: int
    dtype: str
    mask: str
    window_size: tuple[int, int]
    layout: Layout
    schedule: Schedule
    world_size: int
    documents: str = ""
    """A mix of document lengths (`ring_compare.documents`) that fill the sequence; "" for one sequence."""

    @property
    def causal(self) -> bool:
        """Whether `causal=True` is passed on; a window cell says everything in `window_size`."""
        return self.mask == "causal"

    @property
    def problem(self) -> str:
        """One line that names shape, mask and world size: what is comparable, however it is laid out and sent."""
        length = str(self.Sq) if self.Sq == self.Sk else f"{self.Sq}/{self.Sk}"
        mask = self.mask if self.mask != "window" else f"window {self.window_size[0]},{self.window_size[1]}"
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        heads = f"{self.Hq}/{self.Hkv}"
        documents = f" · {self.documents} documents" if self.documents else ""
        return f"B {self.B} · S {length}{documents} · H {heads} · D {self.D} · {self.dtype} · {mask} · {ranks}"

    @property
    def route(self) -> str:
        """How the problem is laid out and sent: the rest of the cell's name."""
        return f"{self.layout} · {self.schedule}"

    @property
    def title(self) -> str:
        """One line that names the cell in progress and charts."""
        return f"{self.problem} · {self.route}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**dataclasses.asdict(self), "window_size": list(self.window_size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Cell:
        """Inverse of `to_dict`; raises TypeError or KeyError when fields do not fit."""
        left, right = fields["window_size"]
        return cls(**{**fields, "window_size": (int(left), int(right))})


@dataclass(frozen=True)
class Shape:
    """Everything about the tensors except the sequence length and dtype."""

    B: int
    Hq: int
    Hkv: int
    D: int


@dataclass(frozen=True)
class Grid:
    """A product of axes. Suites are a few grids, since not every combination is worth its time."""

    shapes: tuple[Shape, ...]
    seqlens: tuple[int, ...]
    dtypes: tuple[str, ...]
    masks: tuple[str, ...]
    layouts: tuple[Layout, ...]
    schedules: tuple[Schedule, ...]
    world_sizes: tuple[int, ...]
    window_size: tuple[int, int] = (1023, 0)
    documents: tuple[str, ...] = ("",)
    tokens: int = 0
    """B·S at least: short sequences come in batches, beyond the shape's B."""
    keys_per_query: int = 1
    """Sk / Sq; `seqlens` are Sq."""


@dataclass(frozen=True)
class Limit:
    """The longest sequence an implementation is asked to do in a suite, and why."""

    tokens: int
    reason: str


@dataclass(frozen=True)
class Timing:
    """How long to measure. Counts follow from times, so that fast and slow implementations cost the same."""

    warmup_s: float
    measure_s: float
    min_samples: int = 5
    max_samples: int = 200


@dataclass(frozen=True)
class Suite:
    """A named set of cells with its measurement settings."""

    name: str
    description: str
    grids: tuple[Grid, ...]
    timing: Timing
    timeout_s: float
    limits: dict[str, Limit] = dataclasses.field(default_factory=dict)
    implementations: tuple[str, ...] = ()
    """What is compared unless the command line says so; empty: everything installed."""
    checked_heads: int = 0
    """How many key heads (with their query heads) each rank compares with float64; 0: all. They are spread evenly, the
    first and the last among them."""
    phases: tuple[str, ...] = PHASES
    """What is timed, of `KERNEL_PHASES`."""


@dataclass(frozen=True)
class Overrides:
    """Axes given on the command line; an empty one leaves the suite's own values."""

    layouts: tuple[Layout, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    masks: tuple[str, ...] = ()
    world_sizes: tuple[int, ...] = ()
    seqlens: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    """(query heads, key heads)."""
    head_dims: tuple[int, ...] = ()


_INTERPRETED = {"triton": Limit(32, "Triton's interpreter runs this on the CPU, seconds a call with more tokens")}
_SMALL = Shape(B=1, Hq=4, Hkv=2, D=32)
_TINY = Shape(B=1, Hq=2, Hkv=1, D=32)
_LLAMA = Shape(B=1, Hq=32, Hkv=8, D=128)
_MHA = Shape(B=1, Hq=32, Hkv=32, D=128)
_BF16 = ("bfloat16",)
_PROVIDERS = ("native", "native[cudnn]", "native[fa4]")
_OWN_KERNELS = ("triton", "cute")
_PEERS = ("ring-flash-attn", "torch-cp", "torch-cp[all-to-all]")
# Some 25 routes of a problem are measured together: about a second for each.
_SHORT = Timing(warmup_s=0.1, measure_s=0.3, min_samples=10, max_samples=100)
# Scores of one rank in fp32 at 8192 tokens and world size 1 are 8 GiB, and autograd keeps several of them.
_TOO_LARGE = {
    "reference": Limit(8192, "the plain PyTorch backend materialises scores: too slow and too large beyond this")
}

# One GPU, and a call takes it some milliseconds at most: the time goes into loading, compiling and float64.
_KERNEL_TIMING = Timing(warmup_s=0.05, measure_s=0.15, min_samples=5, max_samples=50)
_KERNELS = (
    "native",
    "native[cudnn]",
    "native[fa3]",
    "native[fa4]",
    "sdpa[cudnn]",
    "flex",
    "triton",
    "triton[portable]",
    "triton[hopper]",
    "cute",
)
STEP_COUNTS = (1, 4, 8, 16)
"""Into how many accumulating calls the peers `steps-N` cut the keys."""
_STEPPED = ("triton", "triton[portable]", "triton[hopper]", "cute", "native[fa4]")


def _one_gpu(
    heads: Sequence[tuple[int, int]],
    head_dims: Sequence[int],
    seqlens: Sequence[int] = (4096, 8192, 16384, 32768),
    masks: tuple[str, ...] = ("causal", "full"),
    tokens: int = 16384,
    keys_per_query: int = 1,
) -> Grid:
    shapes = tuple(Shape(1, *pair, head_dim) for head_dim in head_dims for pair in heads)
    return Grid(
        shapes,
        tuple(seqlens),
        _BF16,
        masks,
        LAYOUTS[:1],
        SCHEDULES[:1],
        (1,),
        tokens=tokens,
        keys_per_query=keys_per_query,
    )


def _of_kernels(name: str, description: str, grid: Grid, implementations: tuple[str, ...] = _KERNELS) -> Suite:
    return Suite(
        name=name,
        description=description,
        grids=(grid,),
        timing=_KERNEL_TIMING,
        timeout_s=300,
        limits=_TOO_LARGE,
        implementations=implementations,
        checked_heads=2,
        phases=KERNEL_PHASES,
    )


_SUITES = (
    Suite(
        name="smoke",
        description="seconds: does everything run and agree; its timings mean nothing",
        grids=(Grid((_SMALL,), (128,), ("float32",), ("causal",), ("contiguous", "zigzag"), ("ring", "gather"), (2,)),),
        timing=Timing(warmup_s=0.02, measure_s=0.05, min_samples=3, max_samples=10),
        timeout_s=60,
        limits=_INTERPRETED,
    ),
    Suite(
        name="cpu",
        description="minutes without a GPU: gloo processes, small shapes, all layouts and schedules",
        grids=(
            Grid(
                shapes=(Shape(B=1, Hq=6, Hkv=2, D=64),),
                seqlens=(512,),
                dtypes=("float32",),
                masks=MASKS,
                layouts=LAYOUTS,
                schedules=("ring", "gather"),
                world_sizes=(1, 2, 4),
                window_size=(80, 0),
            ),
            Grid((Shape(B=2, Hq=4, Hkv=4, D=40),), (256,), ("float32",), ("causal",), ("zigzag",), ("ring",), (1, 2)),
            # What Triton's interpreter, or anything as slow, is compared at.
            Grid((_TINY,), (32,), ("float32",), ("causal",), ("zigzag",), ("ring", "gather"), (2,)),
        ),
        # Some 40 cells with gloo's noise: more samples would cost minutes and tell no more.
        timing=Timing(warmup_s=0.05, measure_s=0.2, min_samples=5, max_samples=30),
        timeout_s=120,
        limits=_INTERPRETED,
    ),
    Suite(
        name="gpu",
        description="all visible GPUs over NCCL, real shapes; world sizes 1 and all",
        grids=(
            Grid(
                shapes=(_LLAMA,),
                seqlens=(8192, 32768),
                dtypes=("bfloat16",),
                masks=("causal", "full"),
                layouts=LAYOUTS,
                schedules=("ring", "gather"),
                world_sizes=(1, 0),  # 0: all visible GPUs
                window_size=(4095, 0),
            ),
        ),
        timing=Timing(warmup_s=0.5, measure_s=1.0, min_samples=10, max_samples=200),
        timeout_s=600,
        limits=_TOO_LARGE,
        checked_heads=2,
    ),
    Suite(
        name="rings",
        description="rings of 1, 2 and all GPUs against ring-flash-attn, torch context_parallel and the kernels alone",
        grids=(
            Grid((_LLAMA,), (8192, 32768), _BF16, ("causal",), ("zigzag",), ("ring", "gather", "auto"), (1, 2, 0)),
            Grid((_LLAMA,), (8192, 32768), _BF16, ("causal",), ("contiguous", "stripe"), ("ring", "gather"), (0,)),
            # torch's context_parallel takes no grouped heads.
            Grid((_MHA,), (8192, 32768), _BF16, ("causal",), ("zigzag",), ("gather",), (0,)),
        ),
        timing=_SHORT,
        timeout_s=300,
        limits=_TOO_LARGE,
        implementations=(
            *_PROVIDERS,
            *_OWN_KERNELS,
            *(f"local[{name}]" for name in (*_PROVIDERS, *_OWN_KERNELS)),
            *_PEERS,
        ),
        checked_heads=2,
    ),
    Suite(
        name="packed",
        description="packed documents on all GPUs against one varlen call per rank and ring-flash-attn's varlen rings",
        grids=(
            Grid(
                shapes=(_LLAMA,),
                seqlens=(32768,),
                dtypes=_BF16,
                masks=("causal",),
                layouts=DOCUMENT_LAYOUTS,
                schedules=("ring", "gather"),
                world_sizes=(0,),
                documents=("realistic", "equal64"),
            ),
        ),
        timing=_SHORT,
        timeout_s=300,
        limits=_TOO_LARGE,
        implementations=(*_PROVIDERS, *_OWN_KERNELS, "local-varlen", "ring-flash-attn", "ring-flash-attn[llama3]"),
        checked_heads=2,
    ),
    _of_kernels(
        "kernels",
        "kernels on one GPU, head dim 128: forward, backward alone and both, against cuDNN, FA2-4 and FlexAttention",
        _one_gpu(((16, 16), (32, 8), (64, 8)), (128,)),
    ),
    _of_kernels("kernels-64", "the same, head dim 64", _one_gpu(((32, 32),), (64,))),
    _of_kernels(
        "kernels-wide",
        "the same, head dims 96, 192 and 256, fewer lengths",
        _one_gpu(((16, 16),), (96, 192, 256), (4096, 16384)),
    ),
    _of_kernels(
        "steps",
        "one GPU: 32768 keys in one call of a backend against 4, 8 and 16 accumulating ones; host time per call",
        _one_gpu(((16, 16),), (128,), (8192,), ("full",), tokens=0, keys_per_query=4),
        tuple(f"steps-{count}[{name}]" for name in _STEPPED for count in STEP_COUNTS),
    ),
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in _SUITES}


def default_suite(device: str) -> str:
    """The suite that `ring-compare run` takes when none is named."""
    return "gpu" if device == "cuda" else "cpu"


def _one_rank(values: Sequence[T], world_size: int) -> Sequence[T]:
    """On one rank every layout is the identity and every schedule sends nothing: measure one of them."""
    return values[:1] if world_size == 1 else values


def _shapes(grid: Grid, overrides: Overrides) -> tuple[Shape, ...]:
    """The grid's, with the heads and head dims of the command line where it gives any."""
    shapes = [
        dataclasses.replace(shape, Hq=heads[0], Hkv=heads[1], D=head_dim)
        for shape in grid.shapes
        for heads in overrides.heads or ((shape.Hq, shape.Hkv),)
        for head_dim in overrides.head_dims or (shape.D,)
    ]
    return tuple(dict.fromkeys(shapes))


def _grid_cells(grid: Grid, overrides: Overrides, all_ranks: int) -> list[Cell]:
    world_sizes = overrides.world_sizes or tuple(size or all_ranks for size in grid.world_sizes)
    cells: list[Cell] = []
    # World size outermost: one set of worker processes serves all cells of a size.
    for world_size, shape, documents, seqlen, dtype, mask in itertools.product(
        dict.fromkeys(world_sizes),
        _shapes(grid, overrides),
        grid.documents,
        overrides.seqlens or grid.seqlens,
        overrides.dtypes or grid.dtypes,
        overrides.masks or grid.masks,
    ):
        batches = overrides.batches or (max(shape.B, grid.tokens // seqlen),)
        for batch, layout, schedule in itertools.product(
            batches,
            _one_rank(_known(overrides.layouts or grid.layouts, documents), world_size),
            _one_rank(overrides.schedules or grid.schedules, world_size),
        ):
            window = grid.window_size if mask == "window" else NO_WINDOW
            size = (batch, seqlen, seqlen * grid.keys_per_query, shape.Hq, shape.Hkv, shape.D)
            cells.append(Cell(*size, dtype, mask, window, layout, schedule, world_size, documents))
    return cells


def _known(layouts: Sequence[Layout], documents: str) -> tuple[Layout, ...]:
    known = DOCUMENT_LAYOUTS if documents else LAYOUTS
    return tuple(layout for layout in layouts if layout in known)


def suite_cells(suite: Suite, overrides: Overrides, *, all_ranks: int) -> list[Cell]:
    """The cells of a suite, without repetitions, ordered by world size.

    An axis in `overrides` replaces the suite's values on that axis; `all_ranks` stands for world size 0 in suite data.
    """
    cells = [cell for grid in suite.grids for cell in _grid_cells(grid, overrides, all_ranks)]
    return [cell for problem in by_problem(sorted(dict.fromkeys(cells), key=_size)) for cell in problem]


def _size(cell: Cell) -> int:
    return cell.world_size  # sorted() is stable


def by_problem(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each problem together, which are measured together: its routes."""
    problems: dict[str, list[Cell]] = {}
    for cell in cells:
        problems.setdefault(cell.problem, []).append(cell)
    return list(problems.values())


def check_cell(cell: Cell) -> str | None:
    """Why this cell cannot be cut into equal shards, or None."""
    if cell.layout not in (DOCUMENT_LAYOUTS if cell.documents else LAYOUTS):
        return f"no layout {cell.layout} of {'packed documents' if cell.documents else 'one sequence'}"
    if cell.documents and cell.B != 1:
        return f"packed documents stand in a batch of 1, not {cell.B}"
    pieces = cell.world_size * (2 if cell.layout == "zigzag" else 1)
    for name, length in (("Sq", cell.Sq), ("Sk", cell.Sk)):
        if length % pieces:
            return (
                f"{name} = {length} does not divide into {pieces} equal pieces ({cell.layout}, {cell.world_size} ranks)"
            )
    return None
