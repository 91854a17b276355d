"""Combining adapters: the exact weighted sum for every method, and what is said of the result."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import combine
from peft_any.adapter import Adapter
from peft_any.backend import to_numpy
from peft_any.errors import (
    ConfigError,
    ShapeError,
    StorageError,
    TargetError,
    UsageError,
    VerifyError,
)
from peft_any.io.safetensors import write_safetensors
from peft_any.layer import Dense, Site
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.lora import LoraConfig
from peft_any.methods.oft import OFTConfig
from peft_any.methods.prompt_tuning import PromptTuningConfig
from peft_any.methods.vera import VeraConfig
from peft_any.model import PeftModel
from peft_any.oneshot import merge
from peft_any.testing import Lib
from tests.cases import CASES, Case

WEIGHTS = (0.7, -0.3)
rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def weights_of(base: Dense) -> dict[str, np.ndarray]:
    """Lay a layer out as a checkpoint."""
    tensors = {base.site.weight: np.ascontiguousarray(base.stored())}
    if base.bias is not None:
        tensors[base.site.bias_name] = base.bias
    return tensors


def adapter_of(case: Case, base: Dense, seed: int) -> Adapter:
    """Make an adapter with one site, as training leaves it."""
    p = case.params(base, seed, "float64")
    own = {*case.config.at(case.site).shapes(case.site), *case.config.frozen}
    shared = {k: p.pop(k) for k in [*p] if k not in own or k in ("vera_A", "vera_B")}
    return Adapter(case.config, {case.site.name: p}, shared)


def effect_of(case: Case, base: Dense, adapter: Adapter) -> np.ndarray:
    """Give what merging adds to the flat weight."""
    config = case.config.at(case.site)
    p = {**adapter.shared, **adapter.sites[case.site.name]}
    return np.asarray(config.effect(p, base)[0])


@rows
def test_the_sum_is_exact_for_every_method(case: Case) -> None:
    base = case.base(3, dtype="float64")
    kinds = {case.site.name: case.site}
    pairs = [(adapter_of(case, base, i), w) for i, w in enumerate(WEIGHTS, 1)]
    options: Any = {"base": weights_of(base), "kinds": kinds, "rank": 10_000}
    if case.site.groups > 1:
        with pytest.raises(ConfigError, match=r"several groups|a Norm layer|stacks of experts"):
            combine(pairs, **options)
        return
    made, record = combine(pairs, **options)
    assert made.config.peft_type == "LORA"
    want = sum(w * effect_of(case, base, a) for a, w in pairs)
    merged = merge(weights_of(base), made, kinds=kinds)
    got = Dense.of(merged[case.site.weight], None, case.site).weight - base.weight
    size, rounding = np.linalg.norm(want), 1e-15 * np.linalg.norm(base.weight)
    assert np.linalg.norm(got - want) <= 1e-12 * size + rounding
    (layer,) = record.layers
    assert layer.norm == pytest.approx(size, rel=1e-12)
    assert layer.discarded < 1e-25
    assert (layer.error is None) == (size == 0)
    assert (layer.error or 0.0) < 1e-13


@given(data=st.data())
def test_unlike_loras_are_summed_exactly(data: st.DataObject) -> None:
    """Ranks, alphas, rsLoRA, patterns and layers differ; the oracle is the formula, in NumPy."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    sizes = {"a.q": (7, 9), "b.q": (12, 5), "a.wte": (6, 11), "a.conv": (5, 4, 3, 2)}
    pairs, want = [], {name: np.zeros(shape) for name, shape in sizes.items()}
    for _ in range(draw(st.integers(1, 3))):
        weight = round(draw(st.floats(-2, 2)), 3)
        names = draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, unique=True))
        ranks = {n: draw(st.integers(1, 4)) for n in names}
        alphas = {n: draw(st.sampled_from([0.5, 3.0, 16.0])) for n in names}
        rs = draw(st.booleans())
        config = LoraConfig(
            r=9, use_rslora=rs, rank_pattern=ranks, alpha_pattern=alphas, target_modules=names
        )
        sites = {}
        for name in names:
            (m, n, *kernel), r = sizes[name], ranks[name]
            a = rng.standard_normal((r, n, *kernel)).astype(dtype)
            b = rng.standard_normal((m, r, *(1 for _ in kernel))).astype(dtype)
            suffixes = ("lora_A.weight", "lora_B.weight")
            if name == "a.wte":
                suffixes = ("lora_embedding_A", "lora_embedding_B")
            sites[name] = dict(zip(suffixes, (a, b), strict=True))
            scale = alphas[name] / (r**0.5 if rs else r)
            product = b.astype("float64").reshape(m, r) @ a.astype("float64").reshape(r, -1)
            want[name] += weight * scale * product.reshape(sizes[name])
        pairs.append((Adapter(config, sites), weight))
    made, record = combine(pairs)
    assert set(made.sites) == {name for a, _ in pairs for name in a.sites}
    for layer in record.layers:
        site = Site("x", *sizes[layer.layer][1::-1])
        if layer.layer == "a.wte":
            site = Site("x", 11, 6, "Embedding")
        if layer.layer == "a.conv":
            site = Site("x", 4, 5, "Conv2d", (3, 2))
        own: Any = made.config.at(replace(site, name=layer.layer))  # type: ignore[attr-defined]
        assert own.r == layer.rank
        assert own.scaling == 1.0
        p = {k: v.astype("float64") for k, v in made.sites[layer.layer].items()}
        assert {k: v.shape for k, v in p.items()} == own.shapes(site)
        got = own.delta(p, site).reshape(want[layer.layer].shape)
        size = float(np.linalg.norm(want[layer.layer]))
        unit = 6e-8 if dtype == "float32" else 1.2e-16
        parts = sum(
            abs(w)
            * np.linalg.norm(
                a.config.at(replace(site, name=layer.layer)).delta(
                    {k: abs(v.astype("float64")) for k, v in a.sites[layer.layer].items()},
                    site,
                )
            )
            for a, w in pairs
            if layer.layer in a.sites
        )
        assert np.linalg.norm(got - want[layer.layer]) <= 64 * unit * parts
        assert layer.norm == pytest.approx(size, rel=1e-9, abs=1e-13 * parts)
        if layer.error is not None:
            assert layer.error * size == pytest.approx(
                np.linalg.norm(got - want[layer.layer]), rel=1e-3, abs=1e-14 * parts
            )


