"""Compiled kernels: from the cache on disk where they are there, else compiled now and, where there is a linker, kept.

    load(kind) ── in the cache, intact? ── yes ─────────────────────────► tvm_ffi opens it (milliseconds, no DSL)
                        │ no                                                 ▲
                        ▼                                                    │ kept
                  DSL here? ── no ──► ImportError           compile (seconds) ── link ── not kept ──► the DSL's own
                        └───── yes ────────────────────────────┘                 a warning says why     function

A kernel's file is named after its kind, the architecture, a fingerprint of the sources that it was compiled from, and
the DSL's version, so nothing in the cache is ever out of date, only unused. It ends in a digest of its content, since
the dynamic linker would crash on half a file, and appears under its name by a rename, whole, whoever else writes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from ring_cute.launches import AGAIN_SYMBOL, Kernel

_log = logging.getLogger(__name__)
Kind = Any
"""Of a kernel: a frozen dataclass that says all that is compiled into it (`settings.ForwardKind` is one). Its class
decides how it is compiled (`hopper.compiling.COMPILERS`)."""
DSL = "nvidia-cutlass-dsl"
GET_DSL = "pip install 'nvidia-cutlass-dsl[cu13]>=4.7,<4.9' (without [cu13] where torch is built for CUDA 12)"
GET_TVM_FFI = "pip install 'apache-tvm-ffi>=0.1.11,<0.2'"
ARCHITECTURE = "sm_90a"
SYMBOL = "ring_cute_kernel"
SEAL = b"ring_cute: SHA-256 of what comes before\n"
"""Ends a kernel's file, followed by the digest; to the dynamic linker bytes after the end are nothing."""


class DamagedError(RuntimeError):
    """A file of the cache is not what was written there."""


UNUSABLE = (OSError, RuntimeError)
"""What a file of the cache may fail with: it is damaged, may not be read, or cannot be loaded here (from a folder
without execution, say)."""


def cache_folder() -> Path:
    """RING_CUTE_CACHE, or a folder under the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if named := os.environ.get("RING_CUTE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ring_cute")


@cache
def fingerprint() -> str:
    """Of the sources that kernels are compiled from, and of their host side, which hands them their numbers."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([here / "settings.py", here / "launches.py", *here.glob("hopper/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def dsl_version() -> str:
    """The DSL's version and which of its compilers it takes, "" where it is not installed."""
    try:
        version = metadata.version(DSL)
    except metadata.PackageNotFoundError:
        return ""
    try:
        metadata.version(f"{DSL}-libs-cu13")
    except metadata.PackageNotFoundError:
        return version
    return f"{version}+cu13"


