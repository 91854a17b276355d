"""CuPy has every function that the package calls: all that can be said without a CUDA device."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import peft_any

PACKAGE = Path(peft_any.__file__).parent
# _libraries.py speaks to each library in its own words.
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_libraries.py"]


def attributes(root: str) -> set[str]:
    """Find every dotted name that the package reads of a namespace called `root`."""
    found = set()
    for path in SOURCES:
        for top in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            node, parts = top, []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if parts and isinstance(node, ast.Name) and node.id == root:
                found.add(".".join(reversed(parts)))
    return found


NAMES = sorted(attributes("xp"))


def test_the_package_calls_a_namespace() -> None:
    assert {"matrix_transpose", "reshape", "concat", "linalg.svd", "take", "vecdot"} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("library", ["cupy", "numpy", "torch", "dask.array"])
def test_every_library_has_the_function(library: str, name: str) -> None:
    pytest.importorskip(library)
    found = importlib.import_module(f"array_api_compat.{library}")
    importlib.import_module(f"array_api_compat.{library}.linalg")
    for part in name.split("."):
        assert hasattr(found, part), f"{library} has no {name}"
        found = getattr(found, part)


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_in_the_standard(name: str) -> None:
    found = pytest.importorskip("array_api_strict")
    for part in name.split("."):
        assert hasattr(found, part), f"{name} is not in the array API standard"
        found = getattr(found, part)