def lora(seed: int, r: int = 3, dtype: str = "float32", **fields: Any) -> Adapter:
    """Make a LoRA on one layer of 10 outputs and 8 inputs."""
    rng = np.random.default_rng(seed)
    p = {
        "lora_A.weight": rng.standard_normal((r, 8)).astype(dtype),
        "lora_B.weight": rng.standard_normal((10, r)).astype(dtype),
    }
    config = LoraConfig(**{"r": r, "lora_alpha": 2.0 * r, "target_modules": ["fc"], **fields})
    return Adapter(config, {"fc": p})


def delta(adapter: Adapter) -> np.ndarray:
    """Multiply the factors of `lora`'s layer out, in double precision."""
    config: Any = adapter.config.at(Site("fc", 8, 10))  # type: ignore[attr-defined]
    p = {k: np.asarray(to_numpy(v), "float64") for k, v in adapter.sites["fc"].items()}
    out: np.ndarray = config.delta(p, Site("fc", 8, 10))
    return out


def test_a_rank_gives_the_best_approximation() -> None:
    pair = [(lora(1), 0.7), (lora(2), -0.3)]
    whole = 0.7 * delta(pair[0][0]) - 0.3 * delta(pair[1][0])
    s = np.linalg.svd(whole, compute_uv=False)
    for rank in (1, 3, 5):
        made, record = combine(pair, rank=rank)
        layer = record.layers[0]
        left = float(np.linalg.norm(s[rank:]))
        assert (layer.ranks, layer.rank) == ((3, 3), rank)
        assert np.linalg.norm(delta(made) - whole) == pytest.approx(left, rel=1e-6)
        assert layer.error == pytest.approx(left / np.linalg.norm(s), rel=1e-6)
        assert layer.discarded == pytest.approx((left / np.linalg.norm(s)) ** 2, rel=1e-6)
        assert record.error == layer.error == layer.off_sum
    share = float(np.sum(s[:2] ** 2) / np.sum(s**2))
    assert combine(pair, energy=share - 1e-6)[0].config.r == 2  # type: ignore[attr-defined]
    assert combine(pair, energy=share + 1e-6)[0].config.r == 3  # type: ignore[attr-defined]
    assert combine(pair, energy=share + 1e-6, rank=1)[0].config.r == 1  # type: ignore[attr-defined]


