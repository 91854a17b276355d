"""The order of a model's layers: what tells it, and what only seems to."""

from __future__ import annotations

import numpy as np
import pytest

from peft_any import PeftModel, UniLoraConfig
from peft_any.traversal import UntoldOrderError, in_model_order, known_parts

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in PARTS]
STATE = [
    "model.embed_tokens.weight", *(f"{name}.weight" for name in LAYERS), "model.norm.weight",
    "lm_head.weight",
]  # fmt: skip


def test_a_state_dict_tells_it() -> None:
    assert in_model_order(sorted(LAYERS), STATE) == LAYERS
    assert in_model_order(LAYERS[3:1:-1], STATE) == LAYERS[2:4]


def test_numbers_tell_it_whatever_the_order_of_tensors() -> None:
    one_part = LAYERS[::4]
    assert in_model_order(one_part[::-1], sorted(STATE)) == one_part


def test_the_type_of_the_model_tells_it() -> None:
    assert in_model_order(LAYERS, sorted(STATE), known_parts({"model_type": "llama"})) == LAYERS
    heads, parts = ["model.layers.0.mlp.fc", "lm_head"], known_parts({"model_type": "qwen2_moe"})
    assert in_model_order(heads, ["lm_head.weight", f"{heads[0]}.weight"], parts) == heads
    assert known_parts({"model_type": "mine"}) == known_parts({}) == ()


def shards() -> list[str]:
    """List tensors sorted within each of two files, as reading one after the other gives them."""
    return [*sorted(STATE[:24]), *sorted(STATE[24:])]


def by_dtype() -> list[str]:
    """List tensors as a file does: larger dtypes first."""
    return sorted(STATE, key=lambda name: ("q_proj" not in name, name))


def halves_apart() -> list[str]:
    """List tensors where one layer's halves are in two sorted files."""
    return [*sorted(STATE[:7]), *sorted(STATE[7:])]


@pytest.mark.parametrize(
    "tensors",
    [sorted(STATE), shards(), by_dtype(), halves_apart(), sorted(STATE, reverse=True)],
    ids=["name", "shards", "dtype", "halves", "backwards"],
)
def test_sorted_names_do_not_tell_it(tensors: list[str]) -> None:
    with pytest.raises(UntoldOrderError, match=r"do not tell in which order .*: give"):
        in_model_order(LAYERS, tensors)


@pytest.mark.parametrize("tensors", [sorted(STATE), by_dtype()], ids=["name", "dtype"])
def test_what_cannot_be_true_is_not_believed(tensors: list[str]) -> None:
    with pytest.raises(UntoldOrderError, match=r"not by number|is in two places"):
        in_model_order(LAYERS, tensors, vouched=True)


def test_what_can_be_true_is() -> None:
    tensors = sorted(STATE[:17])
    layers = LAYERS[:16]
    assert in_model_order(layers, tensors, vouched=True) != layers
    assert in_model_order(layers, STATE[:17], vouched=True) == layers


def test_a_layer_without_a_tensor_has_no_place() -> None:
    with pytest.raises(UntoldOrderError, match=r"lm_foot: no tensors tell"):
        in_model_order([*LAYERS, "lm_foot"], STATE)


def test_places_do_not_depend_on_the_order_of_tensors_where_that_is_told() -> None:
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal((4, 4)) for name in LAYERS[::4]}
    config = UniLoraConfig(r=2, theta_d_length=9, target_modules=["q_proj"])
    merged = []
    for names in (weights, sorted(weights)):
        model = PeftModel({name: weights[name] for name in names})
        model.add("a", config, seed=1, dtype="float64")
        merged.append(model.merge())
    for name in weights:
        np.testing.assert_array_equal(merged[0][name], merged[1][name])
