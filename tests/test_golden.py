"""Law 7: merged weights, outputs and files equal those recorded from Hugging Face PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from peft_any.adapter import Adapter
from peft_any.checks import OURS
from peft_any.errors import ConfigError
from peft_any.layer import linear
from peft_any.model import PeftModel
from peft_any.testing import Lib
from tests.cases import ATTENDED, CASES, PROMPTS, ROUTED, AttendedCase, Case, PromptCase, RoutedCase

HERE = Path(__file__).parent / "golden"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ROWS: dict[str, Any] = {case.name: case for case in [*CASES, *PROMPTS, *ROUTED, *ATTENDED]}
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

    @property
    def tolerance(self) -> float:
        return TOLERANCE["float32" if self.case.single else self.dtype]

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


def having(form: str, kind: type = Case) -> list[str]:
    found = [name for name in NAMES if type(ROWS.get(name.partition("@")[0])) is kind]
    return [name for name in found if golden(name).has(form)]


whole = pytest.mark.parametrize("name", having(""))
unconverted = pytest.mark.parametrize("name", having("raw/"))
prompts = pytest.mark.parametrize("name", having("", PromptCase))
routed = pytest.mark.parametrize("name", having("", RoutedCase))
adapted = pytest.mark.parametrize("name", [*having(""), *having("", RoutedCase)])
attended = pytest.mark.parametrize("name", having("", AttendedCase))
files = pytest.mark.parametrize(
    "name",
    [*having(""), *having("", PromptCase), *having("", RoutedCase), *having("", AttendedCase)],
)


def compare(got: Mapping[str, Any], want: Mapping[str, Any], rtol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].shape == value.shape, key
        size = float(np.max(np.abs(value)))
        np.testing.assert_allclose(got[key], value, rtol=0, atol=rtol * size, err_msg=key)


def test_every_row_that_hf_has_is_recorded_and_no_other() -> None:
    recorded = {name.partition("@")[0] for name in NAMES}
    assert recorded == {
        case.name for case in [*CASES, *PROMPTS, *ROUTED, *ATTENDED] if case.hf is None
    }


def test_every_method_is_recorded_in_float64_too() -> None:
    methods = {case.config.peft_type for case in [*CASES, *ROUTED] if case.hf is None}
    double = {golden(n).case.config.peft_type for n in NAMES if n.endswith("@float64")}
    assert double == methods


@whole
def test_merging_and_applying_give_hfs_weights_and_output(
    name: str, lib: Lib, tmp_path: Path
) -> None:
    gold = golden(name)
    if reason := lib.lacks(gold.case.config.needs):
        pytest.skip(reason)
    adapter = Adapter.load(gold.write(tmp_path / "a"))

    def adapt(weights: Any, sites: Any, shared: Any, x: Any) -> Any:
        model = PeftModel(weights)
        model.add("a", adapter.replace(sites=sites, shared=shared))
        layer = model.bind().layers[gold.case.site.name]
        return model.merge(), None if x is None else layer(x)

    given = gold.part("base"), dict(adapter.sites), dict(adapter.shared), gold.tensors.get("x")
    merged, y = lib.call(adapt, *given)
    want = gold.part("merged")
    assert merged.keys() == want.keys()
    for key, value in want.items():
        lib.check(merged[key], value, rtol=gold.tolerance)
    if y is not None:
        lib.check(y, gold.tensors["y"], rtol=gold.tolerance)


@routed
def test_applying_gives_hfs_output(name: str, lib: Lib, tmp_path: Path) -> None:
    gold = golden(name)
    adapter, site = Adapter.load(gold.write(tmp_path / "a")), gold.case.site.name

    def adapt(weights: Any, sites: Any, x: Any) -> Any:
        model = PeftModel(weights)
        model.add("a", adapter.replace(sites=sites))
        return model.routed(**gold.case.routing).bind().layers[site](x)

    y = lib.call(adapt, gold.part("base"), dict(adapter.sites), gold.tensors["x"])
    lib.check(y, gold.tensors["y"], rtol=gold.tolerance)


def last_block(adapter: Adapter, gold: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Give the last block's prompts, and a function of them and the recorded arrays."""
    config: Any = adapter.config
    (name,) = [name for name in adapter.sites if ".2." in name]

    def apply(p: Any, g: Any) -> Any:
        def proj(side: str) -> Any:
            return lambda x: linear(x, g[side], g.get(f"{side}_bias"))

        term = config.attend(p, g["q"], proj("k"), proj("v"))
        return g["y0"] + (linear(term, g["o"]) if "o" in g else term)

    return dict(adapter.sites[name]), apply


