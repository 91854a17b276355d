"""Run the Python blocks of the README and of the documentation's pages, each page in one go."""

from __future__ import annotations

import contextlib
import tempfile
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from importlib.util import find_spec
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_plugins = ["pytest_peft_any"]
collect_ignore_glob = ["tests/benchmarks/*", "tests/golden/make*.py", "tests/sharded*.py"]
"""Programs of their own: no doctests to look for, and they import torch and peft, or JAX."""
if find_spec("torch") is None:
    collect_ignore_glob.append("peft_any/integrations/torch/*")
if find_spec("jax") is None:
    collect_ignore_glob.append("peft_any/integrations/jax/*")


def enter(namespace: dict[str, Any]) -> None:
    """Start a page in an empty directory, where it may write files."""
    stack = namespace["_stack"] = contextlib.ExitStack()
    stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))


def leave(namespace: dict[str, Any]) -> None:
    """Go back, and drop what the page wrote."""
    namespace["_stack"].close()


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE),
        SkipParser(),
    ],
    patterns=["README.md", "docs/*.md", "docs/tutorials/*.md"],
    excludes=["docs/methods/*"],
    setup=enter,
    teardown=leave,
).pytest()
