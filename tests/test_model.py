"""PeftModel: the registry, what acts, dtype edges, and methods from outside the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peft_any
from peft_any import (
    ConfigError,
    Irreversible,
    PeftModel,
    ShapeError,
    TargetError,
    merge_checkpoint,
    write_safetensors,
)
from peft_any.backend import to_numpy
from peft_any.errors import UsageError
from peft_any.layer import linear
from peft_any.method import Additive
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.osf import OSFConfig
from peft_any.testing import Lib

rng = np.random.default_rng(5)


def net(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Draw a small network with an embedding, two linear layers and a convolution."""
    shapes = {
        "wte.weight": (11, 6),
        "mlp.fc1.weight": (8, 6),
        "mlp.fc1.bias": (8,),
        "mlp.fc2.weight": (6, 8),
        "conv.weight": (4, 3, 3, 3),
        "norm.weight": (6,),
        "head.weight": (5, 6),
        "head.bias": (5,),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def trained(model: PeftModel, name: str, scale: float = 0.3) -> None:
    """Move an adapter away from its initial values."""
    adapter = model[name]
    draw = np.random.default_rng(len(name))
    for params in (*adapter.sites.values(), adapter.extra, adapter.tokens):
        for key, value in params.items():
            noise = scale * draw.standard_normal(value.shape)
            params[key] = value + np.asarray(noise, dtype="float32").astype(value.dtype)


def two() -> PeftModel:
    """Make a model with two trained adapters of different methods."""
    model = PeftModel(net())
    model.add("a", LoraConfig(r=2, target_modules=["fc1", "fc2"]), seed=1)
    model.add("b", IA3Config(target_modules=["fc1"], feedforward_modules=[]), seed=2)
    trained(model, "a")
    trained(model, "b")
    return model


def test_the_registry_keeps_the_order_of_insertion() -> None:
    model = two()
    assert model.names == [*model] == ["a", "b"]
    assert len(model) == 2
    assert "a" in model
    assert model.active == {"a": 1.0}
    model.activate("b")
    assert model.active == {"b": 1.0}
    removed = model.remove("b")
    assert removed.config.peft_type == "IA3"
    assert model.active == {}
    assert model.names == ["a"]


def test_unknown_and_taken_names_are_refused() -> None:
    model = two()
    with pytest.raises(ConfigError, match="'c' is not here"):
        model.activate("c")
    with pytest.raises(ConfigError, match="already there"):
        model.add("a", LoraConfig(target_modules=["fc1"]))
    other = PeftModel(net())
    other.add("task1", LoraConfig(target_modules=["fc1"]))
    with pytest.raises(ConfigError, match="nearest: 'task1'"):
        other.remove("task2")


def test_a_weighted_sum_is_the_sum_of_the_effects() -> None:
    model, base = two(), None
    base = model.weights["mlp.fc1.weight"]
    model.activate("a")
    a = model.merge()["mlp.fc1.weight"] - base
    model.activate("b")
    b = model.merge()["mlp.fc1.weight"] - base
    model.activate({"a": 0.7, "b": -0.3})
    merged = model.merge()
    np.testing.assert_allclose(merged["mlp.fc1.weight"], base + 0.7 * a - 0.3 * b, atol=1e-6)
    x = rng.standard_normal((4, 6)).astype("float32")
    want = linear(x, merged["mlp.fc1.weight"], merged["mlp.fc1.bias"])
    np.testing.assert_allclose(model.bind().layers["mlp.fc1"](x), want, atol=2e-6)


def test_stacked_adapters_adapt_what_the_ones_before_made() -> None:
    model = two()
    model.activate(["a", "b"])
    merged = model.merge()
    model.activate("a")
    first = PeftModel(model.merge())
    first.add("b", model["b"])
    np.testing.assert_allclose(merged["mlp.fc1.weight"], first.merge()["mlp.fc1.weight"], atol=1e-6)
    model.activate(["a", "b"])
    x = rng.standard_normal((4, 6)).astype("float32")
    want = linear(x, merged["mlp.fc1.weight"], merged["mlp.fc1.bias"])
    np.testing.assert_allclose(model.bind().layers["mlp.fc1"](x), want, atol=2e-6)


def test_stacked_doras_measure_the_unadapted_weight() -> None:
    model = PeftModel(net())
    for name in ("a", "b"):
        model.add(name, LoraConfig(r=2, use_dora=True, target_modules=["fc1"]), seed=len(name))
        trained(model, name)
    model.activate(["a", "b"])
    merged, base = model.merge()["mlp.fc1.weight"], model.weights["mlp.fc1.weight"]
    layer = base
    for name in ("a", "b"):
        p = model[name].sites["mlp.fc1"]
        delta = 4.0 * p["lora_B.weight"] @ p["lora_A.weight"]
        norm = np.linalg.norm(base + delta, axis=1)
        layer = (p["lora_magnitude_vector"] / norm)[:, None] * (layer + delta)
    np.testing.assert_allclose(merged, layer, rtol=1e-5, atol=1e-6)
    x = rng.standard_normal((4, 6)).astype("float32")
    want = linear(x, merged, model.weights["mlp.fc1.bias"])
    np.testing.assert_allclose(model.bind().layers["mlp.fc1"](x), want, rtol=1e-4, atol=1e-5)


def test_a_stack_with_a_weight_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="not here"):
        two().activate(["a", "z"])


