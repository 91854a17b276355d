"""Law 7: merged weights, outputs and files equal those recorded from Hugging Face PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from peft_any.adapter import Adapter
from peft_any.errors import ConfigError
from peft_any.model import PeftModel
from tests.cases import CASES, Case
from tests.conftest import Lib

HERE = Path(__file__).parent / "golden"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ROWS = {case.name: case for case in CASES}
NAMES = sorted(path.stem for path in HERE.glob("*.safetensors"))
REDERIVED = ("pissa", "olora")


@dataclass(frozen=True)
class Golden:
    """One recorded row."""

    case: Case
    tensors: dict[str, np.ndarray]
    texts: dict[str, str]

    @property
    def dtype(self) -> str:
        return str(self.tensors[f"base.{self.case.site.weight}"].dtype)

    def part(self, name: str) -> dict[str, np.ndarray]:
        start = f"{name}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def has(self, form: str) -> bool:
        return form + TENSORS in self.tensors

    def write(self, folder: Path, form: str = "") -> Path:
        """Put the adapter's two files where they can be loaded."""
        folder.mkdir()
        (folder / TENSORS).write_bytes(self.tensors[form + TENSORS].tobytes())
        (folder / CONFIG).write_text(self.texts[form + CONFIG], encoding="utf-8")
        return folder


@cache
def golden(name: str) -> Golden:
    path = HERE / f"{name}.safetensors"
    with safetensors.safe_open(path, "np") as file:
        texts = file.metadata()
    return Golden(ROWS[name.partition("@")[0]], safetensors.numpy.load_file(path), texts)


def having(form: str) -> list[str]:
    return [name for name in NAMES if name.partition("@")[0] in ROWS and golden(name).has(form)]


whole = pytest.mark.parametrize("name", having(""))
unconverted = pytest.mark.parametrize("name", having("raw/"))


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray], rtol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].shape == value.shape, key
        size = float(np.max(np.abs(value)))
        np.testing.assert_allclose(got[key], value, rtol=0, atol=rtol * size, err_msg=key)


def test_every_row_that_hf_has_is_recorded_and_no_other() -> None:
    recorded = {name.partition("@")[0] for name in NAMES}
    assert recorded == {case.name for case in CASES if case.hf is None}


def test_every_method_is_recorded_in_float64_too() -> None:
    methods = {case.config.peft_type for case in CASES if case.hf is None}
    double = {golden(n).case.config.peft_type for n in NAMES if n.endswith("@float64")}
    assert double == methods


@whole
def test_merging_gives_hfs_weights(name: str, lib: Lib, tmp_path: Path) -> None:
    gold = golden(name)
    if reason := lib.lacks(gold.case.config.needs):
        pytest.skip(reason)
    adapter = Adapter.load(gold.write(tmp_path / "a"))

    def merged(weights: Any, sites: Any, shared: Any) -> Any:
        model = PeftModel(weights)
        model.add("a", adapter.replace(sites=sites, shared=shared))
        return model.merge()

    got = lib.call(merged, gold.part("base"), dict(adapter.sites), dict(adapter.shared))
    want = gold.part("merged")
    assert got.keys() == want.keys()
    for key, value in want.items():
        lib.check(got[key], value, rtol=TOLERANCE[gold.dtype])


@pytest.mark.parametrize("name", [name for name in having("") if "x" in golden(name).tensors])
def test_the_adapted_layer_gives_hfs_output(name: str, lib: Lib, tmp_path: Path) -> None:
    gold = golden(name)
    if reason := lib.lacks(gold.case.config.needs):
        pytest.skip(reason)
    adapter = Adapter.load(gold.write(tmp_path / "a"))

    def output(weights: Any, sites: Any, shared: Any, x: Any) -> Any:
        model = PeftModel(weights)
        model.add("a", adapter.replace(sites=sites, shared=shared))
        return model.bind().layers[gold.case.site.name](x)

    x = gold.tensors["x"]
    y = lib.call(output, gold.part("base"), dict(adapter.sites), dict(adapter.shared), x)
    lib.check(y, gold.tensors["y"], rtol=TOLERANCE[gold.dtype])


@whole
def test_a_loaded_adapter_is_saved_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = golden(name).write(tmp_path / "a")
    Adapter.load(source).save(tmp_path / "b")
    for file in (TENSORS, CONFIG):
        assert (tmp_path / "b" / file).read_bytes() == (source / file).read_bytes()


@whole
def test_a_fresh_adapter_has_hfs_keys_shapes_and_fields(name: str, tmp_path: Path) -> None:
    gold = golden(name)
    model = PeftModel(gold.part("base"), kinds={gold.case.site.name: gold.case.site})
    hf = json.loads(gold.texts[CONFIG])
    config = replace(gold.case.config, target_modules=hf["target_modules"])
    model.add("a", config, dtype=gold.dtype).save(tmp_path / "a")
    ours = safetensors.numpy.load_file(tmp_path / "a" / TENSORS)
    theirs = safetensors.numpy.load(gold.tensors[TENSORS].tobytes())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert {k: hf.get(k, "absent") for k in fields if k != "auto_mapping"} == {
        k: v for k, v in fields.items() if k != "auto_mapping"
    }


@unconverted
def test_an_unconverted_file_is_redone_where_it_can_be(name: str, tmp_path: Path) -> None:
    gold = golden(name)
    source = gold.write(tmp_path / "a", "raw/")
    if gold.case.config.init_lora_weights not in REDERIVED:
        with pytest.raises(ConfigError, match="weight_conversion"):
            Adapter.load(source)
        return
    adapter = Adapter.load(source)
    model = PeftModel(gold.part("base"))
    model.add("a", adapter, rederive=True)
    compare(model.merge(), gold.part("merged"), TOLERANCE[gold.dtype])
    y = model.bind().layers[gold.case.site.name](gold.tensors["x"])
    compare({"y": y}, {"y": gold.tensors["y"]}, TOLERANCE[gold.dtype])
    plain = PeftModel(gold.part("base"))
    with pytest.raises(ConfigError, match="rederive"):
        (plain.add("a", adapter), plain.merge())


@unconverted
def test_a_converted_file_needs_no_second_look_at_the_base(name: str, tmp_path: Path) -> None:
    """What HF's own conversion would be, made by us: also of DoRA, whose magnitudes HF drops."""
    gold = golden(name)
    if gold.case.config.init_lora_weights not in REDERIVED:
        pytest.skip("a random decomposition cannot be repeated")
    model = PeftModel(gold.part("base"))
    model.add("a", Adapter.load(gold.write(tmp_path / "a", "raw/")), rederive=True).save(tmp_path / "b")
    again = PeftModel(gold.part("base"))
    again.add("a", Adapter.load(tmp_path / "b"))
    compare(again.merge(), gold.part("merged"), TOLERANCE[gold.dtype])
