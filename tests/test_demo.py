"""The demo: what it trains, and on every library the same results as Hugging Face PEFT's."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from peft_any import Adapter, PeftModel, cli, resolve
from peft_any.demo import run as demo
from peft_any.demo.airfoil import BACK, averaged, flights, network, with_mirror_images
from peft_any.demo.specialise import METHODS, specialise
from peft_any.errors import StorageError, UsageError, VerifyError
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.testing import missing


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


def test_the_command_trains_and_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--backend", "numpy"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "no wind-tunnel data" in out
    for name in METHODS:
        assert f"\n{name} " in out
    assert "Hugging Face PEFT's own merge" in out
    assert "4 tensors merged, 6 copied" in out
    assert "--out DIRECTORY keeps" in out


def test_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--backend", "numpy", "--json", "--steps", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    for row in found["rows"]:
        assert list(row) == ["method", "cl_mae", "cd_rel", "trainable", "seconds"]
    assert found["merged_equals_adapted"] is True
    assert (found["steps"], found["seed"], found["backend"]) == (2, 0, "numpy")
    assert found["receipt"]["copied"] == 6
    trainable = {row["method"]: row["trainable"] for row in found["rows"]}
    assert trainable["base"] == 0
    assert trainable["full"] == 27014
    assert trainable["lora"] == 8 * (25 + 64 + 3 * 128 + 64 + 198)


def test_lora_at_least_halves_the_error_over_three_seeds(tmp_path: Path) -> None:
    before, after = [], []
    for seed in range(3):
        found = specialise(
            resolve("numpy"), methods=["lora"], seed=seed, folder=tmp_path / f"{seed}"
        )
        base, lora = found.rows
        before.append(base.cl_mae)
        after.append(lora.cl_mae)
        assert lora.cd_rel < base.cd_rel
    assert np.mean(after) <= np.mean(before) / 2


@pytest.mark.parametrize("library", ["numpy", "strict", "torch", "dask", "cupy"])
def test_training_is_the_same_on_every_library(library: str) -> None:
    if reason := missing(library):
        pytest.skip(reason)
    want = demo.train("numpy", steps=3, methods=["head", "lora", "oft"])
    found = demo.train(library, steps=3, methods=["head", "lora", "oft"])
    for ours, theirs in zip(found["rows"], want["rows"], strict=True):
        assert ours["cl_mae"] == pytest.approx(theirs["cl_mae"], rel=1e-3)
        assert ours["cd_rel"] == pytest.approx(theirs["cd_rel"], rel=1e-3)


def test_jax_trains_too() -> None:
    if reason := missing("jax"):
        pytest.skip(reason)
    want, found = (demo.train(name, steps=2, methods=["lora"])["rows"] for name in ("numpy", "jax"))
    assert found[1]["cl_mae"] == pytest.approx(want[1]["cl_mae"], rel=1e-3)


def test_a_seed_gives_one_run() -> None:
    one, same, other = (demo.train("numpy", steps=2, methods=["bias"], seed=s) for s in (1, 1, 2))
    assert one["curves"] == same["curves"] != other["curves"]
    assert one["merged_equals_adapted"] is None


def test_adapters_and_figure_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    found = demo.train("numpy", steps=2, methods=["lora"], out=out)
    model = PeftModel(read_safetensors(demo.FILES / "nn-medium.safetensors"))
    model.add("lora", Adapter.load(out / "lora"))
    assert model.parameters.trainable == 5880
    if find_spec("matplotlib") is None:
        assert found["figure"] is None
    else:
        assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StorageError, match="already"):
        demo.train("numpy", steps=2, methods=["lora"], out=out)


def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--method", "lroa"]) == 2
    assert "'lora'" in capsys.readouterr().err
    assert cli.run(["demo", "--steps", "0"]) == 2
    with pytest.raises(UsageError, match="steps=0"):
        demo.train("numpy", steps=0)


def test_sections_keep_their_thickness_and_mirror_images_their_place() -> None:
    x = flights(4, np.random.default_rng(0))
    assert x.shape == (4, 25)
    recorded = read_safetensors(demo.FILES / "flights.safetensors")
    inputs = recorded["inputs"]
    mirrored = inputs[:, recorded["mirror_order"]] * recorded["mirror_sign"]
    np.testing.assert_array_equal(with_mirror_images(inputs)[len(inputs) :], mirrored)
    large = read_safetensors(demo.FILES / "nn-xlarge.safetensors")
    answers = averaged(network(large, with_mirror_images(inputs)), BACK)
    np.testing.assert_allclose(answers, recorded["nn_xlarge"], rtol=0, atol=2e-5)


def test_a_library_that_is_unknown_is_a_wrong_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError):
        demo.run(backend="frobnicate")
    assert cli.run(["demo", "--backend", "frobnicate"]) == 2
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
    assert cli.run(["demo", "--backend", "numpy", "--steps", "1", "--method", "bias"]) == 4
    out, err = capsys.readouterr()
    assert "net.4.weight" in err
    assert out == ""


def test_an_adapter_that_does_not_help_fails(files: Path) -> None:
    recorded = dict(read_safetensors(files / "flights.safetensors"))
    base = read_safetensors(files / "nn-medium.safetensors")
    recorded["nn_xlarge"] = averaged(network(base, with_mirror_images(recorded["inputs"])), BACK)
    write_safetensors(files / "flights.safetensors", recorded, overwrite=True)
    with pytest.raises(VerifyError, match="nn-xlarge"):
        demo.run(lambda _: None, "numpy")


def test_an_adapter_that_is_saved_otherwise_fails(files: Path) -> None:
    config = files / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    with pytest.raises(VerifyError, match=r"adapter_config\.json"):
        demo.run(lambda _: None, "numpy")