def test_adapters_that_cancel_leave_zeros() -> None:
    one = lora(1)
    for options in ({}, {"rank": 2}, {"energy": 0.9}):
        made, record = combine([(one, 1.0), (one, -1.0)], **options)
        scale = np.linalg.norm(delta(one))
        assert np.linalg.norm(delta(made)) <= 1e-6 * scale
        assert made.sites["fc"]["lora_A.weight"].shape[0] >= 1
        assert (record.layers[0].norm or 0.0) <= 1e-14 * scale


def test_layers_of_their_own_keep_their_rank_and_name() -> None:
    """A pattern's plain name would also match what ends with it."""
    p = {"lora_A.weight": np.ones((2, 3), "float32"), "lora_B.weight": np.ones((4, 2), "float32")}
    q = {"lora_A.weight": np.ones((1, 3), "float32"), "lora_B.weight": np.ones((4, 1), "float32")}
    patterns = {"rank_pattern": {"^fc": 1}, "alpha_pattern": {"^fc": 1}}
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["fc"], **patterns)
    given = Adapter(config, {"a.fc": p, "b.fc": p, "fc": q})
    made, record = combine(given)
    shown: Any = made.config
    assert (shown.r, shown.rank_pattern, shown.alpha_pattern) == (2, {"^fc": 1}, {"^fc": 1})
    assert record.ranks == {1: 1, 2: 2}
    assert shown.target_modules == ["fc"]


def test_targets_are_united_or_named() -> None:
    one, two = lora(1), lora(2)
    assert combine([one, two])[0].config.target_modules == ["fc"]  # type: ignore[attr-defined]
    whole = two.replace(config=replace(two.config, target_modules=".*fc"))
    assert combine([one, whole])[0].config.target_modules == ["fc"]  # type: ignore[attr-defined]
    for layers in ([0], 0):
        some = two.replace(config=replace(two.config, layers_to_transform=layers))
        renamed = some.replace(sites={"h.0.fc": two.sites["fc"]})
        made, _ = combine([one, renamed])
        assert made.config.target_modules == ["fc", "h.0.fc"]  # type: ignore[attr-defined]


def test_rows_of_a_table_that_is_saved_along_are_summed() -> None:
    base = {"embed_tokens.weight": np.ones((5, 2), "float32"), "fc.weight": np.ones((4, 2))}
    rows = {"embed_tokens": np.full((1, 2), 3.0, "float32")}
    config = LoraConfig(r=1, target_modules=["fc"], trainable_token_indices=[2])
    p = {"lora_A.weight": np.ones((1, 2), "float32"), "lora_B.weight": np.ones((4, 1), "float32")}
    along = Adapter(
        config, {"fc": p}, {}, {"embed_tokens.weight": base["embed_tokens.weight"]}, rows
    )
    made, _ = combine([(along, 0.5), (along, 0.5)], base=base)
    want = np.ones((5, 2))
    want[2] = 3
    np.testing.assert_array_equal(made.extra["embed_tokens.weight"], want)


