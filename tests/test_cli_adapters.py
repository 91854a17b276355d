"""The commands that make adapters of adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any.adapter import Adapter
from peft_any.cli import run
from peft_any.methods.lora import LoraConfig
from peft_any.model import PeftModel
from tests.test_combine import delta, lora


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Save two adapters of unlike ranks."""
    paths = tmp_path / "a", tmp_path / "b"
    for seed, path in enumerate(paths, 1):
        lora(seed, seed + 1).save(path)
    return paths


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Read the one JSON document on standard output."""
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_combine_writes_the_weighted_sum(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair
    out = str(tmp_path / "out")
    assert run(["combine", f"{a}:0.7", f"{b}:-0.3", "--out", out, "--json"]) == 0
    document = output(capsys)
    want = 0.7 * delta(lora(1, 2)) - 0.3 * delta(lora(2, 3))
    np.testing.assert_allclose(delta(Adapter.load(out)), want, rtol=1e-5, atol=1e-6)
    assert document["kind"] == "combine"
    assert document["ranks"] == {"5": 1}
    assert document["layers"][0]["norm"] == pytest.approx(float(np.linalg.norm(want)))
    assert json.loads(Path(out, "combine_receipt.json").read_text()) == document


def test_a_cut_says_what_it_leaves_out(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*map(str, pair), "--energy", "0.9", "--out", str(tmp_path / "out")]
    assert run(["combine", *given]) == 0
    said = capsys.readouterr().out
    assert "of ‖ΔW‖² left out" in said
    assert f"→ {tmp_path / 'out'}" in said


def test_linear_says_its_cross_terms(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, _ = pair
    twice = [str(a), f"{a}:0.25", "--method", "linear", "--dry-run"]
    assert run(["combine", *twice, "--json"]) == 0
    # (1 + ½)·B and (1 + ½)·A, instead of (1 + ¼)·B·A
    assert output(capsys)["off_sum"] == pytest.approx(2.25 / 1.25 - 1, rel=1e-6)


def test_resize_writes_the_rank(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run(["resize", str(pair[1]), "--rank", "8", "--out", out, "--json"]) == 0
    assert output(capsys)["ranks"] == {"8": 1}
    np.testing.assert_array_equal(delta(Adapter.load(out)), delta(lora(2, 3)))
    assert run(["resize", str(pair[1]), "--sv-cumulative", "0.5", "--out", out]) == 5
    assert "it exists" in capsys.readouterr().err
    assert run(["resize", str(pair[1]), "--sv-ratio", "1.0", "--out", out, "--overwrite"]) == 0
    assert Adapter.load(out).config.r == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["combine", "A", "B"], 2, "--out is missing"),
        (["combine", "A", "B", "--method", "tie", "--dry-run"], 2, "nearest"),
        (["combine", "A:nan", "--dry-run"], 2, "finite"),
        (["combine", "A", "B", "--method", "linear", "--dry-run"], 3, "ranks [2, 3]"),
        (["combine", "A", "nowhere", "--dry-run"], 5, "no such adapter"),
        (["resize", "A", "--dry-run"], 2, "no rank is given"),
        (["resize", "A", "--rank", "0", "--dry-run"], 2, "--rank 0"),
        (["combine", "A", "B", "--energy", "1.5", "--dry-run"], 2, "--energy 1.5"),
        (["convert", "A", "--rank", "-1", "--dry-run"], 2, "--rank -1"),
        (["resize", "A", "--sv-ratio", "0.5", "--dry-run"], 2, "--sv-ratio 0.5"),
        (["resize", "A", "--energy", "1", "--sv-fro", "1", "--dry-run"], 2, "give one"),
        (["resize", "A", "--rank", "2", "--out", "A"], 2, "it is the input itself"),
        (["combine"], 2, "ADAPTER"),
    ],
)
def test_mistakes_have_an_exit_code_and_a_message(
    args: list[str],
    code: int,
    says: str,
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = [str(a) for a in pair]
    names = dict(zip("AB", here, strict=True))
    filled = [names.get(a, a.replace("A:", f"{here[0]}:")) for a in args]
    before = sorted(pair[0].parent.rglob("*"))
    assert run(filled) == code
    assert says in capsys.readouterr().err
    assert sorted(pair[0].parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("combine a a --method ties", "ties: needs --density, the share"),
        ("combine a a --density 0.5", "--density 0.5 has no effect"),
        ("combine a a --rank 0", "--rank 0: cannot be a rank"),
        ("combine a a --seed -1", "--seed -1: cannot be negative"),
        ("combine a a --svd-clamp 2", "--svd-clamp 2.0: it is a quantile"),
        ("combine a a --majority-sign-method x", "--majority-sign-method 'x': give"),
        ("combine a a --dtype int8", "float8_e4m3fn (fp8)"),
        ("resize a", "give --rank, --energy or another selector"),
        ("resize a --sv-ratio 2 --energy 0.5", "--energy and --sv-ratio: cannot both"),
        ("convert dora", "give --base"),
        ("diff dora a", "give --base"),
    ],
)
def test_errors_speak_of_options_and_not_of_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: str, said: str
) -> None:
    weights = {"fc.weight": np.eye(6, 5, dtype="float32")}
    for name in ("a", "dora"):
        config = LoraConfig(r=2, target_modules=["fc"], use_dora=name == "dora")
        PeftModel(weights).add("one", config).save(tmp_path / name)
    command, *rest = args.split()
    found = [str(tmp_path / word) if word in ("a", "dora") else word for word in rest]
    made = [] if command == "diff" else ["--dry-run"]
    assert run([command, *found, *made, "--json"]) in (2, 3)
    out, err = capsys.readouterr()
    assert said in err
    assert json.loads(out)["failure"]["message"] in err
    assert not re.search(r"\b\w+=", err)
