"""Development sessions: `nox --list` shows them, `nox -s NAME` runs one. They find the packages in packages/."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
DIST = ROOT / "dist"
BENCHMARKS = ROOT / ".benchmarks"
PROJECTS = {
    path.parent.name: nox.project.load_toml(path)["project"] for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
PACKAGES = list(PROJECTS)
per_package = nox.parametrize("package", PACKAGES, ids=PACKAGES)

# Tests start several ranks; with one thread each they do not fight over the cores.
ONE_THREAD = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
# uv installs no bytecode, and without it every process spends seconds on compiling torch: let the first one write it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# torch and triton come in pairs; Triton 3.6's interpreter fails with numpy 2.4.
PAIRS = {
    "2.11": ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"],
    "2.13": ["torch==2.13.0", "triton==3.7.1"],
    "newest": ["torch", "triton"],
}

# The releases of the CuTe DSL that ring-cute allows, between which names and code generation change.
DSLS = {"4.7": "nvidia-cutlass-dsl==4.7.*", "4.8": "nvidia-cutlass-dsl==4.8.*"}
# Of ring-cute's tests, those in which the DSL itself takes part, without settings that are not shipped.
DSL_TESTS = [f"packages/ring-cute/tests/test_{name}_cute.py" for name in ("compile", "cache")] + ["-k", "not variants"]
# Left out where a package's tests run a second time, from its wheel: minutes of compiling the same sources, and of
# running what comes out on a machine in Python.
NOT_AGAIN = {
    "ring-cute": ["-k", "not emulated and not compiled_for_sm_90a"],
    "ring-triton": ["-k", "not simulated and not compiled_for_sm_90a and not test_compile_triton"],
}

# Run in an environment that holds one package's wheel and what it declares, and nothing else.
ALONE = """
import importlib, importlib.metadata, importlib.util, pathlib, sys
package, *strangers = sys.argv[1:]
module = importlib.import_module(package.replace("-", "_"))
folder = pathlib.Path(module.__file__).parent
assert folder.parent.name == "site-packages", f"{package} was not imported from its wheel but from {folder}"
assert (folder / "py.typed").exists(), f"{package}'s wheel lacks py.typed"
for entry in importlib.metadata.distribution(package).entry_points:
    entry.load()
for stranger in strangers:
    assert not importlib.util.find_spec(stranger.replace("-", "_")), f"{stranger} is here, undeclared by {package}"