def test_stacks_of_experts_are_refused_by_name_as_a_file_has_them() -> None:
    base = {"m.experts.up_proj": np.ones((2, 3, 4), "float32")}
    p = {"lora_A.weight": np.ones((2, 4), "float32"), "lora_B.weight": np.ones((3, 2), "float32")}
    config = LoraConfig(r=1, target_modules=[], target_parameters=["experts.up_proj"])
    nameless = Adapter(config, {"m.experts": p})
    with pytest.raises(ConfigError, match=r"m\.experts\.up_proj: stacks of experts"):
        combine([nameless], base=base)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("exact", {}),
        ("exact", {"rank": 2}),
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("svd", {"rank": 2}),
        ("ties_svd", {"density": 0.4, "rank": 3}),
        ("dare_ties_svd", {"density": 0.4, "energy": 0.9, "seed": 3}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_clamp": 0.9}),
    ],
)
def test_libraries_agree(lib: Lib, method: str, options: dict[str, Any]) -> None:
    if reason := lib.lacks(("linalg",)):
        pytest.skip(reason)
    if not lib.has_values:
        pytest.skip("a record cannot be made where there are no values")
    host = [lora(1, dtype="float64"), lora(2, dtype="float64")]
    want, told = combine(list(zip(host, WEIGHTS, strict=True)), method=method, **options)
    there = [a.replace(sites={n: lib.array(p) for n, p in a.sites.items()}) for a in host]
    made, record = combine(list(zip(there, WEIGHTS, strict=True)), method=method, **options)
    product = made.sites["fc"]["lora_B.weight"] @ made.sites["fc"]["lora_A.weight"]
    p = want.sites["fc"]
    lib.check(product, p["lora_B.weight"] @ p["lora_A.weight"], rtol=1e-12)
    assert record.layers[0].off_sum == pytest.approx(told.layers[0].off_sum, rel=1e-9, abs=1e-14)


def test_what_linear_leaves_over_is_said() -> None:
    pair = [(lora(1), 0.7), (lora(2), -0.3)]
    made, record = combine(pair, method="linear")
    whole = 0.7 * delta(pair[0][0]) - 0.3 * delta(pair[1][0])
    cross = np.linalg.norm(delta(made) - whole) / np.linalg.norm(whole)
    assert cross > 0.1
    assert record.layers[0].off_sum == pytest.approx(cross, rel=1e-6)
    assert (record.layers[0].error or 0.0) < 1e-7


def test_random_pruning_is_seeded_and_sparse() -> None:
    pair = [(lora(1), 1.0), (lora(2), 1.0)]
    options: Any = {"method": "dare_linear", "density": 0.5}
    one, again, other = (combine(pair, **options, seed=seed)[0].sites["fc"] for seed in (4, 4, 5))
    for name, array in one.items():
        np.testing.assert_array_equal(array, again[name])
        assert np.any(array != other[name])


def test_gains_stay_gains() -> None:
    base = np.random.default_rng(0).standard_normal((4, 3))
    bias = np.ones(4)

    def ia3(seed: int) -> Adapter:
        gain = 1 + 0.2 * np.random.default_rng(seed).standard_normal((4, 1))
        return Adapter(
            IA3Config(target_modules=["fc"], feedforward_modules=[]), {"fc": {"ia3_l": gain}}
        )

    pair = [(ia3(1), 0.7), (ia3(2), -0.3)]
    weights = {"fc.weight": base, "fc.bias": bias}
    made, record = combine(pair)
    assert made.config.peft_type == "IA3"
    merged = merge(weights, made)
    effects = [(merge(weights, a), w) for a, w in pair]
    for name, value in weights.items():
        want = value + sum(w * (m[name] - value) for m, w in effects)
        np.testing.assert_allclose(merged[name], want, rtol=1e-13)
    assert record.layers[0].rank is None
    plain, _ = combine(pair, method="linear")
    gains = [a.sites["fc"]["ia3_l"] for a, _ in pair]
    np.testing.assert_allclose(
        plain.sites["fc"]["ia3_l"], 0.7 * gains[0] - 0.3 * gains[1], rtol=1e-14
    )
    alone, _ = combine(pair[:1], method="linear")
    np.testing.assert_allclose(alone.sites["fc"]["ia3_l"], 0.7 * gains[0], rtol=1e-14)
    as_lora, _ = combine(pair, base=weights, rank=3)
    assert as_lora.config.peft_type == "LORA"
    both = merge(weights, as_lora)
    for name in weights:
        np.testing.assert_allclose(both[name], merged[name], rtol=1e-12, atol=1e-13)


