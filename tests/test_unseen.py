"""What strangers to the package ran into: small cases that no table of methods holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import peft_any
from peft_any.adapter import Adapter
from peft_any.backend import from_numpy, inv, resolve, to_numpy
from peft_any.errors import ConfigError, ShapeError, TargetError, UsageError
from peft_any.layer import Dense, Site
from peft_any.method import Additive, Tuner
from peft_any.methods.boft import BOFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.road import RoadConfig
from peft_any.model import PeftModel
from peft_any.parts import Part, effect
from peft_any.testing import Lib

RNG = np.random.default_rng(0)


def draw(*shape: int, dtype: str = "float32") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


WEIGHTS = {"m.fc.weight": draw(8, 4), "m.fc.bias": draw(8), "m.out.weight": draw(2, 8)}


# Backends


@pytest.mark.parametrize("spec", [3, None, ["numpy"]])
def test_a_spec_of_another_type_is_refused(spec: Any) -> None:
    with pytest.raises(UsageError, match="give a name such as"):
        resolve(spec)


def test_stacks_of_matrices_are_inverted_everywhere(lib: Lib) -> None:
    if reason := lib.lacks(("linalg",)) if lib.name != "dask" else None:
        pytest.skip(reason)
    stack = draw(5, 3, 3, dtype="float64")
    lib.check(lib.call(inv, stack), np.linalg.inv(stack), rtol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, init_weights=False),
        OFTConfig(oft_block_size=4, use_cayley_neumann=False, init_weights=False),
        OFTConfig(oft_block_size=4, init_weights=False),
    ],
    ids=["boft", "oft-exact", "oft"],
)
def test_rotations_run_on_chunked_arrays(config: Tuner) -> None:
    pytest.importorskip("dask")
    weight, x = draw(6, 16), draw(3, 16)
    here = config.layer(16, 6, weight=weight)
    there = config.layer(16, 6, weight=from_numpy(weight, resolve("dask")).rechunk(5))
    np.testing.assert_allclose(
        to_numpy(there(from_numpy(x, resolve("dask")).rechunk(3))), here(x), atol=1e-5
    )
    merged = there.config.merge(there.params, Dense(there.base.weight, None, there.site))
    np.testing.assert_allclose(to_numpy(merged.weight), here.merge().weight, atol=1e-5)
    back = there.config.unmerge(there.params, merged)
    np.testing.assert_allclose(to_numpy(back.weight), weight, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_base_can_be_decomposed(init: str, dtype: str) -> None:
    weight = from_numpy(draw(6, 5), resolve("numpy")).astype(np.float16)
    weight = (
        weight if dtype == "float16" else weight.astype(pytest.importorskip("ml_dtypes").bfloat16)
    )
    layer = LoraConfig(r=2, init_lora_weights=init).layer(5, 6, weight=weight)
    wide = LoraConfig(r=2, init_lora_weights=init).layer(5, 6, weight=weight.astype("float32"))
    for name, values in wide.params.items():
        np.testing.assert_allclose(layer.params[name], values, atol=1e-5)
    np.testing.assert_array_equal(layer.merge().weight, weight)


# Layers and files


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((3, 1), "float32"), r"shape \(3, 1\) .* takes \(\.\.\., 4\)"),
        (np.ones((3, 4), "int64"), "int64 values cannot go into a Linear"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x: np.ndarray, message: str) -> None:
    scale = IA3Config(target_modules=["fc"], feedforward_modules=["fc"])
    model = PeftModel(WEIGHTS)
    model.add("a", scale)
    with pytest.raises(ShapeError, match=message):
        model.bind().layers["m.fc"](x)
    with pytest.raises(ShapeError, match=message):
        LoraConfig(r=2).layer(4, 8, weight=WEIGHTS["m.fc.weight"])(x)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        ("x", UsageError, "cannot be taken: give a number"),
        (None, UsageError, "cannot be taken: give a number"),
        (float("nan"), ConfigError, "cannot be a weight"),
        (float("inf"), ConfigError, "cannot be a weight"),
    ],
)
def test_a_weight_is_a_finite_number(weight: Any, error: type[ValueError], words: str) -> None:
    model = PeftModel(WEIGHTS)
    model.add("a", LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(error, match=words):
        model.activate({"a": weight})
    assert model.active == {"a": 1.0}
    model.activate({"a": np.float32(0.5)})
    assert model.active == {"a": 0.5}


@pytest.mark.parametrize("adapter", ["path/to/adapter", {"r": 3}, None])
def test_what_is_no_adapter_cannot_be_attached(adapter: Any) -> None:
    with pytest.raises(UsageError, match=r"an adapter that Adapter\.load read"):
        PeftModel(WEIGHTS).add("a", adapter)  # a path is loaded by Adapter.load


@pytest.mark.parametrize("dtype", ["int8", "bool"])
def test_parameters_are_floats(dtype: str) -> None:
    with pytest.raises(ConfigError, match="they are floats"):
        LoraConfig().layer(4, 8, dtype=dtype)


@pytest.mark.parametrize("prefix", ["", "block."])
def test_the_output_half_of_packed_attention_is_linear_beside_conv1d(prefix: str) -> None:
    weights = {
        "c.weight": draw(4, 6),
        "c.bias": draw(6),
        f"{prefix}in_proj_weight": draw(12, 4),
        f"{prefix}out_proj.weight": draw(4, 4),
        f"{prefix}out_proj.bias": draw(4),
    }
    config = LoraConfig(r=1, target_modules=["out_proj"], fan_in_fan_out=True)
    fresh = PeftModel(weights).add("a", config)
    assert fresh.check(weights)[f"{prefix}out_proj"].kind == "Linear"


def test_all_that_does_not_fit_a_base_is_listed_at_once() -> None:
    pair = {"lora_A.weight": draw(1, 4), "lora_B.weight": draw(8, 1)}
    config = LoraConfig(r=1, target_modules=["fc"], modules_to_save=["out"])
    adapter = Adapter(config, {"x.m.fc": pair}, extra={"x.m.out.weight": draw(2, 8)})
    with pytest.raises(TargetError) as error:
        adapter.check(WEIGHTS)
    assert "x.m.out.weight: the base has no such tensor" in str(error.value)
    assert "x.m.fc: the base has no such layer" in str(error.value)
    assert "without the prefix 'x.'" in str(error.value)


@pytest.mark.parametrize("factors", [4, 2**31, 2**70])
def test_absurd_butterflies_are_refused_in_no_time(factors: int) -> None:
    config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factors)
    with pytest.raises(ShapeError, match="cannot pair 4 blocks"):
        config.at(Site("fc", 8, 4))


def test_absurdly_many_terms_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_cayley_neumann_terms=9223372036854775808"):
        OFTConfig(num_cayley_neumann_terms=2**63)


# Methods of a user's own


class Basis(Additive):
    """ΔW = Σ cᵢ·Bᵢ over shared matrices."""

    def shapes(self, site: Site) -> dict[str, Any]:
        return {"basis_c": (3,)}

    def init(self, site: Site, new: Any) -> Any:
        return {"basis_c": new.normal((3,))}

    def shared_shapes(self, sites: Any) -> dict[str, Any]:
        return {"basis_all": (3, max(s.n_out for s in sites), max(s.width for s in sites))}

    def init_shared(self, sites: Any, new: Any) -> Any:
        return {k: new.normal(s) for k, s in self.shared_shapes(sites).items()}

    def delta(self, p: Any, site: Site) -> Any:
        every = p["basis_all"][:, : site.n_out, : site.width]
        return (p["basis_c"][:, None, None] * every).sum(axis=0)


class BasisConfig(Basis):
    """The names stand in the class, and the shared array's begins with the prefix too."""

    peft_type: ClassVar[str] = "TEST_BASIS"
    prefix: ClassVar[str] = "basis_"