def test_within_disabled_nothing_acts() -> None:
    model = two()
    with model.disabled():
        assert model.merge()["mlp.fc1.weight"] is model.weights["mlp.fc1.weight"]
        assert model.active == {}
    assert model.active == {"a": 1.0}


def test_merging_never_changes_the_base() -> None:
    model = two()
    before = {name: w.copy() for name, w in model.weights.items()}
    for w in model.weights.values():
        w.flags.writeable = False
    model.activate(["a", "b"])
    merged = model.merge()
    assert merged["norm.weight"] is model.weights["norm.weight"]
    assert model.touched == [
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
    ]
    for name, w in model.weights.items():
        np.testing.assert_array_equal(w, before[name])
        assert (merged[name] is w) == (name not in model.touched)


def test_unmerging_without_the_base() -> None:
    model = two()
    model.activate(["a", "b"])
    merged = model.merge()
    again = model.unmerge(merged)
    for name, w in model.weights.items():
        np.testing.assert_allclose(again[name], w, rtol=1e-5, atol=1e-5)
    assert all(w is model.weights[name] for name, w in model.unmerge().items())
    model.activate({"a": 0.5, "b": 0.5})
    with pytest.raises(ConfigError, match="weighted sum"):
        model.unmerge(merged)


def test_module_free_helpers() -> None:
    weights = net()
    model = PeftModel(weights)
    adapter = model.add("x", LoraConfig(r=2, target_modules=["fc2"]))
    trained(model, "x")
    merged = peft_any.merge(weights, adapter)
    np.testing.assert_array_equal(merged["mlp.fc2.weight"], model.merge()["mlp.fc2.weight"])
    again = peft_any.unmerge(merged, adapter)
    np.testing.assert_allclose(again["mlp.fc2.weight"], weights["mlp.fc2.weight"], atol=1e-5)
    model = PeftModel(weights)
    dora = model.add("d", LoraConfig(r=2, use_dora=True, target_modules=["fc2"]))
    with pytest.raises(Irreversible, match="fc2"):
        peft_any.unmerge(merged, dora)


def test_counts_are_printed_as_people_expect() -> None:
    model = PeftModel(net())
    model.add("a", LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["head"]))
    counts = model.parameters
    assert counts.per_site == {"a": {"": 35, "mlp.fc1": 28}}
    assert counts.trainable == 63
    total = sum(w.size for w in model.weights.values()) + 63
    assert str(counts) == (
        f"trainable params: 63 || all params: {total:,} || trainable%: {6300 / total:.4f}"
    )


