"""A LoRA out of two checkpoints: merged into the base it gives the model, as far as it says."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_any import extract, merge_checkpoint
from peft_any.adapter import Adapter
from peft_any.backend import astype
from peft_any.errors import ShapeError, StorageError, TargetError, UsageError, VerifyError
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.surgery.division import shortened
from peft_any.surgery.extracted import Extraction
from peft_any.testing import Lib

RNG = np.random.default_rng(0)
LAYERS = ("layers.0", "layers.1")


def draw(*shape: int, size: float = 1.0) -> np.ndarray:
    return (size * RNG.standard_normal(shape)).astype("float32")


def model() -> dict[str, np.ndarray]:
    """Make a small transformer's weights, with a convolution before it."""
    made = {
        "embed_tokens.weight": draw(20, 8),
        "stem.weight": draw(6, 4, 3, 3),
        "stem.bias": draw(6),
        "depthwise.weight": draw(6, 1, 5),
        "norm.weight": draw(8),
        "lm_head.weight": draw(20, 8),
    }
    for layer in LAYERS:
        made |= {f"{layer}.{name}.weight": draw(8, 8) for name in ("q_proj", "v_proj")}
        made |= {f"{layer}.fc.weight": draw(16, 8), f"{layer}.fc.bias": draw(16)}
        made |= {f"{layer}.norm1.weight": draw(8), f"{layer}.norm1.bias": draw(8)}
    return made


def tuned(base: dict[str, np.ndarray], *names: str, size: float = 0.1) -> dict[str, np.ndarray]:
    """Change some tensors."""
    return base | {name: base[name] + draw(*base[name].shape, size=size) for name in names}


def weights(*ends: str) -> list[str]:
    return [name for name in model() if name.endswith(ends)]


