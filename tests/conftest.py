"""What all tests share; the fixtures `lib` and `xp` are the plugin's (`pytest_peft_any`)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings

from peft_any.testing.libraries import Lib as Lib
from peft_any.testing.libraries import missing as missing

settings.register_profile(
    "laws",
    deadline=None,  # the first call of a jitted or lazy library compiles
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
    derandomize="CI" in os.environ,  # what a change breaks there, it breaks everywhere
)
settings.register_profile("deep", settings.get_profile("laws"), max_examples=2000)
settings.load_profile("laws")

HASTY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
"""What makes XLA compile three times as fast: tests call once what they have compiled."""
ALONE = "PEFT_ANY_TESTED_ALONE"
"""Set where a test that is marked `alone` runs in its own process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--fuzz` and `--kills`."""
    parser.addoption("--fuzz", type=int, default=200, help="how many mutated inputs are tried")
    parser.addoption("--kills", type=int, default=4, help="how often a merge is killed")


def pytest_configure(config: pytest.Config) -> None:
    """Leave processes that run side by side one thread each: they share the cores already.

    JAX's own session compiles as its users do.
    """
    if "jax" not in (config.getoption("--backend") or ()):
        os.environ.setdefault("XLA_FLAGS", HASTY)
    if config.getoption("numprocesses", None):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


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
