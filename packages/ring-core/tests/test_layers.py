"""The direction of imports inside ring_core, read from the sources: each layer imports only those below it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ring_core

ROOT = Path(ring_core.__file__).parent
LAYERS: dict[str, int] = {
    # what may be imported by everything above it; modules of one number are one layer and may know each other
    "segment": 0,
    "sections": 0,
    "ranges": 0,
    "philox": 0,
    "_torch": 0,
    "group": 0,
    "agreement": 0,
    "layout": 1,
    "key_tiles": 1,
    "tiles": 1,
    "plan": 2,
    "checks": 3,
    "backend": 3,
    "packed": 4,
    "reference": 4,
    "direct": 4,
    "merge_triton": 5,
    "merge": 6,
    "accumulate": 7,
    "comm": 7,
    "forward": 8,
    "backward": 8,
    "autograd": 9,
    "interface": 10,
    "packed_attention": 11,
    "varlen": 12,
    "functions": 13,
    "__init__": 14,
}
BOTTOM = {"segment", "ranges", "philox", "agreement"}  # import nothing of ring_core
EXTERNAL = {"torch", "numpy"}
BACKEND_PACKAGES = {"ring_native", "ring_triton", "ring_cute", "ring_compare", "flash_attn", "cutlass"}

FILES = sorted(path for path in ROOT.rglob("*.py") if "testing" not in path.relative_to(ROOT).parts)


def module_of(path: Path) -> str:
    """The layer's name: the first part below ring_core."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(absolute name, line, at import time) of all that a file imports; names taken from ring_core itself resolved."""
    tree = ast.parse(path.read_text())
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import hides what is imported"
            name = node.module or ""
            names = [f"{name}.{alias.name}" for alias in node.names] if name == "ring_core" else [name]
            found += [(name, node.lineno, id(node) not in late) for name in names]
    return found


def test_every_module_has_a_layer() -> None:
    assert {module_of(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    mine = module_of(path)
    for name, line, at_import in imports(path):
        if name.split(".")[0] != "ring_core":
            continue
        theirs = name.split(".")[1]
        place = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert theirs != "testing", f"{place}: tests are not part of the library"
        assert mine not in BOTTOM, f"{place}: it stands at the bottom"
        if theirs == mine:
            continue
        if mine == "backend" and theirs == "reference" and not at_import:
            continue  # the one backend that is always there, loaded as lazily as all others
        assert LAYERS[theirs] < LAYERS[mine] or (LAYERS[theirs] == LAYERS[mine] == 0), f"{place}: against the layers"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_backend_package_and_no_undeclared_one(path: Path) -> None:
    import sys

    for name, line, _ in imports(path):
        top = name.split(".")[0]
        assert top not in BACKEND_PACKAGES, f"{path.name}:{line} imports {name}"
        if path.name != "direct.py" and not path.stem.endswith("_triton"):  # which may use triton
            assert top in EXTERNAL | {"ring_core"} | set(sys.stdlib_module_names), f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_live_in_one_file(path: Path) -> None:
    if path.name == "_torch.py":
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            names = [part for parts in modules if parts[0] == "torch" for part in parts]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in ("torch", "dist", "F"):
            names = ast.unparse(node).split(".")
        else:
            continue
        private = [name for name in names if name.startswith("_") and not name.startswith("__")]
        assert not private, f"{path.name}:{getattr(node, 'lineno', 0)} uses {private} of torch"


def test_plans_know_no_tensors_and_no_processes() -> None:
    """layout.py deals out tensors as well; the planner takes only its arithmetic."""
    for path in FILES:
        if module_of(path) == "plan" or path.stem in ("segment", "ranges"):
            assert not [name for name, _, _ in imports(path) if name.split(".")[0] == "torch"], path


def test_orchestration_knows_no_kernel_and_no_layout() -> None:
    for stem in ("forward", "backward"):
        known = {name.split(".")[1] for name, _, _ in imports(ROOT / f"{stem}.py") if name.startswith("ring_core.")}
        assert known <= {"backend", "comm", "plan"}, known


def test_what_is_exported_exists() -> None:
    for name in ring_core.__all__:
        assert getattr(ring_core, name) is not None
    assert ring_core.__all__ == sorted(ring_core.__all__)


def test_importing_takes_no_compiler() -> None:
    """torch's own takes seconds to import, which a first call should not wait for."""
    check = "import torch, sys; before = {*sys.modules}; import ring_core; print(*sorted({*sys.modules} - before))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    added = done.stdout.split()
    assert "ring_core.interface" in added
    assert not {"torch._dynamo", "torch._inductor", "sympy", "triton"}.intersection(added)