class Shop:
    """Writes checkpoints, extracts, and merges back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, tensors: dict[str, Any], config: Any = None) -> Path:
        path = self.folder / name
        path.mkdir()
        write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    def extract(
        self, base: dict[str, Any], made: dict[str, Any], config: Any = None, **options: Any
    ) -> Extraction:
        one, two = self.write("base", base, config), self.write("model", made, config)
        return extract(one, two, self.folder / "out", **options)

    def merged(self, **options: Any) -> dict[str, np.ndarray]:
        merge_checkpoint(
            self.folder / "base", self.folder / "out", self.folder / "merged", **options
        )
        return read_safetensors(self.folder / "merged" / "model.safetensors")

    def check(self, found: Extraction, made: dict[str, np.ndarray], **options: Any) -> None:
        """What is merged is the model: bit for bit, or as far off as the receipt says."""
        merged = self.merged(**options)
        off = {layer.tensor: layer.residual for layer in found.layers}
        assert merged.keys() >= made.keys()
        for name, want in made.items():
            if name in off:
                away = np.linalg.norm(merged[name].astype("f8") - want.astype("f8"))
                rounding = 2e-7 * np.linalg.norm(want.astype("f8"))
                assert away == pytest.approx(off[name], rel=1e-3, abs=rounding)
            else:
                np.testing.assert_array_equal(merged[name], want, name)
        assert json.loads((self.folder / "out" / "extract_receipt.json").read_text()) == (
            found.to_dict()
        )


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.mark.parametrize("rank", [2, 8, 12])
def test_linear_layers(shop: Shop, rank: int) -> None:
    base = model()
    made = tuned(base, *weights("q_proj.weight", "fc.weight"))
    found = shop.extract(base, made, rank=rank)
    shop.check(found, made)
    config: Any = found.adapter.config
    assert config.target_modules == ["fc", "q_proj"]
    assert (config.r, config.lora_alpha, config.modules_to_save) == (rank, rank, None)
    assert (config.rank_pattern, config.alpha_pattern, config.bias) == ({}, {}, "none")
    shapes = {p["lora_A.weight"].shape[0] for p in found.adapter.sites.values()}
    assert shapes == {rank}
    assert found.same == len(base) - 4
    for layer in found.layers:
        s = np.linalg.svd(made[layer.tensor] - base[layer.tensor], compute_uv=False)
        assert layer.rank == min(rank, 8)
        assert layer.delta_norm == pytest.approx(np.linalg.norm(s), rel=1e-5)
        assert layer.residual <= 1.01 * np.linalg.norm(s[rank:]) + 1e-6 * layer.delta_norm
        assert layer.kept == pytest.approx(1 - layer.error**2)


def test_every_kind_of_tensor(shop: Shop) -> None:
    base = model()
    made = tuned(base, *base)
    found = shop.extract(base, made, rank=3)
    shop.check(found, made)
    config: Any = found.adapter.config
    assert [*found.adapter.sites] == [
        "layers.0.fc", "layers.0.q_proj", "layers.0.v_proj",
        "layers.1.fc", "layers.1.q_proj", "layers.1.v_proj", "stem",
    ]  # fmt: skip
    assert set(config.modules_to_save) == {"embed_tokens", "depthwise", "lm_head", "norm", "norm1"}
    assert config.bias == "lora_only"
    assert found.adapter.sites["stem"]["lora_A.weight"].shape == (3, 4, 3, 3)
    assert found.same == 0
    assert found.copies["norm.weight"] == (8,)


def test_embeddings_get_factors_when_asked(shop: Shop) -> None:
    base = model()
    made = tuned(base, "embed_tokens.weight", "lm_head.weight")
    found = shop.extract(base, made, rank=3, embeddings=True)
    shop.check(found, made)
    assert found.adapter.sites["embed_tokens"].keys() == {"lora_embedding_A", "lora_embedding_B"}
    assert found.adapter.sites.keys() == {"embed_tokens", "lm_head"}
    assert not found.copies


def test_biases_alone(shop: Shop) -> None:
    base = model()
    made = tuned(base, "layers.0.fc.bias", "layers.1.q_proj.weight")
    found = shop.extract(base, made, rank=8)
    shop.check(found, made)
    config: Any = found.adapter.config
    assert config.bias == "all"
    assert config.target_modules == ["layers.1.q_proj"]


def test_no_target_means_a_module_that_holds_others(shop: Shop) -> None:
    base = {"body.1.conv.weight": np.eye(8, dtype="f4"), "head.1.weight": np.eye(8, dtype="f4")}
    made = {**base, "head.1.weight": base["head.1.weight"] + 1}
    assert shop.extract(base, made, rank=1).adapter.config.target_modules == ["head.1"]


def test_norms_alone(shop: Shop) -> None:
    base = model()
    made = tuned(base, "layers.0.norm1.bias", "norm.weight")
    found = shop.extract(base, made, rank=8)
    shop.check(found, made)
    assert found.layers == ()
    assert (found.kept, found.error) == (1.0, 0.0)


def test_transposed_layers(shop: Shop) -> None:
    base = {
        f"h.{i}.{name}.{leaf}": draw(*shape)
        for i in range(2)
        for name, sizes in {"c_attn": (8, 24), "c_proj": (8, 8)}.items()
        for leaf, shape in {"weight": sizes, "bias": sizes[1:]}.items()
    }
    made = tuned(base, *(name for name in base if name.endswith("weight")))
    found = shop.extract(base, made, rank=4)
    shop.check(found, made)
    config: Any = found.adapter.config
    assert config.fan_in_fan_out
    assert found.adapter.sites["h.0.c_attn"]["lora_B.weight"].shape == (24, 4)


@pytest.mark.parametrize(
    "changed",
    [
        ("in_proj_weight", "out_proj.weight"),
        ("in_proj_weight",),
        ("out_proj.weight",),
        ("in_proj_weight", "in_proj_bias", "out_proj.weight"),
    ],
)
@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.8}], ids=["rank", "energy"])
def test_packed_attention(shop: Shop, changed: tuple[str, ...], cut: dict[str, Any]) -> None:
    base = {
        "attn.in_proj_weight": draw(24, 8),
        "attn.in_proj_bias": draw(24),
        "attn.out_proj.weight": draw(8, 8),
        "attn.out_proj.bias": draw(8),
        "fc.weight": draw(8, 8),
    }
    made = tuned(base, *(f"attn.{name}" for name in changed), "fc.weight")
    found = shop.extract(base, made, **cut)
    shop.check(found, made)
    assert ("attn" in found.adapter.sites) == ("in_proj_bias" not in changed)
    assert ("attn.out_proj" in found.adapter.sites) == ("in_proj_bias" not in changed)


def test_energy_chooses_each_rank(shop: Shop) -> None:
    base = model()
    made = {**base}
    for i, layer in enumerate(LAYERS):
        for rank, name in ((1, "q_proj"), (2 + i, "fc")):
            shape = base[f"{layer}.{name}.weight"].shape
            change = draw(shape[0], rank) @ draw(rank, shape[1])
            made[f"{layer}.{name}.weight"] = base[f"{layer}.{name}.weight"] + change
    found = shop.extract(base, made, energy=0.999999)
    shop.check(found, made)
    ranks = {layer.module: layer.rank for layer in found.layers}
    want = {"layers.0.q_proj": 1, "layers.1.q_proj": 1, "layers.0.fc": 2, "layers.1.fc": 3}
    assert ranks == want
    config: Any = found.adapter.config
    assert config.r == config.lora_alpha == 1
    assert config.rank_pattern == config.alpha_pattern == {"layers.0.fc": 2, "layers.1.fc": 3}
    assert min(layer.kept for layer in found.layers) >= 0.999999 - 1e-9


def test_a_layer_smaller_than_its_factors_is_saved_whole(shop: Shop) -> None:
    base = model()
    made = tuned(base, "layers.0.q_proj.weight")
    change = draw(8, 1) @ draw(1, 8)
    made["layers.1.q_proj.weight"] = base["layers.1.q_proj.weight"] + change
    found = shop.extract(base, made, energy=0.9999)
    shop.check(found, made)
    assert [*found.adapter.sites] == ["layers.1.q_proj"]
    assert [*found.copies] == ["layers.0.q_proj.weight"]
    assert "no smaller" in found.warnings[0]


def test_names_that_end_alike_keep_their_ranks(shop: Shop) -> None:
    names = ["0.q", "a.0.q", "b.a.0.q", "a_0.q"]
    base = {f"{name}.weight": draw(16, 16) for name in names}
    made = {**base}
    for rank, name in enumerate(names, 1):
        made[f"{name}.weight"] = base[f"{name}.weight"] + draw(16, rank) @ draw(rank, 16)
    found = shop.extract(base, made, energy=0.99999)
    shop.check(found, made)
    assert [layer.rank for layer in found.layers] == [
        names.index(layer.module) + 1 for layer in found.layers
    ]


def test_some_of_the_layers_that_end_alike(shop: Shop) -> None:
    base = {f"{name}.weight": draw(8, 8) for name in ("0.q", "a.0.q", "a.1.q", "1.q")}
    made = tuned(base, "0.q.weight", "a.1.q.weight")
    found = shop.extract(base, made, rank=4)
    shop.check(found, made)
    assert found.adapter.sites.keys() == {"0.q", "a.1.q"}


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 20}


@pytest.mark.parametrize("embeddings", [False, True])
def test_tied_embeddings_stay_one(shop: Shop, embeddings: bool) -> None:
    base = {f"model.{k}": v for k, v in model().items() if k != "lm_head.weight"}
    made = tuned(base, "model.embed_tokens.weight", "model.layers.0.q_proj.weight")
    found = shop.extract(base, made, LLAMA, rank=8, embeddings=embeddings)
    assert found.adapter.extra.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    shop.check(found, made)
    merged = read_safetensors(shop.folder / "merged" / "model.safetensors")
    assert "lm_head.weight" not in merged


def test_a_head_that_was_parted_from_its_embedding(shop: Shop) -> None:
    base = {"model.embed_tokens.weight": draw(20, 8), "model.fc.weight": draw(8, 8)}
    made = base | {"lm_head.weight": draw(20, 8)}
    one = shop.write("base", base, LLAMA)
    two = shop.write("model", made, LLAMA | {"tie_word_embeddings": False})
    found = extract(one, two, shop.folder / "out", rank=8)
    shop.check(found, made)
    assert [*found.copies] == ["lm_head.weight"]


def test_a_grown_vocabulary_is_saved_whole(shop: Shop) -> None:
    base = model()
    made = tuned(base, "layers.0.q_proj.weight")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        made[name] = np.concatenate([base[name], draw(2, 8)])
    found = shop.extract(base, made, rank=8, embeddings=True)
    shop.check(found, made)
    assert found.copies == {"embed_tokens.weight": (22, 8), "lm_head.weight": (22, 8)}
    assert any("has 22 rows, in the base 20" in text for text in found.warnings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
def test_dtypes(shop: Shop, stored: str, dtype: str) -> None:
    base = {k: astype(v, stored) for k, v in model().items()}
    made = {k: astype(v, stored) for k, v in tuned(model(), *model()).items()}
    found = shop.extract(base, made, rank=2, dtype=dtype)
    assert {a.dtype.name for p in found.adapter.sites.values() for a in p.values()} == {dtype}
    assert {a.dtype.name for a in found.adapter.extra.values()} == {stored}
    loaded = Adapter.load(shop.folder / "out")
    for layer in found.layers:
        p = loaded.sites[layer.module]
        a, b = (
            p[f"lora_{x}.weight"].astype("f8").reshape(shape)
            for x, shape in (("A", (2, -1)), ("B", (-1, 2)))
        )
        delta = made[layer.tensor].astype("f8") - base[layer.tensor].astype("f8")
        away = np.linalg.norm(delta.reshape(len(b), -1) - b @ a)
        assert layer.residual == pytest.approx(away, rel=1e-5)


def test_rounding_between_dtypes_is_told_of(shop: Shop) -> None:
    base = model()
    made = base | {"layers.0.fc.weight": base["layers.0.fc.weight"].astype("float16")}
    made["norm.weight"] = base["norm.weight"].astype("float64")
    found = shop.extract(base, made, rank=8)
    assert [layer.module for layer in found.layers] == ["layers.0.fc"]
    assert "1 tensors are float32 in the base and float16 in the model" in found.warnings[0]


def test_factors_that_overflow_are_refused(shop: Shop) -> None:
    base = {"fc.weight": np.zeros((4, 4), "float32")}
    with pytest.raises(VerifyError, match="fc: the factors cannot be stored: they overflow"):
        shop.extract(base, {"fc.weight": np.full((4, 4), 1e30, "f4")}, rank=1, dtype="fp16")
    assert not (shop.folder / "out").exists()


def test_everything_that_does_not_fit_is_named_at_once(shop: Shop) -> None:
    base = model()
    made = base | {"norm.weight": draw(9), "layers.0.fc.weight": draw(8, 16)}
    with pytest.raises(ShapeError) as error:
        shop.extract(base, made, rank=2)
    assert "norm.weight: shape (9,) cannot be compared with the base's (8,)" in str(error.value)
    assert "layers.0.fc.weight: shape (8, 16)" in str(error.value)


def test_tensors_of_one_side(shop: Shop) -> None:
    base = model()
    made = tuned(base, "layers.0.q_proj.weight") | {"new.weight": draw(3, 3)}
    del made["layers.1.v_proj.weight"]
    with pytest.raises(TargetError) as error:
        shop.extract(base, made, rank=2)
    assert "new.weight: " in str(error.value)
    assert "layers.1.v_proj.weight: " in str(error.value)
    one, two = shop.folder / "base", shop.folder / "model"
    found = extract(one, two, rank=2, strict=False)
    assert len(found.left) == 2
    assert found.adapter.sites.keys() == {"layers.0.q_proj"}


def test_parameters_beside_adapted_layers_have_no_place(shop: Shop) -> None:
    base = model() | {"layers.0.scale": draw(3), "gain": draw(1)}
    made = tuned(base, "layers.0.scale", "gain", "layers.0.q_proj.weight")
    with pytest.raises(TargetError) as error:
        shop.extract(base, made, rank=2)
    assert "layers.0.scale: differs, and cannot be carried" in str(error.value)
    assert "gain: differs, and cannot be carried" in str(error.value)


def test_damaged_and_quantised_tensors(shop: Shop) -> None:
    base = model() | {"layers.0.q_proj.weight_scale": draw(1)}
    made = tuned(base, "layers.0.q_proj.weight", "norm.weight", "lm_head.weight")
    made["norm.weight"][0] = np.nan
    with pytest.raises(TargetError) as error:
        shop.extract(base, made, rank=2)
    assert "norm.weight: cannot be compared" in str(error.value)
    assert str(error.value).count("layers.0.q_proj.weight_scale quantises it") == 1


def test_equal_models_are_refused(shop: Shop) -> None:
    with pytest.raises(TargetError, match="does not differ"):
        shop.extract(model_ := model(), {k: v + 0.0 for k, v in model_.items()}, rank=2)


def test_a_size_must_be_asked_for(shop: Shop) -> None:
    with pytest.raises(UsageError, match="give rank= or energy="):
        shop.extract(model(), model())


def test_an_existing_output_is_refused_first(shop: Shop) -> None:
    base = model()
    (shop.folder / "out").mkdir()
    (shop.folder / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(StorageError, match="it exists"):
        shop.extract(base, tuned(base, "norm.weight"), rank=2)


def test_on_every_library(shop: Shop, lib: Lib) -> None:
    if not lib.has_values or lib.row == "strict:minimal":
        pytest.skip("shapes alone, or no decompositions, decide nothing")
    base = {"a.weight": draw(160, 150), "b.weight": draw(8, 8)}
    change = draw(160, 3) @ draw(3, 150) + draw(160, 150, size=0.01)
    made = base | {"a.weight": base["a.weight"] + change, "b.weight": draw(8, 8)}
    found = shop.extract(base, made, rank=3, backend=lib.backend)
    shop.check(found, made)
    again = extract(shop.folder / "base", shop.folder / "model", rank=3)
    for name, p in again.adapter.sites.items():
        for key, value in p.items():
            np.testing.assert_allclose(found.adapter.sites[name][key], value, atol=1e-4)


@given(seed=st.integers(0, 2**32), count=st.integers(0, 14), rank=st.integers(1, 9))
@settings(max_examples=20)
def test_any_set_of_changes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, rank: int
) -> None:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    base = model()
    names = np.random.default_rng(seed).permutation([*base])[: count + 1]
    made = tuned(base, *map(str, names))
    shop.check(shop.extract(base, made, rank=rank), made)


def test_memory_does_not_grow_with_the_number_of_layers(shop: Shop) -> None:
    def peak(count: int) -> int:
        base = {f"l.{i}.q.weight": draw(300, 300).astype(ml_dtypes.bfloat16) for i in range(count)}
        made = tuned(base, *base)
        one, two = shop.write(f"base{count}", base), shop.write(f"model{count}", made)
        del base, made
        tracemalloc.start()
        extract(one, two, rank=2)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    extract_once = peak(2)
    assert peak(12) - extract_once < 300 * 300 * 4


def test_short_names_mean_what_the_long_ones_did() -> None:
    def ends(name: str, end: str) -> bool:
        return name == end or name.endswith(f".{end}")

    assert shortened(["a.q", "b.q"], ["a.q", "b.q", "a.k"], ends) == ["q"]
    assert shortened(["a.q"], ["a.q", "b.q"], ends) == ["a.q"]