def test_full_copies_and_token_rows_take_part() -> None:
    model = PeftModel(net())
    config = LoraConfig(
        r=2,
        target_modules=["fc1"],
        modules_to_save=["head"],
        trainable_token_indices={"wte": [3, 7]},
        bias="lora_only",
    )
    model.add("a", config)
    same = model.merge()
    for name, w in model.weights.items():
        np.testing.assert_array_equal(same[name], w)
    trained(model, "a")
    merged = model.merge()
    moved = (merged["wte.weight"] != model.weights["wte.weight"]).any(axis=1)
    assert [*np.flatnonzero(moved)] == [3, 7]
    assert (merged["head.weight"] != model.weights["head.weight"]).all()
    assert (merged["mlp.fc1.bias"] != model.weights["mlp.fc1.bias"]).all()
    layers = model.bind().layers
    np.testing.assert_allclose(layers["wte"](np.asarray([7])), merged["wte.weight"][[7]])
    model.add("b", config)
    model.activate(["a", "b"])
    with pytest.raises(TargetError, match="full copy"):
        model.merge()
    model.activate({"a": 0.5, "b": 0.5})
    half = model.merge()["head.weight"]
    want = 0.5 * (merged["head.weight"] + model.weights["head.weight"])
    np.testing.assert_allclose(half, want, atol=1e-6)


def test_a_step_looks_for_no_layer_but_the_adapted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PeftModel(net())
    model.add("a", LoraConfig(r=2, target_modules=["mlp.fc1"]))
    looks: list[object] = []
    found = peft_any.model.layout
    monkeypatch.setattr(
        "peft_any.model.layout", lambda *given: (looks.append(given), found(*given))[1]
    )
    layers = model.bind(model.parameters).layers
    _ = layers["mlp.fc1"]
    assert looks == []
    assert "mlp.fc2" in layers
    assert {"mlp.fc1", "mlp.fc2"} < {*layers}
    _ = layers["mlp.fc2"], layers["conv"]
    assert len(looks) == 1