def test_methods_are_mixed_through_the_base() -> None:
    weights = {"fc.weight": np.random.default_rng(0).standard_normal((10, 8))}
    model = PeftModel(weights)
    rotation = model.add("b", OFTConfig(oft_block_size=4, target_modules=["fc"]))
    turned = 0.1 * np.random.default_rng(1).standard_normal(
        rotation.sites["fc"]["oft_R.weight"].shape
    )
    rotation = rotation.replace(sites={"fc": {"oft_R.weight": turned}})
    plain = lora(1, dtype="float64")
    made, record = combine([(plain, 0.5), (rotation, 2.0)], base=weights)
    want = (
        weights["fc.weight"]
        + 0.5 * delta(plain)
        + 2.0 * (merge(weights, rotation)["fc.weight"] - weights["fc.weight"])
    )
    np.testing.assert_allclose(merge(weights, made)["fc.weight"], want, rtol=1e-11, atol=1e-13)
    assert record.layers[0].ranks == (3, 8)
    with pytest.raises(TargetError, match=r"fc: OFT's arrays do not tell .* base="):
        combine([(plain, 0.5), (rotation, 2.0)], rank=4)


def copies(name: str, value: float, seed: int = 1, **fields: Any) -> Adapter:
    """Make an adapter that also carries a whole tensor."""
    adapter = lora(seed, modules_to_save=["head"], **fields)
    return adapter.replace(extra={name: np.full((2, 2), value, "float32")})


def test_a_layer_that_another_adapter_carries_whole_stays_whole() -> None:
    """Hugging Face PEFT loads no file that has both factors and a copy of a layer."""
    new = np.random.default_rng(5).standard_normal((10, 8)).astype("float32")
    fields = {"target_modules": ["other"], "modules_to_save": ["fc"]}
    whole = lora(1, **fields).replace(
        sites={"other": lora(1).sites["fc"]}, extra={"fc.weight": new}
    )
    made, _ = combine([(lora(2), -0.5), (whole, 1.0)])
    assert [*made.sites] == ["other"]
    want = new - 0.5 * delta(lora(2))
    np.testing.assert_allclose(made.extra["fc.weight"], want, rtol=1e-5, atol=1e-6)
    rows = lora(1, target_modules=["other"], trainable_token_indices={"fc": [1]})
    rows = rows.replace(sites={"other": rows.sites["fc"]}, tokens={"fc": new[:1]})
    with pytest.raises(TargetError, match="fc: one adapter adapts it and another brings new rows"):
        combine([lora(2), rows])