class Nameless(Basis):
    """Has no `peft_type`."""


class OddNames(Basis, peft_type="TEST_ODD", prefix="odd_"):
    """Names its parameters otherwise than it says."""


class OddShapes(BasisConfig, peft_type="TEST_SHAPES"):
    """Draws other shapes than it announces."""

    def init(self, site: Site, new: Any) -> Any:
        return {"basis_c": new.normal((1, 3))}


class Shift(Tuner, peft_type="TEST_MOVE", prefix="shift_"):
    """b′ = b + t; `honest` says that merging changes the bias."""

    honest: bool = True

    def shapes(self, site: Site) -> dict[str, Any]:
        return {"shift_t": (site.n_out,)}

    def init(self, site: Site, new: Any) -> Any:
        return {"shift_t": new.ones((site.n_out,))}

    def changes_bias(self, site: Site) -> bool:
        return self.honest

    def merge(self, p: Any, base: Dense) -> Dense:
        return base.replace(bias=p["shift_t"] if base.bias is None else base.bias + p["shift_t"])


def test_a_shared_array_may_begin_with_the_methods_prefix(tmp_path: Any) -> None:
    model = PeftModel(WEIGHTS)
    adapter = model.add("a", BasisConfig(target_modules=["fc", "out"]))
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert [*again.sites] == ["m.fc", "m.out"]
    assert [*again.shared] == ["basis_all"]
    other = PeftModel(WEIGHTS)
    other.add("a", again)
    for name, value in model.merge().items():
        np.testing.assert_array_equal(other.merge()[name], value)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (Nameless, ConfigError, "without a peft_type"),
        (OddNames, ConfigError, "'basis_c'.* cannot be stored"),
        (OddShapes, ShapeError, r"basis_c: shape \(1, 3\) cannot fit"),
    ],
)
def test_a_method_whose_files_could_not_be_read_is_refused(
    config: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PeftModel(WEIGHTS).add("a", config(target_modules=["fc"]))


def test_a_bias_that_nobody_announced_is_refused() -> None:
    model = PeftModel(WEIGHTS)
    model.add("a", Shift(target_modules=["fc"]))
    np.testing.assert_array_equal(model.merge()["m.fc.bias"], WEIGHTS["m.fc.bias"] + 1)
    model = PeftModel(WEIGHTS)
    model.add("a", Shift(target_modules=["fc"], honest=False))
    with pytest.raises(ConfigError, match="changes_bias must say so"):
        model.merge()


def test_a_bias_cannot_be_given_to_a_layer_without_one() -> None:
    model = PeftModel(WEIGHTS)
    model.add("a", Shift(target_modules=["out"]))
    with pytest.raises(ConfigError, match=r"m\.out: a bias correction cannot be merged"):
        model.merge()
    base = Dense(WEIGHTS["m.out.weight"], None, Site("m.out", 8, 2))
    with pytest.raises(ConfigError, match=r"m\.out: a bias correction cannot be merged"):
        effect([Part(Shift(), {"shift_t": draw(2)}, 0.5)], base)


def test_the_bias_of_a_parted_masked_head_is_stored_under_both_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = tmp_path / "base"
    base.mkdir()
    weights = {
        "bert.embeddings.word_embeddings.weight": rng.standard_normal((9, 4)).astype("float32"),
        "bert.encoder.query.weight": rng.standard_normal((4, 4)).astype("float32"),
        "cls.predictions.bias": rng.standard_normal(9).astype("float32"),
    }
    peft_any.write_safetensors(base / "model.safetensors", weights)
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (base / "config.json").write_text(json.dumps(config))
    head = "cls.predictions.decoder"
    tied = {**weights, f"{head}.weight": weights["bert.embeddings.word_embeddings.weight"]}
    model = PeftModel(tied)
    model.add("a", LoraConfig(r=2, target_modules=[head], init_lora_weights=False))
    model["a"].save(tmp_path / "adapter")
    peft_any.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = peft_any.read_safetensors(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(merged[f"{head}.bias"], weights["cls.predictions.bias"])
    np.testing.assert_allclose(merged[f"{head}.weight"], model.merge()[f"{head}.weight"], atol=1e-6)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    peft_any.verify_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(peft_any.PeftError, match="adapter=3"):
        peft_any.merge_checkpoint(base, 3, tmp_path / "other")


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}


@pytest.mark.parametrize("config", [{"bias": "all"}, {"lora_bias": True}])
def test_a_masked_heads_bias_is_one_under_both_names(
    config: dict[str, Any], tmp_path: Path
) -> None:
    first, head = "cls.predictions.bias", "cls.predictions.decoder"
    table = "bert.embeddings.word_embeddings.weight"
    weights = {table: draw(9, 4), "bert.query.weight": draw(4, 4), first: draw(9)}
    whole = {**weights, f"{head}.weight": weights[table], f"{head}.bias": weights[first]}
    targets = [head] if "lora_bias" in config else ["query"]
    model = PeftModel(whole)
    added = model.add(
        "a", LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config)
    )
    moved = {name: array + 1 for name, array in added.extra.items()}
    (tmp_path / "base").mkdir()
    peft_any.write_safetensors(tmp_path / "base" / "model.safetensors", weights)
    (tmp_path / "base" / "config.json").write_text(json.dumps(BERT))
    model["a"].replace(extra=moved).save(tmp_path / "a")
    receipt = peft_any.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    peft_any.verify_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    got = peft_any.read_safetensors(tmp_path / "out" / "model.safetensors")
    want = weights[first] + 1 if moved else model.merge()[f"{head}.bias"]
    np.testing.assert_allclose(got[first], want, rtol=1e-6)
    assert (f"{head}.bias" in got) == bool(receipt.untied)
    if receipt.untied:
        np.testing.assert_array_equal(got[f"{head}.bias"], got[first])


