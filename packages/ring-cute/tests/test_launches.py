"""What a kernel is handed by a launch that is remembered: the same in C as in Python."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_cute.launches import AGAIN_SYMBOL, KINDS, LATEST, Kernel, Launches, LaunchesByKind, again_source

NOTES = """
/* In the place of a kernel: keeps its numbers, as they are. */
static long long words[64];
long long *noted(void) { return words; }
int __tvm_ffi_noting(void *self, const TVMFFIAny *numbers, int32_t count, TVMFFIAny *result) {
    for (int n = 0; n < count; n++) words[n] = numbers[n].v_int64;
    if (words[0] != 13) return 0;
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "unlucky number");
    return -1;
}
"""
NUMBERS = (None, None, 7, -(1 << 40), None, 0.0, -2.5, None, 1 << 31)


class Noting:
    """A kernel that keeps the numbers of its latest launch."""

    def __init__(self) -> None:
        self.numbers: list[Any] = []

    def __call__(self, *numbers: Any) -> None:
        self.numbers = [float(n).hex() if isinstance(n, float) else n for n in numbers]


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kernel, Callable[[], list[Any]]]:
    """The function in C, and what asks for the latest numbers."""
    if shutil.which("cc") is None or importlib.util.find_spec("tvm_ffi") is None:
        pytest.skip("it is compiled by cc, and called through tvm_ffi")
    import ctypes

    import tvm_ffi
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    folder = tmp_path_factory.mktemp("again")
    source, target = Path(folder, "again.c"), Path(folder, "again.so")
    source.write_text(again_source("noting") + NOTES)
    headers = [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-ffreestanding", "-Wall", "-Werror", *headers, "-o", target, source],
        check=True,
    )
    module, words = tvm_ffi.load_module(str(target)), ctypes.CDLL(str(target)).noted
    words.restype = ctypes.POINTER(ctypes.c_double)

    def noted() -> list[Any]:
        found = words()
        whole = ctypes.cast(found, ctypes.POINTER(ctypes.c_longlong))
        return [found[n].hex() if isinstance(x, float) else whole[n] for n, x in enumerate(NUMBERS)]

    return Kernel(module.noting, getattr(module, AGAIN_SYMBOL)), noted


@pytest.fixture(params=["linked", "plain"])
def kernel(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Callable[[], list[Any]]]:
    if request.param == "linked":
        found: tuple[Kernel, Callable[[], list[Any]]] = request.getfixturevalue("linked")
        return found
    noting = Noting()
    return noting, lambda: noting.numbers


def handed(given: tuple[Any, ...]) -> list[Any]:
    """What the kernel is to get."""
    addresses = iter(x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in given)
    numbers = [next(addresses) if number is None else number for number in NUMBERS]
    return [number.hex() if isinstance(number, float) else number for number in numbers]


def others(x: Tensor) -> Iterator[Tensor]:
    """(2, 4, 8) fp32, dense, laid out otherwise, in one thing each."""
    yield x.new_empty(3, 4, 8)
    yield x.new_empty(2, 4, 9)[..., :8]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x.to(torch.bfloat16)
    yield x.view(torch.int32)
    yield x.new_empty(65)[1:].view(2, 4, 8)  # 4 bytes behind a multiple of 16
    yield x[None]
    yield x.flatten(0, 1)


def test_addresses_change(kernel: tuple[Callable[..., Any], Callable[[], list[Any]]]) -> None:
    function, noted = kernel
    launches = Launches()
    x, weights = torch.zeros(2, 4, 8), torch.zeros(16, requires_grad=True)
    given: tuple[Any, ...] = (x, None, weights, 1 << 50)
    assert not launches(*given), "nobody knows what to launch"
    launches.add(function, NUMBERS, given)
    assert noted() == handed(given)
    again = (torch.zeros(4, 4, 8)[2:], None, torch.zeros(16), 5)
    assert launches(*again) and noted() == handed(again)


def test_layouts_differ(kernel: tuple[Callable[..., Any], Callable[[], list[Any]]]) -> None:
    function, noted = kernel
    launches = Launches()
    x = torch.zeros(2, 4, 8)
    launches.add(function, NUMBERS, (x, x, 1, 2))
    before = noted()
    for other in others(x):
        assert not launches(other, x, 1, 2), (other.shape, other.stride(), other.dtype)
        assert not launches(x, other, 1, 2), (other.shape, other.stride(), other.dtype)
    assert not launches(x, None, 1, 2) and not launches(None, x, 1, 2)
    assert noted() == before, "nothing was launched"


def test_several_layouts_and_the_oldest_is_forgotten(
    kernel: tuple[Callable[..., Any], Callable[[], list[Any]]],
) -> None:
    function, noted = kernel
    launches = Launches()
    tensors = [torch.zeros(n + 1, 16) for n in range(LATEST + 1)]
    for x in tensors[:LATEST]:
        launches.add(function, NUMBERS, (x, x, 1, 2))
    assert launches(tensors[0], tensors[0], 3, 4) and noted() == handed((tensors[0], tensors[0], 3, 4))
    launches.add(function, NUMBERS, (tensors[-1], tensors[-1], 1, 2))
    assert [launches(x, x, 1, 2) for x in tensors] == [True, False, *[True] * (LATEST - 1)]


def test_a_launch_that_fails(linked: tuple[Kernel, Callable[[], list[Any]]]) -> None:
    """What the kernel's own host code says goes to the caller."""
    launches = Launches()
    launches.add(linked[0], NUMBERS, (1, 2, 3, 4))
    with pytest.raises(RuntimeError, match="unlucky number"):
        launches(13, 2, 3, 4)


def test_what_is_remembered_is_on_the_host(linked: tuple[Kernel, Callable[[], list[Any]]]) -> None:
    """C reads it there, whatever the default device is."""
    kernel, noted = linked
    launches, given = Launches(), (torch.zeros(3), 5, None, 6)
    with torch.device("meta"):
        launches.add(kernel, NUMBERS, given)
    assert noted()[:2] == [given[0].data_ptr(), 5]


def test_ever_new_kinds_are_forgotten() -> None:
    """Of a scale that changes in every step, say."""
    known = LaunchesByKind()
    for scale in range(3 * KINDS):
        assert known[scale] is known[scale] and len(known) <= KINDS
