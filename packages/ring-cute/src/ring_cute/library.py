"""Compiled kernels: from the cache on disk where they are there, else compiled now and, where there is a linker, kept.

A kernel's file is named after its kind, a fingerprint of the sources that it was compiled from, and the DSL's version.
It is a library of some 100 kB that tvm_ffi loads in milliseconds; the DSL is not imported for it and need not be there.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from ring_cute.settings import ForwardKind

_log = logging.getLogger(__name__)
ARCHITECTURE = "sm_90a"
SYMBOL = "ring_cute_forward"


def cache_folder() -> Path:
    """RING_CUTE_CACHE, or a folder under the user's cache folder."""
    if named := os.environ.get("RING_CUTE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ring_cute")


@cache
def fingerprint() -> str:
    """Of the sources that kernels are compiled from."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([here / "settings.py", *here.glob("hopper/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def dsl_version() -> str:
    """The DSL's version, "" where it is not installed."""
    try:
        return metadata.version("nvidia-cutlass-dsl")
    except metadata.PackageNotFoundError:
        return ""


def words(kind: ForwardKind) -> str:
    """A kind as part of a file's name."""
    on = [word for word in ("state", "sinks", "flags", "out_tma", "state_tma") if getattr(kind, word)]
    return "-".join(["forward", kind.dtype, f"d{kind.head_dim}", *kind.settings.words, *on])


def path_of(kind: ForwardKind) -> Path:
    """Where the kernel is kept that this DSL compiles."""
    return cache_folder() / f"{words(kind)}-{ARCHITECTURE}-{fingerprint()}-{dsl_version() or 'none'}.so"


def find(kind: ForwardKind) -> Path | None:
    """The kernel's file; without a DSL to compare with, that of any version."""
    if dsl_version():
        path = path_of(kind)
        return path if path.exists() else None
    return next(iter(sorted(cache_folder().glob(f"{words(kind)}-{ARCHITECTURE}-{fingerprint()}-*.so"))), None)


def missing() -> str:
    """What is missing to run or to compile kernels at all, and how to get it; "" where nothing is."""
    if util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed: pip install ring-cute brings it"
    if not dsl_version() and not any(cache_folder().glob("*.so")):
        return (
            "nvidia-cutlass-dsl is not installed (pip install 'nvidia-cutlass-dsl[cu13]>=4.7,<4.9'), and no compiled "
            "kernels are in the cache"
        )
    return ""


@cache
def load(kind: ForwardKind) -> Any:
    """The kernel as a function of numbers: those of `hopper.forward.HopperForward.__call__`, then a stream.

    Raises:
        ImportError: it is not in the cache, and there is no DSL to compile it.
    """
    path = find(kind)
    if path is None:
        if not dsl_version():
            raise ImportError(f"{words(kind)} is not in {cache_folder()} and nvidia-cutlass-dsl is not installed")
        compiled = build(kind)
        path = find(kind)
        if path is None:
            return compiled
    return _open(path)


def build(kind: ForwardKind) -> Any:
    """Compiles a kernel and, where there is a linker, keeps it; returns what the DSL made."""
    from ring_cute.hopper.compiling import compile_forward, link

    compiled = compile_forward(kind)
    try:
        link(compiled, SYMBOL, path_of(kind))
    except FileNotFoundError as error:
        _log.warning("compiled kernels are not kept, so each process compiles its own: %s", error)
    return compiled


def _open(path: Path) -> Any:
    import tvm_ffi

    if torch.version.cuda is not None:  # what the library calls, made visible to it; torch has loaded it already
        ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}", mode=ctypes.RTLD_GLOBAL)
    return getattr(tvm_ffi.load_module(str(path)), SYMBOL)