def test_a_correction_of_zero_needs_no_bias(tmp_path: Path) -> None:
    config = LoraConfig(r=1, target_modules=["fc", "out"], lora_bias=True)
    p = {"lora_A.weight": draw(1, 4), "lora_B.weight": draw(8, 1), "lora_B.bias": draw(8)}
    q = {"lora_A.weight": draw(1, 8), "lora_B.weight": draw(2, 1), "lora_B.bias": np.zeros(2)}
    peft_any.write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    adapter = Adapter(config, {"m.fc": p, "m.out": q})
    receipt = peft_any.merge_checkpoint(tmp_path / "model.safetensors", adapter, dry_run=True)
    assert {change.tensor for change in receipt.changes} == {*WEIGHTS}
    wrong = adapter.replace(sites={"m.fc": p, "m.out": {**q, "lora_B.bias": np.ones(2)}})
    with pytest.raises(TargetError, match=r"m\.out\.bias: the base has no such bias"):
        peft_any.merge_checkpoint(tmp_path / "model.safetensors", wrong, dry_run=True)


def test_a_start_beside_an_embedding_is_folded_and_a_raw_file_kept(tmp_path: Path) -> None:
    weights = {"embed_tokens.weight": draw(9, 4), "fc.weight": draw(8, 4)}
    config = LoraConfig(r=2, target_modules=["embed_tokens", "fc"], init_lora_weights="olora")
    model = PeftModel(weights)
    added = model.add("a", config)
    factors = {"lora_embedding_A": draw(2, 9), "lora_embedding_B": draw(4, 2)}
    added = added.replace(sites={**added.sites, "embed_tokens": factors})
    kept = {n: {k: a for k, a in p.items() if "start" not in k} for n, p in added.sites.items()}
    raw = added.replace(sites=kept)
    ours = PeftModel(weights)
    ours.add("a", raw, rederive=True)
    want = (
        weights["embed_tokens.weight"]
        + 4 * (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).T
    )
    np.testing.assert_allclose(ours.merge()["embed_tokens.weight"], want, atol=1e-5)
    ours["a"].save(tmp_path / "folded")
    again = PeftModel(weights)
    again.add("a", Adapter.load(tmp_path / "folded"))
    for name, array in ours.merge().items():
        np.testing.assert_allclose(again.merge()[name], array, atol=1e-5)
    raw.save(tmp_path / "raw")
    found = Adapter.load(tmp_path / "raw")
    assert found.config.init_lora_weights == "olora"  # type: ignore[attr-defined]
    assert found.sites["fc"]["lora_A.weight"].shape == (2, 4)


