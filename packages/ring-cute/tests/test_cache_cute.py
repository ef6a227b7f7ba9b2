"""The cache of compiled kernels: what is in it is found without the DSL, damage is noticed, and what cannot be kept is
said."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import cached
import pytest

from ring_cute import library
from ring_cute.compile import main, shipped
from ring_cute.library import DamagedError

WARM_SECONDS = 1.0
"""Of opening a kernel that is in the cache, tvm_ffi's import included: it takes some tenths."""
needs_dsl = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]


def process(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`cached.py` in a process of its own."""
    everything = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RING_CUTE_CACHE": str(cache)}
    command = [sys.executable, cached.__file__, *arguments]
    return subprocess.run(command, env=everything | environment, capture_output=True, text=True, check=False)


# --- with the DSL


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the command has filled."""
    folder = tmp_path_factory.mktemp("cache")
    done = process("fill", cache=folder)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert ": compiled in " in done.stdout and "1 of 1 kernels are in the cache" in done.stdout
    assert len(list(folder.iterdir())) == 1, "nothing is left over"
    return folder


class TestFilled:
    pytestmark = needs_dsl

    def test_a_second_process_compiles_nothing(self, warm: Path) -> None:
        done = process("load", cache=warm)
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout)
        assert not found["cutlass"], "the DSL was imported"
        assert found["type"] == "Kernel"
        assert found["seconds"] < WARM_SECONDS

    def test_the_command_compiles_nothing_twice(self, warm: Path) -> None:
        (before,) = (path.stat().st_mtime_ns for path in warm.iterdir())
        done = process("fill", cache=warm)
        assert done.returncode == 0 and ": there already" in done.stdout
        (after,) = (path.stat().st_mtime_ns for path in warm.iterdir())
        assert before == after

    def test_damage_is_mended(self, warm: Path, tmp_path: Path) -> None:
        """Half a file, which the dynamic linker would crash on, is said to be damaged and compiled anew."""
        (whole,) = warm.iterdir()
        half = tmp_path / whole.name
        half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        done = process("load", cache=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        assert f"{half} is damaged" in done.stderr
        assert json.loads(done.stdout)["cutlass"]
        library.check(half)
        assert not json.loads(process("load", cache=tmp_path).stdout)["cutlass"]

    def test_without_a_linker(self, tmp_path: Path) -> None:
        """Kernels are compiled all the same, and it is said why they are not kept."""
        broken = tmp_path / "broken"
        broken.mkdir()
        compiler = broken / "cc"
        compiler.write_text("#!/bin/sh\necho cannot find crti.o >&2\nexit 1\n")
        compiler.chmod(0o755)
        done = process(
            "unlinked", str(tmp_path / "nothing"), f"{broken}:{os.environ['PATH']}", cache=tmp_path / "cache"
        )
        assert done.returncode == 0, done.stderr[-4000:]
        none, failed = json.loads(done.stdout)
        assert "no C compiler on the PATH" in none["reason"] and "cannot find crti.o" in failed["reason"]
        for found in (none, failed):
            assert not found["kept"] and found["callable"]
        assert done.stderr.count("is compiled in every process anew") == 4
        assert not list(tmp_path.glob("cache/*")), "nothing half-done is left"


# --- without it


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RING_CUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Modules in the place of those that import the DSL: what has been compiled so far, and linking writes a file."""
    compiled: list[object] = []
    compiling, linking = ModuleType("compiling"), ModuleType("linking")
    compiling.compile_kind = lambda kind: compiled.append(kind) or kind  # type: ignore[attr-defined]
    linking.link = lambda made, name, target: target.write_bytes(b"library")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ring_cute.hopper.compiling", compiling)
    monkeypatch.setitem(sys.modules, "ring_cute.hopper.linking", linking)
    monkeypatch.setattr(library, "dsl_version", lambda: "4.8.0")

    def opened(path: Path) -> tuple[str, bytes]:
        library.check(path)
        return "opened", path.read_bytes()[:7]

    monkeypatch.setattr(library, "_open", opened)
    library.load.cache_clear()
    yield compiled
    library.load.cache_clear()


KIND = cached.KIND


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("RING_CUTE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert library.cache_folder() == Path("/home/somebody/.cache/ring_cute")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert library.cache_folder() == Path("/fast/ring_cute")
    monkeypatch.setenv("RING_CUTE_CACHE", "/image/kernels")
    assert library.cache_folder() == Path("/image/kernels")


def test_a_kernel_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled into it, the sources, the DSL and the architecture are part of its name; a reason is not."""
    paths = {library.path_of(KIND)}
    others = {"dtype": "float16", "head_dim": 128, "state": True, "sinks": True, "flags": True, "softcap": True}
    paths |= {library.path_of(replace(KIND, **{name: value})) for name, value in others.items()}
    settings = [field for field in fields(KIND.settings) if field.compare and field.type in ("int", "bool")]
    for field in settings:
        changed = replace(KIND.settings, **{field.name: getattr(KIND.settings, field.name) + 1})
        paths.add(library.path_of(replace(KIND, settings=changed)))
    assert len(paths) == 1 + len(others) + len(settings)
    assert library.path_of(replace(KIND, settings=replace(KIND.settings, reason="faster"))) in paths
    assert all("-sm_90a-" in path.name and library.fingerprint() in path.name for path in paths)
    before = library.path_of(KIND)
    monkeypatch.setattr(library, "dsl_version", lambda: "4.9.9")
    assert library.path_of(KIND) not in paths
    monkeypatch.undo()
    monkeypatch.setattr(library, "fingerprint", lambda: "0" * 16)
    assert library.path_of(KIND) != before


@pytest.mark.parametrize("error", [PermissionError("not yours"), RuntimeError("failed to map segment")], ids=str)
def test_what_cannot_be_loaded_is_compiled(
    error: Exception,
    folder: Path,
    compiler: list[object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In every process, and it is said why: a folder of somebody else, or one from which nothing may be executed."""

    def refused(path: Path) -> None:
        raise error

    library.load(KIND)
    monkeypatch.setattr(library, "_open", refused)
    library.load.cache_clear()
    assert library.load(KIND) is KIND, "what the compiler made"
    assert compiler == [KIND, KIND]
    assert str(error) in caplog.text and "compiled in every process anew" in caplog.text


def test_compiled_once_and_kept(folder: Path, compiler: list[object]) -> None:
    assert library.load(KIND) == ("opened", b"library")
    assert library.load(KIND) == ("opened", b"library")
    library.load.cache_clear()  # another process
    assert library.load(KIND) == ("opened", b"library")
    assert compiler == [KIND]


@pytest.mark.parametrize("damage", ["empty", "short", "longer", "other", "no seal"])
def test_damage_is_noticed(damage: str, folder: Path, compiler: list[object], caplog: pytest.LogCaptureFixture) -> None:
    library.load(KIND)
    path = library.path_of(KIND)
    whole = path.read_bytes()
    changed = {
        "empty": b"",
        "short": whole[:-1],
        "longer": whole + b"x",
        "other": b"L" + whole[1:],
        "no seal": whole[: len(b"library")],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(DamagedError, match=r"is damaged \(\d+ bytes"):
        library.check(path)
    library.load.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ring_cute.library"):
        assert library.load(KIND) == ("opened", b"library")
    assert compiler == [KIND, KIND] and path.read_bytes() == whole
    assert f"{path} is damaged" in caplog.text


def test_without_the_dsl(folder: Path, compiler: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that any version compiled are taken; where there is none, an error says what to install and run."""
    library.load(KIND)
    old = library.path_of(KIND)
    monkeypatch.setattr(library, "dsl_version", lambda: "")
    assert library.find(KIND) == old
    library.load.cache_clear()
    assert library.load(KIND) == ("opened", b"library")
    monkeypatch.setattr(library, "_tvm_ffi", lambda: True)
    assert library.missing() == ""
    with pytest.raises(ImportError, match=r"pip install 'nvidia-cutlass-dsl.*python -m ring_cute.compile") as caught:
        library.load(replace(KIND, dtype="float16"))
    assert str(folder) in str(caught.value) and "float16" in str(caught.value)
    old.write_bytes(b"")
    library.load.cache_clear()
    with pytest.raises(ImportError, match="is not in the cache"):
        library.load(KIND)
    old.unlink()
    assert "nvidia-cutlass-dsl is not installed" in library.missing()
    monkeypatch.setattr(library, "fingerprint", lambda: "0" * 16)  # kernels of another ring-cute are none
    old.write_bytes(b"")
    assert "nvidia-cutlass-dsl is not installed" in library.missing()


def test_a_cache_that_cannot_be_written(
    folder: Path, compiler: list[object], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="ring_cute.library"):
        assert library.load(KIND) is KIND, "what the DSL made of it"
    assert "is compiled in every process anew" in caplog.text and str(folder) in caplog.text
    assert main(["--head-dim", "64", "--dtype", "bfloat16", "--direction", "forward", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    count = len(list(shipped((64,), ("bfloat16",), ("forward",))))
    assert said.count("not kept: ") == count and f"0 of {count} kernels are in the cache" in said


def test_the_command(folder: Path, compiler: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    kinds = list(shipped((64,), ("float16",)))
    arguments = ["--head-dim", "64", "--dtype", "float16", "--jobs", "1"]
    assert main(arguments) == 0
    assert compiler == kinds
    said = capsys.readouterr().out
    assert said.startswith(f"cache {folder}: {len(kinds)} kernels, nvidia-cutlass-dsl 4.8.0\n")
    assert all(library.path_of(kind).name + ": compiled in " in said for kind in kinds)
    library.path_of(kinds[1]).write_bytes(b"")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert compiler == [*kinds, kinds[1]], "what is there is left alone"
    assert f"{library.path_of(kinds[1])} is damaged" in said and said.count(": there already") == len(kinds) - 1
    assert main([*arguments, "--anew"]) == 0
    assert len(compiler) == 2 * len(kinds) + 1


def test_the_command_says_what_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--head-dim", "60"])
    assert caught.value.code == 2 and "no kernels of head dim 60" in capsys.readouterr().err
    monkeypatch.setattr(library, "dsl_version", lambda: "")
    assert main([]) == 2
    assert "nvidia-cutlass-dsl is not installed: pip install" in capsys.readouterr().err


def test_several_processes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "kernel.so"
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert sum(pool.map(cached.write, [path] * 3, range(3))) == 120
    assert list(path.parent.iterdir()) == [path], "nothing half-written is left"
