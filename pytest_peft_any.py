"""The plugin of pytest: ``--backend``, and the fixtures `lib` and `xp` over array libraries.

A project asks for it: ``pytest_plugins = ["pytest_peft_any"]`` in the conftest.py of its root, or
``-p pytest_peft_any``. It stands outside the package, which is imported where a test asks for a
fixture, and so after coverage has started.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peft_any.testing import Lib


class Row(str):
    """A row of the fixtures; a type of its own, so that no other parameter is taken for one."""

    __slots__ = ()


ROWS = [
    Row(name)
    for name in (
        "numpy", "numpy:readonly", "strict", "strict:device1", "strict:minimal", "torch",
        "torch:meta", "jax", "dask", "cupy",
    )
]  # fmt: skip
LIBRARIES = [*dict.fromkeys(row.partition(":")[0] for row in ROWS)]
MODULES = {"strict": "array_api_strict"}
"""Libraries whose module has another name."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--backend`."""
    group = parser.getgroup("peft_any", "array libraries")
    group.addoption(
        "--backend",
        action="append",
        choices=LIBRARIES,
        help="run the tests that take `lib` or `xp` with this array library alone",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a library that is not installed: with it every test would be skipped.

    Raises
    ------
    pytest.UsageError
        Naming it.
    """
    for name in config.getoption("--backend") or ():
        if find_spec(MODULES.get(name, name)) is None:
            raise pytest.UsageError(f"--backend {name}: {name} is not installed here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of the libraries asked for."""
    chosen = config.getoption("--backend")
    if not chosen:
        return

    def wanted(item: pytest.Item) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        rows = [v for v in params.values() if isinstance(v, Row)]
        return all(row.partition(":")[0] in chosen for row in rows)

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=ROWS)
def lib(request: pytest.FixtureRequest) -> Iterator[Lib]:
    """One array library (`peft_any.testing.Lib`), skipped with a reason where it is not here."""
    from peft_any.testing import library, missing  # noqa: PLC0415 - only where it is asked for

    if reason := missing(request.param):
        pytest.skip(reason)
    with library(request.param) as found:
        yield found


@pytest.fixture
def xp(lib: Lib) -> Any:
    """One array library's namespace of the Array API standard."""
    return lib.backend.xp
