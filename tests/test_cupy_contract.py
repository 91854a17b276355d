"""CuPy has every function that the package calls: all that can be said without a CUDA device."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import peft_any

PACKAGE = Path(peft_any.__file__).parent
TAPE = sorted((PACKAGE / "tape").glob("*.py"))
# _libraries.py and _engines.py speak to each library in its own words, the tape to a namespace of
# its own, which stands for a library's.
APART = {PACKAGE / "_libraries.py", PACKAGE / "_engines.py", *TAPE}
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in APART]


def attributes(root: str, sources: list[Path]) -> set[str]:
    """Find every dotted name that some files read of a namespace called `root`."""
    found = set()
    for path in sources:
        for top in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            node, parts = top, []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if parts and isinstance(node, ast.Name) and node.id == root:
                found.add(".".join(reversed(parts)))
    return found


EXTENSIONS = ("", ".linalg", ".fft")
OWN = {"_linear", "depth", "kind", "lift", "lower", "raw", "root", "wrap"}
"""What the tape's namespace has beyond the standard."""
NAMES = sorted(attributes("xp", SOURCES) - OWN)
RECORDED = sorted(
    {name.removeprefix("raw.") for name in attributes("xp", TAPE) | attributes("raw", TAPE)} - OWN
)


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


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("library", ["cupy", "numpy"])
def test_rules_of_the_tape_call_what_is_there(library: str, name: str) -> None:
    pytest.importorskip(library)
    parts = [importlib.import_module(f"array_api_compat.{library}{part}") for part in EXTENSIONS]
    last = name.rpartition(".")[2]
    assert any(hasattr(part, last) for part in parts), f"{library} has no {name}"


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_in_the_standard(name: str) -> None:
    found = pytest.importorskip("array_api_strict")
    for part in name.split("."):
        assert hasattr(found, part), f"{name} is not in the array API standard"
        found = getattr(found, part)
