"""The demo: on every library the same results as Hugging Face PEFT's, and an error if not."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from peft_any import cli, demo
from peft_any.errors import BackendError, VerifyError
from peft_any.io.safetensors import read_safetensors, write_safetensors
from tests.conftest import missing


@pytest.mark.parametrize("library", ["numpy", "strict", "torch", "jax", "dask", "cupy"])
def test_the_demo_runs_on_every_library(library: str) -> None:
    if reason := missing(library):
        pytest.skip(reason)
    lines: list[str] = []
    receipt = demo.run(lines.append, library)
    text = "\n".join(lines)
    assert f"on {library}" in text
    for step in ("called", "merged", "compared", "unmerged", "saved", "audited"):
        assert f"\n{step} " in text
    assert receipt.kept == pytest.approx(1, abs=1e-6)
    assert len(receipt.changes) == 4


def test_the_command_prints_it_with_the_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert cli.run(["demo", "--backend", "numpy"]) == 0
    assert time.perf_counter() - start < 5
    out, err = capsys.readouterr()
    assert err == ""
    assert "Hugging Face PEFT's own merge" in out
    assert "4 tensors merged, 6 copied" in out
    assert cli.run(["demo", "--backend", "numpy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 6


def test_a_library_without_values_or_unknown_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(BackendError):
        demo.run(backend="frobnicate")
    assert cli.run(["demo", "--backend", "frobnicate"]) == 3
    assert "frobnicate" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the demo take its files from a copy, which may be spoiled."""
    shutil.copytree(demo.FILES, tmp_path / "files")
    monkeypatch.setattr(demo, "FILES", tmp_path / "files")
    return tmp_path / "files"


def respoil(path: Path, name: str, factor: float) -> None:
    tensors = {k: v.copy() for k, v in read_safetensors(path).items()}
    tensors[name] *= np.asarray(factor, tensors[name].dtype)
    write_safetensors(path, tensors, overwrite=True)


def test_another_merge_than_ours_fails_verification(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    respoil(files / "merged.safetensors", "net.4.weight", 1.001)
    assert cli.run(["demo", "--backend", "numpy"]) == 4
    out, err = capsys.readouterr()
    assert "net.4.weight" in err
    assert out == ""


def test_an_adapter_that_does_not_help_fails(files: Path) -> None:
    respoil(files / "flights.safetensors", "nn_xlarge", -1.0)
    with pytest.raises(VerifyError, match="nn-xlarge"):
        demo.run(lambda _: None, "numpy")


def test_an_adapter_that_is_saved_otherwise_fails(files: Path) -> None:
    config = files / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    with pytest.raises(VerifyError, match=r"adapter_config\.json"):
        demo.run(lambda _: None, "numpy")