def test_full_copies_with_unlike_weights_are_summed() -> None:
    model = PeftModel(net())
    for name in ("a", "b"):
        model.add(name, LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["head"]))
        trained(model, name)
    base = model.weights["head.weight"]
    one, two = (model[name].extra["head.weight"] - base for name in ("a", "b"))
    model.activate({"a": 0.5, "b": 1.0})
    np.testing.assert_allclose(model.merge()["head.weight"], base + 0.5 * one + two, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_half_precision_is_computed_wide_and_rounded_once(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    wide = {name: w / 4 for name, w in net().items()}
    weights = {name: w.astype(kind) for name, w in wide.items()}
    model = PeftModel(weights)
    model.add("a", LoraConfig(r=2, target_modules=["fc1"]))
    trained(model, "a", 0.05)
    p = model["a"].sites["mlp.fc1"]
    exact = weights["mlp.fc1.weight"].astype("float32") + 4 * (
        p["lora_B.weight"] @ p["lora_A.weight"]
    )
    merged = model.merge()
    assert merged["mlp.fc1.weight"].dtype == kind
    np.testing.assert_array_equal(merged["mlp.fc1.weight"], exact.astype(kind))
    x = rng.standard_normal((3, 6)).astype("float32")
    y = model.bind().layers["mlp.fc1"](x)
    assert y.dtype == np.float32
    want = x @ exact.T + weights["mlp.fc1.bias"].astype("float32")
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert model.bind().layers["mlp.fc1"](x.astype(kind)).dtype == kind


def test_a_float64_adapter_keeps_its_digits() -> None:
    model = PeftModel(net("float64"))
    model.add("a", LoraConfig(r=2, target_modules=["fc1"]), dtype="float64")
    trained(model, "a")
    p = model["a"].sites["mlp.fc1"]
    want = model.weights["mlp.fc1.weight"] + 4 * p["lora_B.weight"] @ p["lora_A.weight"]
    np.testing.assert_allclose(model.merge()["mlp.fc1.weight"], want, rtol=1e-13)


def test_every_library(lib: Lib) -> None:
    weights = net()
    model = PeftModel({name: lib.array(w) for name, w in weights.items()})
    model.add("a", OFTConfig(oft_block_size=2, target_modules=["fc1", "fc2", "wte"]), seed=3)
    model.add("b", LoraConfig(r=2, init_lora_weights=False, target_modules=["fc1", "wte"]), seed=4)
    same = PeftModel(weights)
    same.add("a", OFTConfig(oft_block_size=2, target_modules=["fc1", "fc2", "wte"]), seed=3)
    same.add("b", LoraConfig(r=2, init_lora_weights=False, target_modules=["fc1", "wte"]), seed=4)
    for active in (["a", "b"], {"a": 0.5, "b": 2.0}):
        model.activate(active)
        same.activate(active)
        want = same.merge()
        for name, w in model.merge().items():
            lib.check(w, want[name], rtol=1e-5)
        tokens = np.asarray([[1, 4], [10, 0]])
        got = model.bind().layers["wte"](lib.array(tokens))
        lib.check(got, same.bind().layers["wte"](tokens), rtol=1e-5)


def test_parameters_can_be_given_under_jit() -> None:
    jax = pytest.importorskip("jax")
    model = PeftModel({name: jax.numpy.asarray(w) for name, w in net().items()})
    model.add("a", LoraConfig(r=2, init_lora_weights=False, target_modules=["fc1"]))
    x = jax.numpy.ones((2, 6), dtype="float32")

    @jax.jit
    def loss(params):
        return jax.numpy.sum(model.bind(params).layers["mlp.fc1"](x) ** 2)

    params = dict(model.parameters)
    slope = jax.grad(loss)(params)
    assert slope["a"]["mlp.fc1"]["lora_A.weight"].shape == (2, 6)
    assert float(jax.numpy.max(jax.numpy.abs(slope["a"]["mlp.fc1"]["lora_A.weight"]))) > 0


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, use_dora=True), OFTConfig(oft_block_size=2), BOFTConfig(boft_block_size=2)],
)
def test_what_is_traced_does_not_outlive_the_trace(config) -> None:
    jax = pytest.importorskip("jax")
    model = PeftModel({name: jax.numpy.asarray(w) for name, w in net().items()})
    model.add("a", replace(config, target_modules=["fc1"]))
    layers, x = model.bind().layers, jax.numpy.ones((2, 6), dtype="float32")

    def first_used_inside(x):
        return layers["mlp.fc1"](x)

    inside = jax.jit(first_used_inside)(x)
    np.testing.assert_allclose(layers["mlp.fc1"](x), inside, atol=1e-6)


def test_given_parameters_stand_in_for_copies_and_rows_too() -> None:
    model = PeftModel(net())
    tokens = {"wte": [3]}
    config = LoraConfig(target_modules=["fc1"], trainable_token_indices=tokens)
    model.add("a", replace(config, modules_to_save=["head"]))
    values = {"": {"head.bias": np.ones(5, dtype="float32")}}
    values[""]["wte.trainable_tokens_delta"] = np.full((1, 6), 2.0, dtype="float32")
    layers = model.bind({"a": values}).layers
    y = layers["head"](np.zeros((1, 6), dtype="float32"))
    np.testing.assert_array_equal(y, np.ones((1, 5)))
    np.testing.assert_array_equal(layers["wte"](np.asarray([3])), np.full((1, 6), 2.0))
    with pytest.raises(TargetError, match=r"lora_A\.wieght"):
        model.bind({"a": {"mlp.fc1": {"lora_A.wieght": 0}}})
    with pytest.raises(ConfigError, match="'b' is not here"):
        model.bind({"b": {}})


def test_a_convolution_is_merged_but_not_called() -> None:
    model = PeftModel(net())
    model.add("a", LoraConfig(r=2, target_modules=["conv"]))
    trained(model, "a")
    assert model.merge()["conv.weight"].shape == (4, 3, 3, 3)
    with pytest.raises(ConfigError, match="stride"):
        model.bind().layers["conv"](np.zeros((1, 27), dtype="float32"))
    with pytest.raises(TargetError, match=r"nearest: 'mlp\.fc"):
        _ = model.bind().layers["mlp.fc"]


