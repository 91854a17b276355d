"""Pages run where libraries that they show are missing: what needs one is skipped, whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
OPTIONAL = {
    **{name: {name} for name in ("cupy", "dask", "equinox", "flax", "matplotlib", "optax", "peft")},
    **{name: {name} for name in ("neuralfoil", "torch", "transformers")},
    "jax": {"jax", "equinox", "flax", "optax"},
}
"""Libraries that may be missing, and which of them are nowhere without each."""
_PARTS = re.compile(r"(?ms)^<!-+ skip: (next|start|end)(.*?)-->$|^```python\n(.*?)^```$")
_IMPORTS = re.compile(r"(?m)^(?:>>> |\.\.\. )?\s*(?:import|from) ([\w, ]+)")


def needs_of(block: str) -> set[str]:
    """Name the optional libraries that a block imports."""
    found = {word for line in _IMPORTS.findall(block) for word in re.findall(r"\w+", line)}
    return found & OPTIONAL.keys()


def faults_of(page: str) -> list[str]:
    """List the blocks of a page that are not skipped, or not whole, where a library is missing."""
    faults, held, once = [], None, None
    for which, said, block in _PARTS.findall(page):
        if which:
            held = said if which == "start" else None if which == "end" else held
            once = said if which == "next" else None
            continue
        if once is not None and ">>>" in block:
            faults.append(f"skip: next skips the first example alone of {block[:60]!r}")
        skipped = [said for said in (held, once) if said is not None]
        always = any(not said.strip() for said in skipped)
        asked = {name for name in OPTIONAL if any(f'"{name}"' in said for said in skipped)}
        faults += [
            f"{name} is not asked for before {block[:60]!r}"
            for name in sorted(needs_of(block))
            if not always and not asked & OPTIONAL[name]
        ]
        once = None
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_needs_a_library_is_skipped_without_it(page: Path) -> None:
    assert faults_of(page.read_text()) == []


def test_faults_are_found() -> None:
    ask = '<!-- skip: {} if(find_spec("torch") is None, reason="") -->\n\n'
    block = "```python\n>>> import torch\n>>> torch.ones(2)\n```\n"
    assert faults_of(ask.format("start") + block + "<!-- skip: end -->\n") == []
    (fault,) = faults_of(ask.format("next") + block)
    assert fault.startswith("skip: next skips the first example alone")
    (fault,) = faults_of(ask.format("start") + "<!-- skip: end -->\n\n" + block)
    assert fault.startswith("torch is not asked for")
    assert faults_of("<!-- skip: next -->\n\n" + block.replace(">>> ", "")) == []
    (fault,) = faults_of(ask.format("next") + block.replace(">>> ", "") + block)
    assert fault.startswith("torch is not asked for")
