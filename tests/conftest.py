"""The `lib` fixture: every array library on which a law must hold."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from peft_any.backend import Backend, creation_device, dtype_name, from_numpy, resolve, to_numpy

settings.register_profile(
    "laws",
    deadline=None,  # the first call of a jitted or lazy library compiles
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
settings.load_profile("laws")

LIBRARIES = {
    "numpy": ("numpy", "numpy:readonly"),
    "strict": ("strict", "strict:device1", "strict:minimal"),
    "torch": ("torch", "torch:meta"),
    "jax": ("jax",),
    "dask": ("dask",),
    "cupy": ("cupy",),
}
"""Rows of the fixture by the library they need; `--backend` takes a key."""

ALONE = "PEFT_ANY_TESTED_ALONE"
"""Set where a test that is marked `alone` runs in its own process."""
MODULES = {"strict": "array_api_strict", "dask": "dask.array"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--backend`, which restricts the libraries, and `--fuzz`."""
    parser.addoption("--backend", action="append", choices=[*LIBRARIES], help="only this library")
    parser.addoption("--fuzz", type=int, default=200, help="how many mutated inputs are tried")
    parser.addoption("--kills", type=int, default=4, help="how often a merge is killed")


def pytest_configure(config: pytest.Config) -> None:
    """Leave processes that run side by side one thread each: they share the cores already."""
    if config.getoption("numprocesses", None):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    module = MODULES.get(library, library)
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def missing(row: str) -> str | None:
    """Say why a row of the fixture cannot run here, if it cannot."""
    library = row.partition(":")[0]
    if not installed(library):
        return f"{library} is not installed"
    if library == "cupy":
        import cupy

        if not cupy.cuda.is_available():
            return "cupy is installed, but there is no CUDA device"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `lib` over the libraries asked for."""
    if "lib" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("backend") or [*LIBRARIES]
        rows = [row for library in chosen for row in LIBRARIES[library]]
        metafunc.parametrize("lib", rows, indirect=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fail when the library that this session is for is not there: never skip it silently."""
    required = os.environ.get("PEFT_ANY_REQUIRE")
    if required and not installed(required):
        pytest.exit(f"PEFT_ANY_REQUIRE={required}, but {required} is not installed", returncode=3)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `alone` in a process that has loaded nothing else."""
    if pyfuncitem.get_closest_marker("alone") is None or ALONE in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    root = pyfuncitem.config.rootpath
    env = {**os.environ, ALONE: "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)
    return True


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many mutated inputs to try."""
    return int(request.config.getoption("--fuzz"))


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often to kill a merge."""
    return int(request.config.getoption("--kills"))


@dataclass(frozen=True)
class Lib:
    """One row of the fixture: how to make its arrays, call functions on them, and compare."""

    row: str
    backend: Backend

    @property
    def name(self) -> str:
        """The library's name in a backend's spec."""
        return self.backend.name

    @property
    def has_values(self) -> bool:
        """Whether arrays hold numbers (torch's meta device has shapes only)."""
        return self.row != "torch:meta"

    def lacks(self, needs: tuple[str, ...]) -> str | None:
        """Say which extension a computation needs that this row does not have."""
        if self.row == "strict:minimal" and needs:
            return f"needs the {needs} extension, which strict:minimal does not offer"
        return None

    def array(self, host: Any) -> Any:
        """Convert a host array, or a dict of them."""
        if isinstance(host, dict):
            return {k: self.array(v) for k, v in host.items()}
        if self.row == "numpy:readonly":
            host = np.array(host)
            host.flags.writeable = False
            return host
        return from_numpy(np.array(host), self.backend)

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        """Call `f` on arrays made of the arguments; jitted where the library can."""
        arrays = [self.array(a) if isinstance(a, np.ndarray | dict) else a for a in args]
        if self.name == "jax":
            import jax

            return jax.jit(f)(*arrays)
        if self.name == "dask":
            import dask

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise AssertionError("a lazy computation was forced")

            with dask.config.set(scheduler=refuse):
                return f(*arrays)
        return f(*arrays)

    def check(self, got: Any, want: np.ndarray, *, rtol: float, scale: float = 1.0) -> None:
        """Compare library, device, dtype and shape, then values (relative to the largest)."""
        assert tuple(got.shape) == want.shape
        assert dtype_name(got) == dtype_name(want)
        if self.name != "numpy":
            assert resolve("auto", got).name == self.name
        if self.row in ("strict:device1", "torch:meta"):
            assert creation_device(got) == self.backend.device
        if self.has_values:
            host = to_numpy(got)
            size = max(float(np.max(np.abs(want), initial=0.0)), scale * 1e-30)
            np.testing.assert_allclose(host / size, want / size, rtol=0, atol=rtol)


@pytest.fixture
def lib(request: pytest.FixtureRequest) -> Iterator[Lib]:
    """One array library, skipped with a plain reason where it is not here."""
    row: str = request.param
    if reason := missing(row):
        pytest.skip(reason)
    library, _, device = row.partition(":")
    with contextlib.ExitStack() as stack:
        if library == "jax":
            import jax

            jax.config.update("jax_enable_x64", True)
        if row == "strict:minimal":
            import array_api_strict

            flags = array_api_strict.ArrayAPIStrictFlags(
                boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
            )
            stack.enter_context(flags)
        spec = f"{library}:{device}" if device in ("device1", "meta") else library
        yield Lib(row, resolve(spec))