class ShiftConfig(Additive, peft_type="SHIFT", prefix="shift_"):
    """ΔW = t·1, with t (n_out, 1): a method from outside the package."""

    def shapes(self, site):
        return {"shift_t": (site.n_out, 1)}

    def init(self, site, new):
        return {"shift_t": new.zeros((site.n_out, 1))}

    def delta(self, p, site):
        return (
            p["shift_t"] + 0 * p["shift_t"][:1, :]
            if site.width == 1
            else p["shift_t"] @ ones(p["shift_t"], site.width)
        )


def ones(like, width):
    """A row of ones on an array's library."""
    from peft_any.backend import namespace

    xp = namespace(like)
    return xp.ones_like(xp.broadcast_to(like[:1, :], (1, width)))


def test_a_method_from_outside_works_the_same(tmp_path) -> None:
    model = PeftModel(net())
    model.add("mine", ShiftConfig(target_modules=["fc1", "fc2"]))
    trained(model, "mine")
    model["mine"].save(tmp_path / "mine")
    loaded = peft_any.Adapter.load(tmp_path / "mine")
    assert isinstance(loaded.config, ShiftConfig)
    again = peft_any.merge(model.weights, loaded)
    t = model["mine"].sites["mlp.fc1"]["shift_t"]
    np.testing.assert_allclose(again["mlp.fc1.weight"], model.weights["mlp.fc1.weight"] + t)
    with pytest.raises(ConfigError, match="cannot be taken"):

        class Clash(Additive, peft_type="LORA"):
            pass


@given(st.integers(0, 2**20), st.floats(-2, 2), st.floats(-2, 2))
def test_effects_add_linearly(seed: int, u: float, v: float) -> None:
    model = two()
    base = model.weights["mlp.fc2.weight"].astype("float64")
    model.activate({"a": u})
    one = model.merge()["mlp.fc2.weight"] - base
    model.activate({"a": v})
    other = model.merge()["mlp.fc2.weight"] - base
    model.activate({"a": u + v})
    np.testing.assert_allclose(model.merge()["mlp.fc2.weight"] - base, one + other, atol=1e-5)


def test_weights_of_two_libraries_are_refused() -> None:
    with pytest.raises(ShapeError, match="empty"):
        PeftModel({}).add("a", LoraConfig(target_modules=["fc"]))


def test_values_round_trip_through_the_library(lib: Lib) -> None:
    if lib.has_values:
        np.testing.assert_array_equal(to_numpy(lib.array(np.arange(3.0))), np.arange(3.0))


def test_a_pattern_of_osf_that_is_no_expression_is_refused() -> None:
    model = PeftModel({"fc.weight": np.eye(6)})
    with pytest.raises(ConfigError, match="not a regular expression"):
        model.add("a", OSFConfig(rank_pattern={"(": 1}, target_modules=["fc"]))


def test_what_is_shown_is_short(tmp_path: Path) -> None:
    model = PeftModel({"a.weight": np.ones((3, 4), "float32"), "b.weight": np.ones((3, 4))})
    assert repr(model) == "<PeftModel of 2 tensors: no adapters>"
    adapter = model.add("x", LoraConfig(r=2, target_modules=["a"]))
    model.add("y", adapter)
    assert repr(adapter) == "<Adapter LORA: 14 parameters at 1 layers>"
    assert repr(adapter.config) == "LoraConfig(target_modules=['a'], r=2)"
    assert repr(model) == "<PeftModel of 2 tensors: 'x' (active), 'y'>"
    bound = model.bind()
    assert "array" not in repr(bound)
    assert repr(bound.layers["a"]) == "<BoundLayer a (3, 4): LORA>"
    assert repr(bound.layers["b"]) == "<BoundLayer b (3, 4): base>"
    write_safetensors(tmp_path / "base.safetensors", model.weights)
    receipt = merge_checkpoint(tmp_path / "base.safetensors", adapter, dry_run=True)
    assert repr(receipt) == "<Receipt of a merge: 1 tensors changed, 1 as in the base>"


def test_weights_are_a_mapping() -> None:
    with pytest.raises(UsageError, match=r"give a mapping of names to arrays.*torch.attach"):
        PeftModel("base")
