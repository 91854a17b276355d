"""Methods that make virtual tokens: on every library, in files, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from peft_any import Adapter, ConfigError, PeftModel, ShapeError
from peft_any.backend import resolve
from peft_any.methods.prefix_tuning import PrefixTuningConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.prompts import extend_mask
from peft_any.rng import Fresh
from tests.cases import PROMPTS, PromptCase
from tests.conftest import Lib

table = pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case.name)
SIZES = {"num_layers": 3, "token_dim": 6, "num_attention_heads": 2}


def drawn(case: PromptCase) -> dict[str, np.ndarray]:
    """Draw a row's table, whatever its initial values would need."""
    rng = np.random.default_rng(3)
    return {k: rng.standard_normal(s).astype("float32") for k, s in case.config.shapes().items()}


@table
def test_files_round_trip(case: PromptCase, tmp_path) -> None:
    Adapter(case.config, {}, drawn(case)).save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.config.peft_type == case.config.peft_type
    assert loaded.config.num_virtual_tokens == case.config.num_virtual_tokens
    np.testing.assert_array_equal(loaded.shared["prompt_embeddings"], *drawn(case).values())
    loaded.save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@table
def test_every_library_gives_numpys_numbers(case: PromptCase, lib: Lib) -> None:
    config, p = case.config, drawn(case)
    if isinstance(config, PromptTuningConfig):
        x = np.ones((2, 4, config.token_dim), dtype="float32")
        want = config.prepend(p, x)
        assert want.shape == (2, 4 + config.num_virtual_tokens, config.token_dim)
        np.testing.assert_array_equal(want[:, config.num_virtual_tokens :], x)
        lib.check(lib.call(config.prepend, p, x), want, rtol=0)
        return
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    k = np.ones((2, heads, 4, width), dtype="float32")
    for layer in range(config.num_layers):
        want = config.concat_to_kv(p, k, 2 * k, layer)
        got = lib.call(lambda p, k, i=layer: config.concat_to_kv(p, k, 2 * k, i), p, k)
        for one, other in zip(got, want, strict=True):
            lib.check(one, other, rtol=0)
    pairs = config.key_values(p, batch=2)
    assert len(pairs) == config.num_layers
    assert pairs[0][0].shape == (2, heads, config.num_virtual_tokens, width)


def test_one_seed_draws_the_same_prompt_everywhere(lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    for config in (
        PromptTuningConfig(num_virtual_tokens=3, token_dim=5),
        PrefixTuningConfig(num_virtual_tokens=3, **SIZES),
    ):
        want = config.init(Fresh(4, resolve("numpy")))["prompt_embeddings"]
        lib.check(config.init(Fresh(4, lib.backend))["prompt_embeddings"], want, rtol=0)


def test_a_models_prompt_is_in_its_shared_arrays() -> None:
    weights = {"wte.weight": np.zeros((7, 5), dtype="float32")}
    model = PeftModel(weights)
    adapter = model.add("p", PromptTuningConfig(num_virtual_tokens=3, token_dim=5))
    assert model.parameters.trainable == 15
    assert model.touched == []
    assert model.merge()["wte.weight"] is weights["wte.weight"]
    x = np.zeros((1, 2, 5), dtype="float32")
    assert adapter.config.prepend(adapter.shared, x).shape == (1, 5, 5)


def test_projection_makes_the_table_that_is_saved(tmp_path) -> None:
    config = PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=9, **SIZES
    )
    model = PeftModel({"wte.weight": np.zeros((7, 6), dtype="float32")})
    net = model.add("p", config).shared
    assert model.parameters.trainable == 4 * 6 + 9 * (6 + 1) + 36 * (9 + 1)
    model["p"].save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a")
    table = loaded.shared["prompt_embeddings"]
    assert loaded.config.prefix_projection
    assert loaded.num_parameters == table.size
    assert table.shape == config.shapes()["prompt_embeddings"] == (4, 36)
    for one, other in zip(config.key_values(net), config.key_values(loaded.shared), strict=True):
        np.testing.assert_array_equal(one, other)
    hidden = np.tanh(
        net["embedding.weight"] @ net["transform.0.weight"].T + net["transform.0.bias"]
    )
    want = hidden @ net["transform.2.weight"].T + net["transform.2.bias"]
    np.testing.assert_allclose(table, want, atol=1e-6)


def test_vocabulary_rows_start_a_prompt() -> None:
    rows = np.arange(35, dtype="float32").reshape(7, 5)
    config = PromptTuningConfig(
        num_virtual_tokens=3, token_dim=5, prompt_tuning_init="SAMPLE_VOCAB"
    )
    got = config.layer(weight=rows, seed=1).params["prompt_embeddings"]
    assert all(any(np.array_equal(row, r) for r in rows) for row in got)
    text = PromptTuningConfig(
        num_virtual_tokens=3,
        token_dim=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a b",
        tokenizer_name_or_path="x",
    )
    got = text.layer(weight=rows, tokens=[4, 1]).params["prompt_embeddings"]
    np.testing.assert_array_equal(got, rows[[4, 1, 4]])
    with pytest.raises(ConfigError, match="tokenizer"):
        text.layer(weight=rows)
    with pytest.raises(ConfigError, match="base weight"):
        config.layer()
    with pytest.raises(ConfigError, match="from 0 to 6"):
        text.layer(weight=rows, tokens=[9])
    with pytest.raises(ShapeError, match="width 4"):
        config.layer(weight=rows[:, :4])


@pytest.mark.parametrize(
    ("config", "x", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=2, token_dim=5), (1, 3, 4), "embed the tokens"),
        (PromptTuningConfig(num_virtual_tokens=2, token_dim=5), (5,), "embed the tokens"),
        (PrefixTuningConfig(num_virtual_tokens=2, **SIZES), (1, 3, 4, 3), "cannot follow"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(config, x, message) -> None:
    layer, given = config.layer(), np.zeros(x, dtype="float32")
    prompt = isinstance(config, PromptTuningConfig)
    with pytest.raises(ShapeError, match=message):
        layer.prepend(given) if prompt else layer.concat_to_kv(given, given)


def test_wrong_submodules_and_layers_are_refused() -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=2, token_dim=5).layer()
    with pytest.raises(ShapeError, match="submodule 1"):
        prompt.prepend(np.zeros((3, 5)), submodule=1)
    prefix = PrefixTuningConfig(num_virtual_tokens=2, **SIZES).layer()
    with pytest.raises(ShapeError, match="layer 3"):
        prefix.concat_to_kv(np.zeros((2, 1, 3)), np.zeros((2, 1, 3)), layer=3)


def test_configurations_without_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens=None"):
        PromptTuningConfig(token_dim=5).layer()
    with pytest.raises(ConfigError, match="unknown"):
        PromptTuningConfig(prompt_tuning_init="BEST")


def test_masks_grow_by_ones(lib: Lib) -> None:
    mask = np.asarray([[1, 0]])
    lib.check(extend_mask(lib.array(mask), 2), np.asarray([[1, 1, 1, 0]]), rtol=0)
    assert extend_mask(np.asarray([True, False]), 1).tolist() == [True, True, False]
    assert extend_mask(np.asarray([5]), 1, -100).tolist() == [-100, 5]