def words(kind: Kind) -> str:
    """A kind as part of a file's name: what it says of itself in words and numbers, then a digest of everything,
    settings too."""
    parts = [type(kind).__name__.removesuffix("Kind").lower()]
    for field in fields(kind):
        value = getattr(kind, field.name)
        if value is True:
            parts.append(field.name)
        elif isinstance(value, str):
            parts.append(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            parts.append(f"{field.name}{value}")
    return "-".join([*parts, hashlib.sha256(repr(_content(kind)).encode()).hexdigest()[:12]])


def _content(x: Any) -> Any:
    """A dataclass as the values that set it apart from others."""
    if is_dataclass(x):
        return type(x).__name__, *(
            (field.name, _content(getattr(x, field.name))) for field in fields(x) if field.compare
        )
    return x


def path_of(kind: Kind) -> Path:
    """Where the kernel is kept that this DSL compiles."""
    return cache_folder() / f"{_stem(kind)}-{dsl_version() or 'none'}.so"


def _stem(kind: Kind) -> str:
    return f"{words(kind)}-{ARCHITECTURE}-{platform.machine()}-{fingerprint()}"


def find(kind: Kind) -> Path | None:
    """The kernel's file; without a DSL to compare with, that of any version."""
    return next(_files(kind), None)


def _files(kind: Kind) -> Iterator[Path]:
    if dsl_version():
        path = path_of(kind)
        if os.path.exists(path):  # False, too, in a folder that this user may not look into
            yield path
    else:
        yield from sorted(cache_folder().glob(f"{_stem(kind)}-*.so"), reverse=True)


def missing() -> str:
    """What is missing to run or to compile kernels at all, and how to get it; "" where nothing is."""
    if not _tvm_ffi():
        return f"apache-tvm-ffi is not installed: {GET_TVM_FFI}"
    if not dsl_version() and not any(cache_folder().glob(f"*-{fingerprint()}-*.so")):
        return (
            f"{DSL} is not installed: {GET_DSL}; nor are there kernels of this ring-cute in the cache {cache_folder()}"
        )
    return ""


@cache
def _tvm_ffi() -> bool:
    return util.find_spec("tvm_ffi") is not None


@cache
def load(kind: Kind) -> Any:
    """The kernel as a function of numbers: those of its class's `__call__`, then a stream.

    Raises:
        ImportError: it is not in the cache, and there is no DSL to compile it.
    """
    for path in _files(kind):
        try:
            return _open(path)
        except UNUSABLE as error:
            _log.warning("%s; %s will not be used", error, path)
    if not dsl_version():
        raise ImportError(
            f"{words(kind)} is not in the cache {cache_folder()}, and {DSL} is not installed to compile it: {GET_DSL}; "
            f"or fill the cache where it is, with python -m ring_cute.compile"
        )
    made = build(kind)
    if made.path is None:
        return made.function
    try:
        return _open(made.path)
    except UNUSABLE as error:
        _log.warning("%s is compiled in every process anew, as %s cannot be loaded: %s", words(kind), made.path, error)
        return made.function


@dataclass(frozen=True, slots=True)
class Built:
    """A kernel that was compiled now."""

    function: Any  # what the DSL made of it
    path: Path | None  # where it is kept
    reason: str = ""  # why it is not


def build(kind: Kind) -> Built:
    """Compiles a kernel and, where it can, keeps it."""
    from ring_cute.hopper.compiling import compile_kind
    from ring_cute.hopper.linking import link

    begin = time.monotonic()
    compiled = compile_kind(kind)
    path = path_of(kind)
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "kernel.so")
            link(compiled, SYMBOL, library)
            keep(library.read_bytes(), path)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (
            f": {error.stderr.decode(errors='replace').strip()}"
            if isinstance(error, subprocess.CalledProcessError)
            else ""
        )
        reason = f"{error}{said}"
        _log.warning("%s is compiled in every process anew, as it cannot be kept in the cache: %s", words(kind), reason)
        return Built(compiled, None, reason)
    _log.info("compiled %s in %.1f s, kept in %s", words(kind), time.monotonic() - begin, path)
    return Built(compiled, path)


def keep(content: bytes, path: Path) -> None:
    """Writes a library into the cache: whole or not at all, whoever else does so.

    Raises:
        OSError: it cannot be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}-", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content + SEAL + hashlib.sha256(content).digest())
        Path(partial).chmod(0o644)  # mkstemp's are for their owner only; a cache may be shared
        Path(partial).replace(path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


def check(path: Path) -> None:
    """Raises DamagedError unless a file of the cache is as it was written."""
    raw = path.read_bytes()
    seal = len(raw) - hashlib.sha256().digest_size
    if raw[: max(0, seal)][-len(SEAL) :] != SEAL or hashlib.sha256(raw[: seal - len(SEAL)]).digest() != raw[seal:]:
        raise DamagedError(f"{path} is damaged ({len(raw)} bytes, whose digest is not that at their end)")


def _open(path: Path) -> Any:
    check(path)
    import tvm_ffi

    if torch.version.cuda is not None:  # what the library calls, made visible to it; torch has loaded it already
        ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}", mode=ctypes.RTLD_GLOBAL)
    module = tvm_ffi.load_module(str(path))
    return Kernel(getattr(module, SYMBOL), getattr(module, AGAIN_SYMBOL))
