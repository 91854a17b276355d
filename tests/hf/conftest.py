"""These tests compare with an installed Hugging Face PEFT; without one they are not collected."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("peft") else ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/hf/" in item.path.as_posix():
            item.add_marker(pytest.mark.hf)