def test_copies_need_the_base_unless_they_are_alone() -> None:
    one, two = copies("head.weight", 3.0), copies("head.weight", 5.0, 2)
    made, record = combine([(one, 1.0), (lora(2), 0.5)])
    np.testing.assert_array_equal(made.extra["head.weight"], one.extra["head.weight"])
    assert made.config.modules_to_save == ["head"]  # type: ignore[attr-defined]
    assert record.copies == {"head.weight": ("<LORA>",)}
    with pytest.raises(TargetError, match=r"head.weight: <LORA> carries .* weighted by 0.5"):
        combine([(one, 0.5), (lora(2), 0.5)])
    with pytest.raises(TargetError, match=r"head.weight: <LORA> and <LORA>#2 carry .*\n.*base="):
        combine([one, two])
    weights = {"fc.weight": np.zeros((10, 8)), "head.weight": np.ones((2, 2), "float32")}
    made, _ = combine([(one, 0.5), (two, 2.0)], base=weights)
    np.testing.assert_array_equal(made.extra["head.weight"], np.full((2, 2), 1 + 0.5 * 2 + 2 * 4.0))
    assert made.extra["head.weight"].dtype == np.float32


def test_what_was_only_saved_along_is_taken_over() -> None:
    one, two = (lora(i).replace(extra={"wte.weight": np.ones((2, 2), "float32")}) for i in (1, 2))
    made, _ = combine([(one, 0.5), (two, 0.5)])
    np.testing.assert_array_equal(made.extra["wte.weight"], one.extra["wte.weight"])
    changed = two.replace(extra={"wte.weight": np.zeros((2, 2), "float32")})
    with pytest.raises(TargetError, match=r"wte\.weight"):
        combine([(one, 0.5), (changed, 0.5)])


def test_rows_of_embeddings_are_united() -> None:
    def rows(seed: int, indices: list[int], value: float) -> Adapter:
        adapter = lora(seed, trainable_token_indices={"wte": indices})
        return adapter.replace(tokens={"wte": np.full((len(indices), 3), value, "float32")})

    one, two = rows(1, [1, 4], 2.0), rows(2, [4, 0], 3.0)
    with pytest.raises(TargetError, match=r"wte\.weight"):
        combine([one, two])
    made, _ = combine([(one, 1.0), (lora(3), 2.0)])
    assert made.config.trainable_token_indices == {"wte": [1, 4]}  # type: ignore[attr-defined]
    weights = {"fc.weight": np.zeros((10, 8)), "wte.weight": np.ones((5, 3), "float32")}
    made, _ = combine([(one, 1.0), (two, -1.0)], base=weights)
    assert made.config.trainable_token_indices == {"wte": [0, 1, 4]}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(made.tokens["wte"][:, 0], [1 - 2, 1 + 1, 1 + 1 - 2])


def test_files_appear_whole_with_a_record(tmp_path: Path) -> None:
    lora(1).save(tmp_path / "a")
    lora(2, 5).save(tmp_path / "b")
    made, record = combine({tmp_path / "a": 0.7, tmp_path / "b": -0.3}, tmp_path / "out", rank=4)
    again = Adapter.load(tmp_path / "out")
    np.testing.assert_array_equal(delta(again), delta(made))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "combine_receipt.json"}
    written = json.loads((tmp_path / "out" / "combine_receipt.json").read_text())
    assert written == record.to_dict()
    assert written["kind"] == "combine"
    assert [a["weight"] for a in written["adapters"]] == [0.7, -0.3]
    assert all(a["files"]["adapter_config.json"].startswith("sha256:") for a in written["adapters"])
    assert written["layers"][0]["ranks"] == [3, 5]
    with pytest.raises(StorageError, match="it exists"):
        combine(tmp_path / "a", tmp_path / "out")
    with pytest.raises(UsageError, match="it is the input itself"):
        combine(tmp_path / "a", tmp_path / "a", overwrite=True)
    combine(tmp_path / "a", tmp_path / "out", overwrite=True)
    np.testing.assert_allclose(delta(Adapter.load(tmp_path / "out")), delta(lora(1)), rtol=1e-6)


