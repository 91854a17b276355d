"""The commands over two checkpoints or two adapters, as a shell sees them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from peft_any import cli
from peft_any.io.safetensors import write_safetensors


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {f"{name}.weight": rng.standard_normal((12, 10)).astype("f4") for name in "ab"}
    made = {k: v + 0.1 * rng.standard_normal(v.shape).astype("f4") for k, v in base.items()}
    paths = tmp_path / "base.safetensors", tmp_path / "model.safetensors"
    for path, tensors in zip(paths, (base, made), strict=True):
        write_safetensors(path, tensors)
    return paths


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.run([str(a) for a in args])
    return code, *capsys.readouterr()


def test_extract(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    command = "extract", "--base", pair[0], "--model", pair[1]
    code, out, err = run(capsys, *command, "--rank", 2, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "2 layers with factors, 0 tensors whole, 0 equal, rank 2" in out
    assert f"→ {tmp_path / 'out'}" in out
    code, out, err = run(capsys, *command, "--rank", 2, "--json")
    document = json.loads(out)
    written = json.loads((tmp_path / "out" / "extract_receipt.json").read_text())
    assert (code, err, document["kind"]) == (0, "", "extract")
    assert document["layers"][0].keys() == written["layers"][0].keys()
    assert (document["kept"], document["out"]) == (written["kept"], {})
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "")
    assert "give --rank or --energy" in err
    code, out, err = run(capsys, *command, "--rank", 2, "--out", tmp_path / "out")
    assert (code, out) == (5, "")
    assert "it exists" in err
