"""Spectra of adapters, and the pictures of inspections and comparisons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_any import cli, diff, inspect_adapter
from peft_any.adapter import Adapter
from peft_any.errors import BackendError, UsageError
from peft_any.io.safetensors import write_safetensors
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.surgery import pictures
from peft_any.surgery.pictures import draw, grid


def lora(seed: int, layers: int = 3, r: int = 4) -> Adapter:
    rng = np.random.default_rng(seed)
    names = [f"h.{i}.{name}" for i in range(layers) for name in ("q", "fc")] + ["head"]
    sites = {
        name: {
            "lora_A.weight": rng.standard_normal((r, 20)).astype("f4"),
            "lora_B.weight": rng.standard_normal((30, r)).astype("f4"),
        }
        for name in names
    }
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q", "fc", "head"])
    return Adapter(config, sites)


def test_spectra_are_those_of_the_products() -> None:
    adapter = lora(0)
    found = inspect_adapter(adapter, spectra=True)
    for site in found.sites:
        p = adapter.sites[site.name]
        delta = 2.0 * p["lora_B.weight"].astype("f8") @ p["lora_A.weight"]
        want = np.linalg.svd(delta, compute_uv=False)[:4]
        np.testing.assert_allclose(site.spectrum, want, rtol=1e-9)
        shares = want / want.sum()
        assert site.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
        held = np.cumsum(want**2) / np.sum(want**2)
        assert site.rank_for(0.9) == int(np.argmax(held >= 0.9)) + 1
    entry = found.to_dict()["sites"][0]
    assert entry["rank_for"]["0.99"] == found.sites[0].rank_for(0.99)
    assert entry["spectrum"] == [*found.sites[0].spectrum]


def test_without_asking_there_are_none() -> None:
    found = inspect_adapter(lora(0))
    assert found.sites[0].spectrum == ()
    assert (found.sites[0].effective_rank, found.sites[0].rank_for(0.9)) == (None, None)
    assert "effective_rank" not in found.to_dict()["sites"][0]


def test_methods_that_read_the_base_have_none() -> None:
    config = IA3Config(target_modules=["fc"], feedforward_modules=[])
    adapter = Adapter(config, {"fc": {"ia3_l": np.ones((3, 1))}})
    assert inspect_adapter(adapter, spectra=True).sites[0].spectrum == ()


def test_a_spectrum_of_zeros() -> None:
    adapter = lora(0)
    zero = {n: p | {"lora_B.weight": np.zeros((30, 4))} for n, p in adapter.sites.items()}
    site = inspect_adapter(adapter.replace(sites=zero), spectra=True).sites[0]
    assert (site.effective_rank, site.rank_for(0.9)) == (None, 0)


def test_layers_are_arranged_by_kind_and_number() -> None:
    values = {"a.10.q": 1.0, "a.2.q": 2.0, "a.2.k.0": None, "norm": 4.0}
    rows, columns, table = grid(values)
    assert rows == ["a.*.q", "a.*.k.0", "norm"]
    assert columns == ["2", "10"]
    want = [[2, 1], [np.nan, np.nan], [4, np.nan]]
    np.testing.assert_array_equal(table, want)


class TestWithMatplotlib:
    @pytest.fixture(autouse=True)
    def matplotlib(self) -> Any:
        return pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

    def drawn(self, found: Any, folder: Path) -> np.ndarray:
        """Draw twice, to the same bytes, and read the picture."""
        import matplotlib.image

        one, two = folder / "one.png", folder / "two.png"
        draw(found, one, overwrite=True)
        draw(found, two, overwrite=True)
        assert one.read_bytes() == two.read_bytes()
        return np.asarray(matplotlib.image.imread(one))

    @pytest.mark.parametrize("spectra", [False, True])
    def test_an_inspection(self, tmp_path: Path, spectra: bool) -> None:
        picture = self.drawn(inspect_adapter(lora(0), spectra=spectra), tmp_path)
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50

    def test_two_adapters(self, tmp_path: Path) -> None:
        same = self.drawn(diff(lora(0), lora(0)), tmp_path)
        other = self.drawn(diff(lora(0), lora(1)), tmp_path)
        assert same.shape == other.shape
        assert np.any(same != other)

    def test_two_checkpoints(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        base = {f"h.{i}.q.weight": rng.standard_normal((6, 5)) for i in range(30)}
        made = {k: v * (1 + 10.0 ** -(i % 5)) for i, (k, v) in enumerate(base.items())}
        for name, tensors in (("a", base), ("b", made)):
            write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        self.drawn(diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors"), tmp_path)

    def test_many_layers_of_high_rank(self, tmp_path: Path) -> None:
        self.drawn(inspect_adapter(lora(0, layers=60, r=20), spectra=True), tmp_path)

    def test_nothing_to_draw(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_safetensors(tmp_path / "a.safetensors", {"w": np.ones(3)})
        same = diff(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
        with pytest.raises(UsageError, match="there is no layer with a number"):
            draw(same, tmp_path / "x.png")
        with pytest.raises(UsageError, match=r"end the name in \.png"):
            draw(inspect_adapter(lora(0)), tmp_path / "x.svg")
        assert not (tmp_path / "x.png").exists()
        same_files = [str(tmp_path / "a.safetensors")] * 2
        assert cli.run(["diff", *same_files, "--plot", str(tmp_path / "x.png")]) == 0
        out, err = capsys.readouterr()
        assert out == "1 identical\n"
        assert "x.png: cannot be drawn: there is no layer with a number" in err
        assert not (tmp_path / "x.png").exists()

    def test_commands(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lora(0).save(tmp_path / "a")
        lora(1).save(tmp_path / "b")
        one, two = tmp_path / "i.png", tmp_path / "d.png"
        assert cli.run(["inspect", str(tmp_path / "a"), "--plot", str(one)]) == 0
        assert cli.run(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(two)]) == 0
        assert one.read_bytes()[:4] == two.read_bytes()[:4] == b"\x89PNG"
        assert "holds 99 %" in capsys.readouterr().out

    @pytest.mark.parametrize("command", [["inspect", "a"], ["diff", "a", "b"]])
    def test_commands_replace_no_picture_unasked(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for i, name in enumerate("ab"):
            lora(i).save(tmp_path / name)
        kept = tmp_path / "kept.png"
        kept.write_bytes(b"mine")
        asked = [command[0], *(str(tmp_path / name) for name in command[1:]), "--plot", str(kept)]
        assert cli.run(asked) == 5
        assert "overwrite" in capsys.readouterr().err
        assert kept.read_bytes() == b"mine"
        assert cli.run([*asked, "--overwrite"]) == 0
        assert kept.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"pip install peft_any\[plot\]"):
        draw(inspect_adapter(lora(0)), tmp_path / "x.png")


def test_inspecting_loads_no_matplotlib() -> None:
    import subprocess

    code = "import sys, peft_any.surgery.pictures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