def test_a_file_of_nested_experts_is_written_as_it_was(tmp_path: Path) -> None:
    names = ["experts.up_proj", "experts.down_proj"]
    config = LoraConfig(r=1, target_modules=["fc"], target_parameters=names)
    up = {"lora_A.weight": draw(2, 4), "lora_B.weight": draw(3, 2)}
    down = {"lora_A.weight": draw(2, 3), "lora_B.weight": draw(4, 2)}
    Adapter(config, {"m.experts.up_proj": up, "m.experts.down_proj": down}).save(tmp_path / "a")
    Adapter.load(tmp_path / "a").save(tmp_path / "b")
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in "ab")
    assert "base_model.model.m.experts.base_layer.lora_A.weight" in peft_any.read_safetensors(first)
    assert first.read_bytes() == second.read_bytes()


def test_a_magnitude_that_is_spelt_twice_is_one(tmp_path: Path) -> None:
    p = {"lora_embedding_A": draw(2, 9), "lora_embedding_B": draw(4, 2)}
    p["lora_magnitude_vector"] = draw(4)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    Adapter(config, {"embed_tokens": p}).save(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = dict(peft_any.read_safetensors(path))
    key = "base_model.model.embed_tokens.lora_magnitude_vector"
    tensors = {n: a.copy() for n, a in tensors.items()} | {f"{key}.weight": tensors[key].copy()}
    path.unlink()
    peft_any.write_safetensors(path, tensors, {"format": "pt"})
    found = Adapter.load(tmp_path / "a")
    assert {*found.sites["embed_tokens"]} == {*p}
    found.save(tmp_path / "b")
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == path.read_bytes()


def test_what_a_batch_norm_counts_is_copied_and_not_trained() -> None:
    weights = {f"norm.{n}": draw(4) for n in ("weight", "bias", "running_mean", "running_var")}
    weights |= {"fc.weight": draw(4, 4), "norm.num_batches_tracked": np.asarray(3)}
    model = PeftModel(weights)
    added = model.add("a", LoraConfig(r=1, target_modules=["fc"], modules_to_save=["norm"]))
    assert {*added.extra} == {n for n in weights if n.startswith("norm")}
    assert {*model.parameters["a"][""]} == {"norm.weight", "norm.bias"}


def test_gains_keep_to_what_is_not_excluded() -> None:
    config = IA3Config(target_modules=["fc"], feedforward_modules=[], exclude_modules=["h.0.fc"])
    adapter = Adapter(config, {"h.1.fc": {"ia3_l": draw(3, 1)}})
    made, _ = peft_any.combine([adapter, adapter])
    assert made.config.target_modules == ["h.1.fc"]  # type: ignore[attr-defined]


def test_a_conversion_targets_no_layer_that_its_method_passed_by(tmp_path: Path) -> None:
    weights = {"a.proj.weight": draw(8, 4), "b.proj.weight": draw(8, 4, 3, 3)}
    model = PeftModel(weights)
    rows = RoadConfig(target_modules=["a.proj"], group_size=4, init_weights=False)
    added = model.add("a", rows)
    added = added.replace(
        config=replace(added.config, target_modules=["proj"])
    )  # as of linear ones
    made, _ = peft_any.convert(added, base=weights)
    assert made.config.target_modules == ["a.proj"]  # type: ignore[attr-defined]
    peft_any.write_safetensors(tmp_path / "model.safetensors", weights)
    peft_any.merge_checkpoint(tmp_path / "model.safetensors", made, dry_run=True)