def test_a_checkpoint_serves_as_the_base(tmp_path: Path) -> None:
    weights = {"fc.weight": np.random.default_rng(0).standard_normal((10, 8)).astype("float32")}
    write_safetensors(tmp_path / "model.safetensors", weights)
    magnitude = np.linalg.norm(weights["fc.weight"], axis=1).astype("float32")
    dora = lora(1, use_dora=True)
    dora = dora.replace(sites={"fc": {**dora.sites["fc"], "lora_magnitude_vector": magnitude}})
    made, record = combine([(dora, 2.0)], base=tmp_path / "model.safetensors")
    want = weights["fc.weight"] + 2.0 * (merge(weights, dora)["fc.weight"] - weights["fc.weight"])
    np.testing.assert_allclose(merge(weights, made)["fc.weight"], want, atol=1e-5)
    assert record.base["fingerprint"]
    with pytest.raises(ConfigError, match=r"fc: LORA changes a layer .* base="):
        combine([(dora, 2.0)])


def test_a_result_that_overflows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="overflows float16"):
        combine([(lora(1), 1e6)], tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "tiess"}, "nearest: 'ties'"),
        ({"method": "ties"}, "needs density="),
        ({"method": "ties", "density": 0.0}, "density=0.0"),
        ({"density": 0.5}, "density=0.5 has no effect"),
        ({"method": "linear", "rank": 2}, "take method 'exact'"),
        ({"method": "ties", "density": 0.5, "rank": 2}, "take method 'ties_svd'"),
        ({"svd_clamp": 0.5}, "svd_clamp=0.5"),
        ({"method": "svd", "svd_clamp": 1.5}, "svd_clamp=1.5"),
        ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed=-1"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "most"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ConfigError), match=re.escape(says)):
        combine([lora(1), lora(2)], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_adapters_that_cannot_meet_are_refused() -> None:
    rng = np.random.default_rng(0)
    wide = {"lora_A.weight": rng.random((3, 9)), "lora_B.weight": rng.random((10, 3))}
    with pytest.raises(ShapeError, match=r"fc: <LORA>#2 has a layer of 10 × 9 .* 10 × 8"):
        combine([lora(1), lora(2).replace(sites={"fc": wide})])
    with pytest.raises(ConfigError, match=r"fc: linear .* ranks \[2, 3\]"):
        combine([lora(1), lora(2, 2)], method="linear")
    broken = lora(1).replace(sites={"fc": {"lora_A.weight": rng.random((3, 8))}})
    with pytest.raises(TargetError, match=r"<LORA>: fc: LORA's arrays do not tell"):
        combine(broken)
    prompt = Adapter(
        PromptTuningConfig(num_virtual_tokens=1, token_dim=2),
        shared={"prompt_embeddings": rng.random((1, 2))},
    )
    with pytest.raises(ConfigError, match="virtual tokens"):
        combine([lora(1), prompt])
    with pytest.raises(UsageError, match="no adapter"):
        combine([])
    with pytest.raises(UsageError, match="cannot be a weight"):
        combine([(lora(1), float("nan"))])
    vera = Adapter(
        VeraConfig(r=2), {"fc": {"vera_lambda_d": rng.random(2), "vera_lambda_b": rng.random(4)}}
    )
    with pytest.raises(TargetError, match=r"VERA's arrays do not tell .* base="):
        combine(vera)


def test_the_base_that_adapters_were_made_on_is_remembered() -> None:
    weights = {"fc.weight": np.random.default_rng(0).standard_normal((10, 8)).astype("float32")}
    config = LoraConfig(r=2, target_modules=["fc"])
    one, two = (PeftModel(weights).add("a", config, seed=i) for i in (1, 2))
    made, _ = combine([one, two])
    assert made.metadata["peft_any.base"] == one.metadata["peft_any.base"]
    assert "peft_any.base" not in combine([one, lora(3)])[0].metadata
    other = {"fc.weight": weights["fc.weight"] + 1}
    with pytest.raises(TargetError, match=r"<LORA>, <LORA>#2: made on another base"):
        combine([one, two], base=other)
    combine([one, two], base=other, any_base=True)
    combine([one, two], base=weights)
