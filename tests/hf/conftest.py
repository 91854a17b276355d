"""These tests compare with an installed Hugging Face PEFT; without one they are not collected."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("peft") else ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/hf/" in item.path.as_posix():
            item.add_marker(pytest.mark.hf)


@pytest.fixture(autouse=True, scope="session")
def no_cards() -> Iterator[None]:
    """Save without the page about the model, which takes a fifth of the time of these tests."""
    import peft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_, **__: None)
        yield
