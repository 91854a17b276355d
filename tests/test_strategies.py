"""The strategies give what they say, for methods and files of every sort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from peft_any import Adapter, IA3Config, LoraConfig, OFTConfig, PeftError, PeftModel
from peft_any.layer import KINDS
from peft_any.layout import layout
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.methods.vera import VeraConfig
from peft_any.testing import strategies as any_of
from peft_any.testing.closeness import gap, rounding

CONFIGS = [
    LoraConfig(r=2),
    LoraConfig(r=2, use_dora=True, init_lora_weights=False),
    IA3Config(feedforward_modules=[]),
    VeraConfig(r=3, projection_prng_key=1),
]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.peft_type}-{c.where}")


@given(any_of.sites())
def test_layers_are_of_every_kind(site: Any) -> None:
    assert site.kind in KINDS
    assert site.width >= 1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_can_be_found(kind: Any) -> None:
    site = find(any_of.sites(), lambda site: site.kind == kind)
    base = find(any_of.bases(site), lambda base: True)
    assert base.stored().shape == site.stored_shape


def test_layers_are_such_as_a_method_accepts() -> None:
    blocks = OFTConfig(oft_block_size=4)
    fours = st.integers(1, 3).map(lambda k: 4 * k)

    @given(any_of.sites(blocks, kinds=["Linear"], sizes=fours))
    def fits(site: Any) -> None:
        assert blocks.at(site).shapes(site)
        assert site.n_in % 4 == 0

    fits()


@given(any_of.layouts(kinds=["Linear", "Conv1D", "Embedding", "Conv2d"]), st.data())
def test_a_checkpoint_has_the_layers_drawn(sites: Any, data: st.DataObject) -> None:
    tensors = data.draw(any_of.checkpoints(sites, "float64"))
    assert {a.dtype.name for a in tensors.values()} == {"float64"}
    found = layout(tensors, {site.name: site for site in sites})
    assert [*found.values()] == sites


@each
@settings(max_examples=10)
@given(data=st.data())
def test_an_adapter_of_any_layers_acts_and_is_saved(
    config: Any, data: st.DataObject, tmp_path_factory: Any
) -> None:
    dtype = data.draw(any_of.dtypes)
    model: PeftModel = data.draw(any_of.models(config, dtype=dtype))
    adapter, merged = model["default"], model.merge()
    for name, p in adapter.sites.items():
        site = model.kinds[name]
        assert {k: v.dtype.name for k, v in p.items()} == dict.fromkeys(p, dtype)
        assert gap(merged[site.weight], model.weights[site.weight]) > 0
        x = np.ones((2, site.reads), dtype)
        if not site.is_conv and site.kind != "Embedding":
            got = PeftModel(merged, kinds=model.kinds).bind().layers[name](x)
            assert gap(model.bind().layers[name](x), got) <= 500 * rounding(dtype)
    folder = tmp_path_factory.mktemp("a")
    adapter.save(folder / "a")
    loaded = Adapter.load(folder / "a")
    assert loaded.num_parameters == adapter.num_parameters


@settings(max_examples=10)
@given(any_of.models(LoraConfig(r=2), trained=False))
def test_an_untrained_adapter_changes_nothing(model: PeftModel) -> None:
    for name, array in model.merge().items():
        np.testing.assert_array_equal(array, model.weights[name])


@settings(max_examples=5)
@given(any_of.adapters(PromptTuningConfig(num_virtual_tokens=2, token_dim=3)))
def test_a_prompt_is_an_adapter_too(adapter: Adapter) -> None:
    assert adapter.shared["prompt_embeddings"].shape == (2, 3)


@given(st.data())
def test_parameters_fit_their_layer(data: st.DataObject) -> None:
    config = LoraConfig(r=2, use_dora=True)
    site = data.draw(any_of.sites(config))
    base = data.draw(any_of.bases(site))
    p = data.draw(any_of.params(config, site, base=base, trained=False))
    assert {k: v.shape for k, v in p.items()} == config.at(site).shapes(site)
    assert gap(config.at(site).merge(p, base).weight, base.weight) <= 50 * rounding("float32")


def test_files_from_strangers_are_read_or_refused(tmp_path: Path) -> None:
    find(any_of.adapters(LoraConfig(r=2)), lambda made: True).save(tmp_path / "a")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    @settings(max_examples=100)
    @given(any_of.hostile_files(files))
    def read_or_refused(changed: tuple[str, bytes]) -> None:
        name, data = changed
        (tmp_path / "a" / name).write_bytes(data)
        try:
            Adapter.load(tmp_path / "a").check_finite()
        except PeftError as error:
            refused.append(str(error))
        else:
            read.append(name)
        (tmp_path / "a" / name).write_bytes(files[name])

    read: list[str] = []
    refused: list[str] = []
    read_or_refused()
    assert read
    assert refused