@attended
def test_attention_gains_what_it_does_in_hf(name: str, lib: Lib, tmp_path: Path) -> None:
    gold = golden(name)
    adapter = Adapter.load(gold.write(tmp_path / "a"))
    arrays = {k: v for k, v in gold.tensors.items() if k != TENSORS}
    p, apply = last_block(adapter, arrays)
    assert np.max(np.abs(arrays["y"] - arrays["y0"])) > 0.1
    lib.check(lib.call(apply, p, arrays), arrays["y"], rtol=TOLERANCE["float32"])
    shapes = gold.case.config.shapes(gold.case.width)
    assert all({k: v.shape for k, v in q.items()} == shapes for q in adapter.sites.values())


@files
def test_a_loaded_adapter_is_saved_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = golden(name).write(tmp_path / "a")
    Adapter.load(source).save(tmp_path / "b")
    for file in (TENSORS, CONFIG):
        assert (tmp_path / "b" / file).read_bytes() == (source / file).read_bytes()


@adapted
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
    own = {"auto_mapping", config.begun}
    assert {k: hf.get(k, "absent") for k in fields if k not in own} == {
        k: v for k, v in fields.items() if k not in own
    }
    assert not config.begun or fields[config.begun] == OURS


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
    adapter = Adapter.load(gold.write(tmp_path / "a", "raw/"))
    model.add("a", adapter, rederive=True).save(tmp_path / "b")
    again = PeftModel(gold.part("base"))
    again.add("a", Adapter.load(tmp_path / "b"))
    compare(again.merge(), gold.part("merged"), TOLERANCE[gold.dtype])


@prompts
def test_virtual_tokens_lie_where_hf_puts_them(name: str, lib: Lib, tmp_path: Path) -> None:
    gold = golden(name)
    adapter = Adapter.load(gold.write(tmp_path / "a"))
    config: Any = adapter.config
    if "prompt" in gold.tensors:
        want = gold.tensors["prompt"]
        count, d = config.num_virtual_tokens, config.token_dim
        embeds = np.ones((2, 3, d), dtype="float32")
        tasks = {"task_ids": [config.num_tasks - 1, 0]} if hasattr(config, "num_tasks") else {}

        def prepend(p: Any, x: Any) -> Any:
            return [config.prepend(p, x, i, **tasks) for i in range(want.shape[1] // count)]

        longer = lib.call(prepend, dict(adapter.shared), embeds)
        for i, got in enumerate(longer):
            rows = want[:, i * count : (i + 1) * count]
            # What HF's nets and products give, it computes once for the file and once more here.
            rtol = 0.0 if config.peft_type == "PROMPT_TUNING" else TOLERANCE["float32"]
            lib.check(got, np.concatenate([rows, embeds], axis=1), rtol=rtol)
        return

    def key_values(p: Any) -> Any:
        return config.key_values(p, 2)

    pairs = lib.call(key_values, dict(adapter.shared))
    assert len(pairs) == len(gold.part("key"))
    for i, (key, value) in enumerate(pairs):
        lib.check(key, gold.tensors[f"key.{i}"], rtol=0.0)
        lib.check(value, gold.tensors[f"value.{i}"], rtol=0.0)


@prompts
def test_a_fresh_prompt_has_hfs_key_shape_and_fields(name: str, tmp_path: Path) -> None:
    gold = golden(name)
    hf = json.loads(gold.texts[CONFIG])
    theirs = safetensors.numpy.load(gold.tensors[TENSORS].tobytes())
    assert {k: v.shape for k, v in theirs.items()} == gold.case.config.shapes()
    source = Adapter.load(gold.write(tmp_path / "a"))
    Adapter(gold.case.config, shared=source.shared).save(tmp_path / "b")
    assert (tmp_path / "b" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()
    fields = json.loads((tmp_path / "b" / CONFIG).read_text())
    said = {k: v for k, v in fields.items() if v is not None}  # HF fills the rest from its model
    assert {k: hf.get(k, "absent") for k in said} == said