print(package, importlib.metadata.version(package), "imports alone;", "not importable:", ", ".join(strangers) or "-")
"""


def members_of(package: str) -> list[str]:
    """The package and the members it needs, directly or not, dependencies first; optional dependencies do not count."""
    needed = [Requirement(line).name for line in PROJECTS[package].get("dependencies", [])]
    found = [member for name in needed if name in PROJECTS for member in members_of(name)]
    return [*dict.fromkeys(found), package]


def show_uv_what_pip_sees() -> None:
    """Hand pip's find-links (environment and configuration files) to uv, which reads none of pip's settings.

    A machine without a GPU may offer the CPU build of torch there; otherwise uv fetches gigabytes of CUDA libraries.
    """
    pip = shutil.which("pip3") or shutil.which("pip")
    if not pip or "UV_FIND_LINKS" in os.environ:
        return
    settings = subprocess.run([pip, "config", "list"], capture_output=True, text=True, check=False).stdout
    links = " ".join(re.findall(r"\.find-links='(.*)'$", settings, re.MULTILINE)).replace("\\n", " ").split()
    # pip passes over a folder that is not there, uv stops.
    links = [link for link in links if "://" in link or Path(link).is_dir()]
    os.environ["UV_FIND_LINKS"] = ",".join(dict.fromkeys(links))


def install(session: nox.Session, *arguments: str, constraints: Path | None = CONSTRAINTS) -> None:
    """Install into the session's environment, with the workspace's pinned versions unless told otherwise."""
    show_uv_what_pip_sees()
    session.install(*(["-c", str(constraints)] if constraints else []), *arguments)


def constraints_but(session: nox.Session, *packages: str) -> Path:
    """The pinned versions of all but some packages."""
    pinned = re.compile(rf"({'|'.join(packages)})==")
    # Not in create_tmp(), which moves TMPDIR there: sockets of the tests' fork server need a short path.
    others = Path(session.virtualenv.location) / "constraints.txt"
    others.write_text("".join(line for line in CONSTRAINTS.open() if not pinned.match(line)))
    return others


def editable(*packages: str, extra: str = "") -> list[str]:
    """Arguments that install packages in place, each once, with the members they need."""
    members = dict.fromkeys(member for package in packages for member in members_of(package))
    return [word for member in members for word in ("-e", f"packages/{member}{extra if member in packages else ''}")]


def run_tests(session: nox.Session, *packages: str, again: bool = False) -> None:
    """One pytest process per package, so that a package's tests never lean on what another's have imported."""
    for package in packages:
        # Triton's kernels are tested in its interpreter; elsewhere it would only slow down what torch compiles.
        interpret = {"TRITON_INTERPRET": "1"} if package == "ring-triton" else {}
        some = NOT_AGAIN.get(package, []) if again else []
        session.run("pytest", f"packages/{package}/tests", *some, *session.posargs, env=ONE_THREAD | interpret)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and formatting."""
    install(session, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy on every package."""
    install(session, *editable(*PACKAGES, extra="[test]"), "mypy")
    session.run("mypy", *session.posargs)


@nox.session
@per_package
def tests(session: nox.Session, package: str) -> None:
    """A package's tests, on the sources in this folder."""
    install(session, *editable(package, extra="[test]"))
    run_tests(session, package)


@nox.session(default=False)
def compare(session: nox.Session) -> None:
    """`ring-compare run`: accuracy, speed and memory of everything that runs here; takes its arguments after --."""
    install(session, *editable(*PACKAGES))
    interpret = {} if shutil.which("nvidia-smi") else {"TRITON_INTERPRET": "1"}  # so that Triton's kernels run as well
    session.run("ring-compare", "run", *session.posargs, env=interpret)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """pytest-benchmark on packages/*/tests/**/bench_*.py (not part of the tests), into .benchmarks/latest.json."""
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("packages/*/tests/**/bench_*.py"))]
    if not files:
        session.error("no package has benchmarks")
    install(session, *editable(*PACKAGES, extra="[test]"), "pytest-benchmark")
    BENCHMARKS.mkdir(exist_ok=True)
    result = f"--benchmark-json={BENCHMARKS / 'latest.json'}"
    session.run("pytest", "--benchmark-only", result, *(session.posargs or files), env=ONE_THREAD)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Every package's sdist and, from it, its wheel, into dist/."""
    install(session, "build", "hatchling")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        target = ["--outdir", str(DIST), f"packages/{package}"]
        session.run("python", "-m", "build", "--no-isolation", *target, silent=True)
    session.log("built " + ", ".join(wheel.name for wheel in sorted(DIST.glob("*.whl"))))


@nox.session(default=False, reuse_venv=False, requires=["build"])
@per_package
def isolated(session: nox.Session, package: str) -> None:
    """A package's wheel with nothing but what it declares: import it, then run its tests."""
    # By path: a package of the same name in a registry must not win.
    wheels = [str(next(DIST.glob(f"{member.replace('-', '_')}-*.whl"))) for member in members_of(package)]
    strangers = [member for member in PACKAGES if member not in members_of(package)]
    install(session, *wheels)
    session.run("python", "-I", "-c", ALONE, package, *strangers, log=False)
    install(session, *wheels[:-1], f"{wheels[-1]}[test]")
    run_tests(session, package, again=True)


@nox.session(default=False, reuse_venv=False, venv_backend="uv")
@per_package
def minimums(session: nox.Session, package: str) -> None:
    """A package's tests with the lowest versions it declares (needs uv)."""
    install(session, "--resolution=lowest-direct", *editable(package, extra="[test]"), constraints=None)
    run_tests(session, package)


@nox.session(default=False, reuse_venv=False)
@nox.parametrize("pair", list(PAIRS), ids=list(PAIRS))
def matrix(session: nox.Session, pair: str) -> None:
    """All tests with another pair of torch and triton, on the running Python."""
    others = constraints_but(session, "torch", "triton", "numpy")
    install(session, *editable(*PACKAGES, extra="[test]"), *PAIRS[pair], constraints=others)
    run_tests(session, *PACKAGES)


@nox.session(default=False)
@nox.parametrize("release", list(DSLS), ids=list(DSLS))
def dsl(session: nox.Session, release: str) -> None:
    """ring-cute's kernels compiled for sm_90a, without a GPU, by another release of the CuTe DSL."""
    others = constraints_but(session, "nvidia-cutlass-dsl")
    install(session, *editable("ring-cute", extra="[test]"), DSLS[release], constraints=others)
    session.run("pytest", *(session.posargs or DSL_TESTS), env=ONE_THREAD)
