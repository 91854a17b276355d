"""Methods that make virtual tokens: on every library, in files, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import Adapter, ConfigError, PeftModel, ShapeError, value_and_grad
from peft_any.backend import namespace, resolve, to_numpy
from peft_any.methods.cartridge import CartridgeConfig
from peft_any.methods.cpt import CPTConfig
from peft_any.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peft_any.methods.p_tuning import PromptEncoderConfig
from peft_any.methods.prefix_tuning import PrefixTuningConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.prompts import extend_mask
from peft_any.rng import Fresh
from peft_any.testing import Lib, descent, prompting
from peft_any.testing.gradients import ENGINES
from peft_any.testing.strategies import dtypes
from tests.cases import PROMPTS, PromptCase

table = pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case.name)
SIZES = {"num_layers": 3, "token_dim": 6, "num_attention_heads": 2}


UNLIKE = [c for c in PROMPTS if c.name in {"prompt", "prefix-projection", "p-tuning", "multitask"}]
UNLIKE += [c for c in PROMPTS if c.name in {"p-tuning-lstm", "cartridge", "cpt-types"}]
"""A row of each computation, to be differentiated on every engine."""
seeds = st.integers(0, 2**32)
short = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@table
def test_parameters_have_the_names_and_shapes_announced(case: PromptCase) -> None:
    prompting.announced(case)


@table
@given(seed=seeds, lead=short, dtype=dtypes)
def test_tokens_stand_before_the_input(case: PromptCase, seed: int, lead: Any, dtype: str) -> None:
    if hasattr(case.config, "num_tasks"):
        lead = lead[:1]  # one task for each input of (batch, tokens, d)
    prompting.in_front(case, seed, lead, dtype)


@table
@given(seed=seeds, dtype=dtypes)
def test_a_file_acts_as_what_was_trained(case: PromptCase, seed: int, dtype: str) -> None:
    prompting.portable(case, seed, dtype)


@table
def test_nothing_is_written_in_place_and_what_does_not_fit_is_refused(case: PromptCase) -> None:
    prompting.untouched(case)
    prompting.refusing(case)


@table
def test_files_round_trip(case: PromptCase, tmp_path) -> None:
    prompting.files(case, tmp_path)


@table
def test_every_library_gives_numpys_numbers(case: PromptCase, lib: Lib) -> None:
    # the prompts of several tasks are products
    prompting.libraries(case, lib, exact=not hasattr(case.config, "num_tasks"))


@table
def test_one_seed_draws_the_same_prompt_everywhere(case: PromptCase, lib: Lib) -> None:
    if not lib.has_values:
        pytest.skip("torch's meta device holds no numbers")
    prompting.seeds(case, lib)


@table
def test_gradients_are_finite_differences(case: PromptCase) -> None:
    descent.differences(prompting.of_prompt(case))


@pytest.mark.parametrize("case", UNLIKE, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(case: PromptCase, engine: str) -> None:
    descent.engines(prompting.of_prompt(case), engine)


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
    with pytest.raises(ConfigError, match='must be "RANDOM"'):
        PromptTuningConfig(prompt_tuning_init="BEST")


def test_masks_grow_by_ones(lib: Lib) -> None:
    mask = np.asarray([[1, 0]])
    lib.check(extend_mask(lib.array(mask), 2), np.asarray([[1, 1, 1, 0]]), rtol=0)
    assert extend_mask(np.asarray([True, False]), 1).tolist() == [True, True, False]
    assert extend_mask(np.asarray([5]), 1, -100).tolist() == [-100, 5]


def test_a_net_makes_the_table_that_is_saved(tmp_path) -> None:
    for kind in ("MLP", "LSTM"):
        sizes = {"encoder_reparameterization_type": kind, "encoder_hidden_size": 4}
        config = PromptEncoderConfig(num_virtual_tokens=3, token_dim=5, **sizes)
        model = PeftModel({"wte.weight": np.zeros((7, 5), dtype="float32")})
        net = model.add("p", config).shared
        assert "prompt_embeddings" not in net
        x = np.ones((2, 4, 5), dtype="float32")
        want = config.prepend(net, x)
        model["p"].save(tmp_path / kind)
        loaded = Adapter.load(tmp_path / kind)
        assert loaded.shared.keys() == {"prompt_embeddings"}
        np.testing.assert_array_equal(loaded.config.prepend(loaded.shared, x), want)
    thinned = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5}
    with pytest.raises(ConfigError, match="not thinned here"):
        PromptEncoderConfig(num_virtual_tokens=3, token_dim=5, **thinned).init(
            Fresh(0, resolve("numpy"))
        )
    for wrong in ({"encoder_reparameterization_type": "GRU"}, {"encoder_num_layers": 0}):
        with pytest.raises(ConfigError, match=r'must be ("MLP" or "LSTM"|at least 1)'):
            PromptEncoderConfig(**wrong)


def test_each_input_has_the_prompt_of_its_task() -> None:
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=3, token_dim=5, num_tasks=4, num_ranks=2
    )
    p = config.init(Fresh(0, resolve("numpy")))
    x = np.ones((2, 4, 5), dtype="float32")
    both = config.prepend(p, x, task_ids=[3, 1])
    for i, task in enumerate((3, 1)):
        np.testing.assert_array_equal(both[i], config.prepend(p, x, task_ids=[task])[i])
        turned = p["prefix_task_cols"][task] @ p["prefix_task_rows"][task]
        np.testing.assert_allclose(both[i, :3], p["prompt_embeddings"] * turned, rtol=1e-6)
    one = config.of_source(p, "EXACT_SOURCE_TASK", 2)
    np.testing.assert_array_equal(config.prompts(one, [0]), config.prompts(p, [2]))
    mean = config.of_source(p, "AVERAGE_SOURCE_TASKS")["prefix_task_cols"]
    np.testing.assert_allclose(mean[0], p["prefix_task_cols"].mean(axis=0))
    for wrong in ([4], []):
        with pytest.raises(ShapeError, match="numbered from 0"):
            config.prompts(p, wrong)
    with pytest.raises(ShapeError, match="one for each input"):
        config.prepend(p, x, task_ids=[0, 1, 2])
    with pytest.raises(ConfigError, match="cannot choose among 4 tasks: give it task_ids"):
        config.prepend(p, x)
    layer = config.layer()
    with pytest.raises(ConfigError, match="cannot choose among 4 tasks"):
        layer.prepend(x)
    assert layer.prepend(x, task_ids=[2]).shape == (2, 7, 5)
    only = replace(config, num_tasks=1).layer()
    np.testing.assert_array_equal(only.prepend(x), only.prepend(x, task_ids=[0]))
    with pytest.raises(ConfigError, match="a task from 0 to 3"):
        config.of_source(p, "EXACT_SOURCE_TASK", 4)


def test_a_cache_becomes_a_cartridge_whose_first_tokens_stay() -> None:
    config = CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=2, **SIZES)
    rng = np.random.default_rng(0)
    cache = [tuple(rng.standard_normal((1, 2, 5, 3)) for _ in "kv") for _ in range(3)]
    p = config.of_cache(cache)
    for (k, v), (want_k, want_v) in zip(config.key_values(p), cache, strict=True):
        np.testing.assert_array_equal(k, want_k[:, :, :3])
        np.testing.assert_array_equal(v, want_v[:, :, :3])

    def loss(p):
        return sum(namespace(k).sum(k * k) for pair in config.key_values(p) for k in pair)

    _, grads = value_and_grad(loss)(p)
    assert not np.any(grads["prompt_embeddings"][:2])
    np.testing.assert_allclose(grads["prompt_embeddings"][2], 2 * p["prompt_embeddings"][2])
    for wrong in (cache[:2], [(k[:, :, :2], v) for k, v in cache]):
        with pytest.raises(ShapeError, match="a cache of shapes"):
            config.of_cache(wrong)
    with pytest.raises(ConfigError, match="cannot be frozen"):
        CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=4)


CPT = CPTConfig(
    cpt_token_ids=[3, 1, 4],
    cpt_tokens_type_mask=[1, 2, 4],
    opt_projection_epsilon=3.0,
    token_dim=6,
    task_type="CAUSAL_LM",
)


def test_tokens_of_examples_are_trained_near_where_they_are(lib: Lib, tmp_path) -> None:
    table = np.random.default_rng(0).standard_normal((7, 6)).astype("float32")
    model = PeftModel({"wte.weight": table})
    p = model.add("p", CPT).shared
    assert model.parameters.trainable == 18
    np.testing.assert_array_equal(p["embedding.weight"], table[[3, 1, 4]])
    np.testing.assert_array_equal(CPT.portable(p)["prompt_embeddings"], table[[3, 1, 4]])
    p["delta_embedding.weight"] = np.ones((3, 6), dtype="float32")
    got = CPT.settled(p)["delta_embedding.weight"]
    bounds = np.asarray([0.1, 3.0, 0.0]) * (6 / 2048) ** 0.5
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), bounds, rtol=1e-6)
    lib.check(lib.call(CPT.portable, p)["prompt_embeddings"], got + table[[3, 1, 4]], rtol=1e-6)
    _, grads = value_and_grad(
        lambda p: namespace(*p.values()).sum(CPT.portable(p)["prompt_embeddings"])
    )(p)
    assert not np.any(grads["embedding.weight"])
    assert not np.any(grads["delta_embedding.weight"][2])
    assert np.all(grads["delta_embedding.weight"][:2])
    model["p"].save(tmp_path / "a")
    again = PeftModel({"wte.weight": table})
    more = again.add("p", Adapter.load(tmp_path / "a")).shared
    np.testing.assert_array_equal(more["embedding.weight"], got + table[[3, 1, 4]])
    assert not np.any(more["delta_embedding.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": "SEQ_CLS"}, 'must be "CAUSAL_LM"'),
        ({"cpt_mask": [1]}, "one for each"),
        ({"opt_weighted_loss_type": "best"}, 'must be "none", "decay" or null'),
    ],
)
def test_prompts_of_examples_say_what_they_need(fields, message) -> None:
    given = {"cpt_token_ids": [1, 2], "task_type": "CAUSAL_LM", **fields}
    with pytest.raises(ConfigError, match=message):
        CPTConfig(**given)


def test_the_loss_of_examples_is_the_same_on_every_library(lib: Lib) -> None:
    config = next(c.config for c in PROMPTS if c.name == "cpt-decay")
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 11, 20)), rng.integers(0, 20, (2, 5))
    labels[0, 1] = -100
    want = config.loss(logits, labels)
    lib.check(lib.call(config.loss, logits, labels), np.asarray(want), rtol=1e-12)
    if lib.has_values and lib.backend.name != "dask":
        given = lib.array(labels)
        _, grads = value_and_grad(lambda z: config.loss(z, given))(lib.array(logits))
        step = 1e-6 * rng.standard_normal(logits.shape)
        rise = (config.loss(logits + step, labels) - config.loss(logits - step, labels)) / 2
        np.testing.assert_allclose(np.sum(to_numpy(grads) * step), rise, rtol=1e-6)
