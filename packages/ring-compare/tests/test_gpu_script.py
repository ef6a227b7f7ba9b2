"""scripts/gpu_tests.sh, where a checkout is there: what it runs, says and returns without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_tests.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not in a checkout")


# The script only asks it for GPUs, and the real one takes seconds to import.
QUICK_TORCH = "__version__ = '0'\nclass cuda:\n    device_count = staticmethod(lambda: 0)\n"


@pytest.fixture
def tree(tmp_path):
    """A checkout with two packages that have GPU tests, and one that has none."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    for package in ("ring-a", "ring-b"):
        (tmp_path / "packages" / package / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "packages" / "ring-c" / "tests").mkdir(parents=True)
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "torch.py").write_text(QUICK_TORCH)
    return tmp_path


def write(tree, package, text):
    (tree / "packages" / package / "tests" / "gpu" / "test_it.py").write_text(f"import pytest\n{text}\n")


def run(tree, subprocess_env, *arguments):
    command = [str(tree / "scripts" / "gpu_tests.sh"), *arguments]
    environment = {**subprocess_env, "PYTHON": sys.executable, "PYTEST_ADDOPTS": ""}
    environment["PYTHONPATH"] = str(tree / "quick") + os.pathsep + environment["PYTHONPATH"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_every_package_is_run_and_summed_up(tree, subprocess_env):
    write(tree, "ring-a", "def test_good(): pass\ndef test_few(): pytest.skip('needs 4 GPUs')")
    write(tree, "ring-b", "def test_bad(): assert False")
    done = run(tree, subprocess_env)
    assert done.returncode == 1
    summary = done.stdout[done.stdout.index("GPU tests by package:") :].splitlines()[1:]
    assert [line.split()[:2] for line in summary] == [["ring-a", "passed"], ["ring-b", "FAILED"]]
    assert "1 passed, 1 skipped" in summary[0]
    assert "1 failed" in summary[1]
    done = run(tree, subprocess_env, "ring-a", "--", "-k", "good")
    assert done.returncode == 0
    assert "ring-b" not in done.stdout


def test_nothing_run_is_no_success(tree, subprocess_env):
    write(tree, "ring-a", "def test_few(): pytest.skip('needs a GPU')")
    done = run(tree, subprocess_env, "ring-a")
    assert done.returncode == 1
    assert "NOTHING RAN" in done.stdout


def test_unknown_packages_are_wrong_usage(tree, subprocess_env):
    done = run(tree, subprocess_env, "ring-c")
    assert done.returncode == 2
    assert "no packages/ring-c/tests/gpu" in done.stderr
