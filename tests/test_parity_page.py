"""The page of parity: every method and every exception stand on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peft_any.registry import absent, method_for, method_names
from tests import parity

DOCS = Path(__file__).parent.parent / "docs"


def test_every_method_and_exception_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import parity_page

    text = parity_page.compose()
    assert all(f"[{name}](methods/{name.lower()}.md)" in text for name in method_names())
    assert all(
        f"| {name} | {why} |" in text for name, (why, _) in absent().items() if name != "BONE"
    )
    assert all(f"| {e.what} | {e.why} |" in text for e in parity.EXCEPTIONS)
    for name in ("parity_page", "generate"):
        sys.modules.pop(name, None)


def test_fields_that_share_a_line_are_described_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import generate

    notes = generate.parse(method_for("LORA")).notes
    assert notes["rank_pattern"] == notes["alpha_pattern"] == "r and α by site."
    assert notes["target_parameters"] == "stacks of experts."
    assert notes["lora_bias"].startswith("the bias gains")
    assert "folded into rank 2r by files: ΔW" in notes["init_lora_weights"]
    sys.modules.pop("generate")
