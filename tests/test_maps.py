"""Names: rules, renamed adapters, fused layers and their parts; merges through `names`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any import (
    Adapter,
    PeftModel,
    inspect_adapter,
    merge_checkpoint,
    read_safetensors,
    verify_checkpoint,
    write_safetensors,
)
from peft_any.backend import to_numpy
from peft_any.errors import ConfigError, FormatError, ShapeError, TargetError, UsageError
from peft_any.layer import Dense, Site, widen
from peft_any.methods.adalora import AdaLoraConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lora import LoraConfig
from peft_any.naming.fusing import Pieces
from peft_any.naming.heads import Heads
from peft_any.naming.regrouping import split_modules
from peft_any.naming.rules import PRESETS, Rename, read_rules
from peft_any.surgery.restacking import put_together
from peft_any.testing import Lib
from tests.cases import CASES, Case

QKV = ("q_proj", "k_proj", "v_proj")
LINEAR = [case for case in CASES if case.site.kind == "Linear"]
SPLITS = [
    (case, groups)
    for case in LINEAR
    for groups in (1, 4)
    if case.config.separable and case.site.n_out % groups == 0 and case.site.n_out // groups >= 3
]


def merged(adapter: Adapter, name: str, base: Dense) -> Dense:
    """Merge one site of an adapter into a layer."""
    config = adapter.config.at(base.site)
    (params,), wide = widen([{**adapter.shared, **adapter.sites[name]}], base)
    return config.merge(params, wide)


def pieces_of(site: Site, groups: int) -> Pieces:
    """Cut a site's outputs into three parts, unequal where that is possible."""
    rest = site.n_out // groups
    sizes = (rest - 2 * (rest // 4 or 1), rest // 4 or 1, rest // 4 or 1)
    stem = site.name[: -len(site.name.rpartition(".")[2])]
    return Pieces(tuple(stem + part for part in QKV), tuple(groups * n for n in sizes), groups)


def check_rows(whole: Adapter, parts: Adapter, base: Dense, pieces: Pieces, rtol: float) -> None:
    """Hold the parts' merged weights to the rows of the whole's."""
    want = to_numpy(merged(whole, base.site.name, base).weight)
    rows = []
    for name, weight in zip(pieces.names, pieces.cut(base.weight), strict=True):
        site = Site(name, base.site.n_in, weight.shape[0])
        layer = Dense(weight, np.zeros(weight.shape[0]), site)
        rows.append(to_numpy((merged(parts, name, layer) if name in parts.sites else layer).weight))
    np.testing.assert_allclose(pieces.join(rows), want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize(("case", "groups"), SPLITS, ids=lambda value: getattr(value, "name", None))
def test_the_parts_of_a_split_layer_merge_to_its_rows(case: Case, groups: int) -> None:
    base, pieces = case.base(dtype="float64"), pieces_of(case.site, groups)
    adapter = Adapter(case.config, {case.site.name: case.params(base, dtype="float64")})
    parts = split_modules(adapter, {case.site.name: pieces})
    assert list(parts.sites) == list(pieces.names)
    check_rows(adapter, parts, base, pieces, 1e-12)


@pytest.mark.parametrize(
    "case", [c for c in LINEAR if not c.config.separable], ids=lambda c: c.name
)
def test_a_method_whose_rows_hang_together_is_refused_by_name(case: Case) -> None:
    adapter = Adapter(case.config, {case.site.name: case.params(case.base())})
    last = case.site.name.rpartition(".")[2]
    with pytest.raises(ConfigError, match=f"{case.config.peft_type} cannot be split or fused"):
        adapter.split(last, ("a", "b"), (1, case.site.n_out - 1))


def lora(rng: np.random.Generator, n_in: int, n_out: int, r: int, dtype: str = "float64") -> Any:
    """Draw LoRA factors."""
    a, b = rng.standard_normal((r, n_in)), rng.standard_normal((n_out, r))
    return {"lora_A.weight": a.astype(dtype), "lora_B.weight": b.astype(dtype)}


FLAGS: list[dict[str, Any]] = [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}]


@given(
    st.integers(0, 9999),
    st.tuples(*[st.tuples(st.integers(1, 3), st.integers(1, 4))] * 3),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(FLAGS),
    st.sets(st.sampled_from(QKV), max_size=2),
)
def test_fused_lora_merges_to_the_parts_merged_and_stacked(
    seed: int, shapes: Any, groups: int, flags: Any, absent: set[str]
) -> None:
    rng, n_in = np.random.default_rng(seed), 5
    sizes, ranks = tuple(groups * n for n, _ in shapes), tuple(r for _, r in shapes)
    equal = "lora_bias" in flags
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern=dict(zip(QKV, ranks, strict=True)),
        # one scale where biases are scaled too
        alpha_pattern={} if not equal else {q: 2 * r for q, r in zip(QKV, ranks, strict=True)},
        target_modules=[*QKV],
        **flags,
    )
    sites = {}
    for part, n, r in zip(QKV, sizes, ranks, strict=True):
        params = lora(rng, n_in, n, r)
        if "use_dora" in flags:
            params["lora_magnitude_vector"] = rng.uniform(1, 2, n)
        if equal:
            params["lora_B.bias"] = rng.standard_normal(n)
        if part not in absent:
            sites[f"h.0.{part}"] = params
    parts = Adapter(config, sites)
    if "use_dora" in flags and absent:
        with pytest.raises(ConfigError, match="magnitudes of"):
            parts.fused("qkv", QKV, sizes, groups=groups)
        return
    whole = parts.fused("qkv", QKV, sizes, groups=groups)
    base = Dense(rng.standard_normal((sum(sizes), n_in)), None, Site("h.0.qkv", n_in, sum(sizes)))
    base = base.replace(bias=np.zeros(sum(sizes)))
    pieces = Pieces(tuple(f"h.0.{part}" for part in QKV), sizes, groups)
    if not equal:
        check_rows(whole, parts, base, pieces, 1e-12)
    else:
        moved = merged(whole, "h.0.qkv", base).bias
        shift = [
            2 * sites[name]["lora_B.bias"] if name in sites else np.zeros(n)
            for name, n in zip(pieces.names, sizes, strict=True)
        ]
        np.testing.assert_allclose(moved, pieces.join(shift), rtol=1e-12)
    assert whole.config.target_modules == ["h.0.qkv"]
    again = whole.split("qkv", QKV, sizes, groups=groups)
    check_rows(whole, again, base, pieces, 1e-12) if not equal else None


@pytest.mark.parametrize(
    "config",
    [LoHaConfig(r=2, alpha=3, target_modules=[*QKV]), IA3Config(target_modules=[*QKV])],
    ids=["loha", "ia3"],
)
@pytest.mark.parametrize("absent", [(), ("k_proj",)])
def test_other_methods_by_rows_fuse_exactly(config: Any, absent: tuple[str, ...]) -> None:
    rng, sizes = np.random.default_rng(3), (8, 4, 4)
    sites = {
        f"h.{part}": {
            k: rng.standard_normal(shape)
            for k, shape in config.at(Site(f"h.{part}", 6, n)).shapes(Site("h", 6, n)).items()
        }
        for part, n in zip(QKV, sizes, strict=True)
        if part not in absent
    }
    parts = Adapter(config, sites)
    whole = parts.fused("qkv", QKV, sizes, groups=4)
    base = Dense(rng.standard_normal((16, 6)), None, Site("h.qkv", 6, 16, bias=False))
    check_rows(whole, parts, base, Pieces(tuple(f"h.{p}" for p in QKV), sizes, 4), 1e-12)


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_rotations_of_one_input_fuse_only_where_they_agree(name: str) -> None:
    case = next(case for case in LINEAR if case.name == name)
    base, pieces = case.base(), pieces_of(case.site, 1)
    adapter = Adapter(case.config, {case.site.name: case.params(base)})
    parts = split_modules(adapter, {case.site.name: pieces})
    again = parts.fused(case.site.name, QKV, pieces.sizes)
    for key, array in adapter.sites[case.site.name].items():
        np.testing.assert_array_equal(again.sites[case.site.name][key], array)
    key = f"{name}_R.weight" if name == "oft" else "boft_R"
    turned = {**parts.sites["k_proj"], key: parts.sites["k_proj"][key] + 1}
    other = parts.replace(sites={**parts.sites, "k_proj": turned})
    with pytest.raises(ConfigError, match=rf"{key} acts on the input.*differ"):
        other.fused(case.site.name, QKV, pieces.sizes)


def test_splitting_keeps_the_library_and_its_dtype(lib: Lib) -> None:
    rng = np.random.default_rng(0)
    params = lib.array(lora(rng, 5, 8, 2, "float32"))
    adapter = Adapter(LoraConfig(r=2), {"h.qkv": params})
    parts = adapter.split("qkv", QKV, (4, 2, 2), groups=2)
    fused = parts.fused("qkv", QKV, groups=2)
    full = to_numpy(params["lora_B.weight"]) if lib.has_values else np.zeros((8, 2), "float32")
    table = full.reshape(2, 4, 2)
    for part, at in zip(QKV, (slice(0, 2), slice(2, 3), slice(3, 4)), strict=True):
        lib.check(parts.sites[f"h.{part}"]["lora_B.weight"], table[:, at].reshape(-1, 2), rtol=0)
    assert tuple(fused.sites["h.qkv"]["lora_A.weight"].shape) == (6, 5)
    lib.check(fused.sites["h.qkv"]["lora_B.weight"][:2, :2], full[:2], rtol=0)


def test_numbers_by_name_survive_renaming(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        rank_pattern={r"0\.q": 3, "k": 1},
        alpha_pattern={"1.q": 9},
        target_modules=["q", "k"],
        layers_to_transform=[0, 1],
        modules_to_save=["head"],
        trainable_token_indices={"wte": [1]},
    )
    ranks = {"h.0.q": 3, "h.1.q": 2, "h.0.k": 1, "h.1.k": 1}
    sites = {name: lora(rng, 4, 4, r, "float32") for name, r in ranks.items()}
    adapter = Adapter(
        config, sites, extra={"head.weight": np.ones((3, 4))}, tokens={"wte": np.ones((1, 4))}
    )
    moved = adapter.renamed(lambda n: f"body.{n}".replace(".h.", ".layers.").replace("head", "top"))
    moved.save(tmp_path / "moved")
    again = Adapter.load(tmp_path / "moved")
    for old, r in ranks.items():
        new = f"body.{old}".replace(".h.", ".layers.")
        was, now = config.at(Site(old, 4, 4)), again.config.at(Site(new, 4, 4))
        assert (now.r, now.scaling) == (r, was.scaling)
        np.testing.assert_array_equal(
            again.sites[new]["lora_A.weight"], sites[old]["lora_A.weight"]
        )
    assert list(again.extra) == ["body.top.weight"]
    assert again.config.modules_to_save == ["body.top"]
    assert again.config.trainable_token_indices == {"body.wte": [1]}
    assert again.config.layers_to_transform is None


def test_feed_forward_layers_and_masks_survive_renaming() -> None:
    ia3 = IA3Config(target_modules=["fc", "k"], feedforward_modules=["fc"])
    sites = {"0.fc": {"ia3_l": np.ones((1, 4))}, "0.k": {"ia3_l": np.ones((4, 1))}}
    moved = Adapter(ia3, sites).renamed(lambda n: n.replace("fc", "dense"))
    assert moved.config.is_feedforward(Site("0.dense", 4, 4))
    assert not moved.config.is_feedforward(Site("0.k", 4, 4))
    clash = Adapter(ia3, {"fc": sites["0.fc"], "0.xfc": {"ia3_l": np.ones((4, 1))}})
    clash = clash.replace(config=replace(ia3, feedforward_modules="fc", target_modules=["fc"]))
    moved = clash.renamed(lambda n: n)
    assert moved.config.is_feedforward(Site("fc", 4, 4))
    assert not moved.config.is_feedforward(Site("0.xfc", 4, 4))
    mask = [True, False, True]
    ada = AdaLoraConfig(init_r=3, total_step=9, rank_pattern={"0.q.lora_E": mask})
    moved = Adapter(ada, {"0.q": {}, "1.q": {}}).renamed(lambda n: f"h.{n}")
    assert moved.config.kept("h.0.q") == mask
    assert moved.config.kept("h.1.q") == [True] * 3
    case = next(case for case in CASES if case.name == "adalora")
    base = case.base()
    adapter = Adapter(case.config, {part: case.params(base) for part in ("a", "b")})
    with pytest.raises(ConfigError, match="ADALORA layers cannot be fused"):
        adapter.fused("ab", ("a", "b"))


def test_an_adapter_that_lacks_part_of_the_base_is_not_taken_apart() -> None:
    config = LoraConfig(r=2, init_lora_weights="pissa")
    adapter = Adapter(config, {"qkv": lora(np.random.default_rng(0), 5, 8, 2)})
    with pytest.raises(ConfigError, match="cannot be split or fused without"):
        adapter.split("qkv", QKV, (4, 2, 2))


def test_copies_are_cut_and_joined_too() -> None:
    config = LoraConfig(r=2, target_modules=["qkv"], bias="lora_only", modules_to_save=["out"])
    params = lora(np.random.default_rng(0), 5, 8, 2)
    extra = {"h.qkv.bias": np.arange(8.0), "h.out.weight": np.ones((2, 2))}
    whole = Adapter(config, {"h.qkv": params}, extra=extra)
    parts = whole.split("qkv", QKV, (4, 2, 2), groups=2)
    assert parts.extra["h.k_proj.bias"].tolist() == [2.0, 6.0]
    back = parts.fused("qkv", QKV, (4, 2, 2), groups=2)
    np.testing.assert_array_equal(back.extra["h.qkv.bias"], extra["h.qkv.bias"])
    half = parts.replace(extra={k: v for k, v in parts.extra.items() if "k_proj" not in k})
    with pytest.raises(ConfigError, match=r"none of h\.k_proj"):
        half.fused("qkv", QKV, (4, 2, 2), groups=2)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("nothing", "is no rule"),
        ("=x", "is no rule"),
        ("(a=b", r"^map '\(a=b': '\(a' is not a regular expression: missing"),
        ("a=\\2", "cannot be replaced"),
        ("a=b+c+", "cannot be a module's name"),
        ("qkv=q+q", "a part twice"),
        ("qkv@0=q+k", "0 cannot be"),
        ("lava", "did you mean 'llava'|llava"),
    ],
)
def test_what_is_no_rule_is_refused(rule: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_rules(rule)


def test_rules_come_from_files_mappings_and_presets(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({r"h\.(\d+)": r"layers.\1", "a+b": "ab"}))
    rename, fuse = read_rules(path)
    assert isinstance(rename, Rename)
    assert rename("h.12.fc") == "layers.12.fc"
    assert fuse.parts == ("a", "b")
    assert [rule.label for rule in read_rules([str(path), "x=y"])][-1] == "x=y"
    assert len(read_rules("llava")) == len(PRESETS["llava"])
    path.write_text('{"a": 1}')
    with pytest.raises(UsageError, match="is no map"):
        read_rules(path)
    path.write_text("[")
    with pytest.raises(FormatError):
        read_rules(path)
    assert read_rules("qwen2-vl")[0]("model.language_model.layers.0") == "model.layers.0"
    for name, rules in PRESETS.items():
        assert all(isinstance(rule, Rename) or rule.stacks for rule in read_rules(name)), rules


@pytest.mark.parametrize(
    ("preset", "here", "there"),
    [
        ("vit", "vit.layers.10.mlp.fc2", "vit.encoder.layer.10.output.dense"),
        ("vit", "layers.1.attention.k_proj", "encoder.layer.1.attention.attention.key"),
        ("vit", "layers.1.layernorm_before", "encoder.layer.1.layernorm_before"),
        ("vit", "dinov2.encoder.layer.1.mlp.fc1", "dinov2.encoder.layer.1.mlp.fc1"),
        (
            "swin",
            "encoder.layers.0.blocks.1.mlp.fc1",
            "encoder.layers.0.blocks.1.intermediate.dense",
        ),
        (
            "segformer",
            "stages.0.blocks.1.attention.o_proj",
            "encoder.block.0.1.attention.output.dense",
        ),
        ("gpt-neox", "lm_head", "embed_out"),
    ],
)
def test_presets_know_the_names_in_files(preset: str, here: str, there: str) -> None:
    for rule in read_rules(preset):
        assert isinstance(rule, Rename)
        here = rule(here)
    assert here == there


def test_an_error_suggests_the_preset_that_helps(tmp_path: Path) -> None:
    weights = {"encoder.layer.0.attention.attention.query.weight": np.ones((4, 4), "float32")}
    write_safetensors(tmp_path / "model.safetensors", weights)
    p = {"lora_A.weight": np.ones((1, 4), "float32"), "lora_B.weight": np.ones((4, 1), "float32")}
    config = LoraConfig(r=1, target_modules=["q_proj"])
    adapter = Adapter(config, {"layers.0.attention.q_proj": p})
    with pytest.raises(TargetError, match="all of them are there with --map vit"):
        merge_checkpoint(tmp_path / "model.safetensors", adapter, dry_run=True)
    merge_checkpoint(tmp_path / "model.safetensors", adapter, dry_run=True, names="vit")
    other = Adapter(config, {"layers.1.attention.q_proj": p})
    with pytest.raises(TargetError) as error:
        merge_checkpoint(tmp_path / "model.safetensors", other, dry_run=True)
    assert "--map" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "groups", "rows"),
    [
        ({"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 8}, 4, [8, 8, 8]),
        ({"model_type": "bloom", "n_head": 2, "hidden_size": 8}, 2, [8, 8, 8]),
        (
            {
                "model_type": "falcon",
                "new_decoder_architecture": True,
                "num_attention_heads": 8,
                "num_kv_heads": 2,
                "hidden_size": 16,
            },
            2,
            [16, 4, 4],
        ),
        ({"model_type": "falcon", "num_attention_heads": 8, "hidden_size": 16}, 1, [16, 2, 2]),
        (
            {
                "model_type": "falcon",
                "multi_query": False,
                "num_attention_heads": 8,
                "hidden_size": 16,
            },
            8,
            [16, 16, 16],
        ),
        (
            {
                "model_type": "gpt_bigcode",
                "multi_query": False,
                "num_attention_heads": 4,
                "hidden_size": 8,
            },
            4,
            [8, 8, 8],
        ),
        (
            {
                "model_type": "vlm",
                "text_config": {
                    "model_type": "phi3",
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "hidden_size": 8,
                },
            },
            1,
            [8, 4, 4],
        ),
    ],
)
def test_configurations_tell_how_rows_lie(config: Any, groups: int, rows: list[int]) -> None:
    (rule,) = read_rules("q_proj+k_proj+v_proj=query_key_value")
    heads = Heads.of(config)
    assert (heads.groups(rule), heads.rows(rule)) == (groups, rows)


def test_what_configurations_do_not_tell_must_be_said() -> None:
    (rule,) = read_rules("q_proj+k_proj+v_proj=query_key_value")
    for config in ({}, {"model_type": "codegen"}, {"model_type": "bloom"}):
        with pytest.raises(ConfigError, match="query_key_value"):
            Heads.of(config).groups(rule)
    (plain,) = read_rules("q_proj+k_proj+v_proj=qkv_proj")
    assert Heads.of({}).groups(plain) == 1
    assert Heads.of({}).rows(plain) == [None] * 3


N_IN, SIZES = 6, (8, 4, 4)


def checkpoints(root: Path, groups: int, kind: str = "Linear", config: Any = None) -> Any:
    """Write a split base, the same fused, and LoRA adapters of both, equal in effect."""
    rng = np.random.default_rng(7)
    pieces = Pieces(QKV, SIZES, groups)
    split, fused, sites = {}, {}, {}
    for i in range(2):
        weights = [rng.standard_normal((n, N_IN)).astype("float32") for n in SIZES]
        biases = [rng.standard_normal(n).astype("float32") for n in SIZES]
        for part, weight, bias in zip(QKV, weights, biases, strict=True):
            split |= {f"m.{i}.attn.{part}.weight": weight, f"m.{i}.attn.{part}.bias": bias}
        joined = pieces.join(weights)
        joined = np.ascontiguousarray(joined.T) if kind == "Conv1D" else joined
        fused |= {f"m.{i}.attn.qkv.weight": joined, f"m.{i}.attn.qkv.bias": pieces.join(biases)}
        sites |= {
            f"m.{i}.attn.{part}": lora(rng, N_IN, n, 2, "float32")
            for part, n in zip(QKV, SIZES, strict=True)
        }
    for name, tensors in (("split", split), ("fused", fused)):
        (root / name).mkdir()
        write_safetensors(root / name / "model.safetensors", tensors)
        (root / name / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    parts = Adapter(LoraConfig(r=2, lora_alpha=3, target_modules=[*QKV]), sites)
    parts.save(root / "parts")
    parts.fused("qkv", QKV, groups=groups).save(root / "whole")
    return pieces, fused


def rows_of(path: Path, pieces: Pieces, kind: str = "Linear") -> dict[str, np.ndarray]:
    """Read a merged checkpoint's fused weights, or make them of its parts."""
    tensors = read_safetensors(path / "model.safetensors")
    out = {}
    for i in range(2):
        name = f"m.{i}.attn.qkv.weight"
        if name in tensors:
            out[name] = tensors[name].T if kind == "Conv1D" else tensors[name]
        else:
            out[name] = pieces.join([tensors[f"m.{i}.attn.{part}.weight"] for part in QKV])
    return out


@pytest.mark.parametrize(
    ("groups", "kind", "config"),
    [
        (1, "Linear", None),
        (1, "Conv1D", {"model_type": "gpt2"}),
        (
            4,
            "Linear",
            {
                "model_type": "falcon",
                "new_decoder_architecture": True,
                "num_attention_heads": 8,
                "num_kv_heads": 4,
                "hidden_size": 8,
            },
        ),
    ],
    ids=["phi3", "gpt2", "falcon"],
)
def test_split_adapters_merge_into_fused_bases(
    tmp_path: Path, groups: int, kind: str, config: Any
) -> None:
    pieces, _ = checkpoints(tmp_path, groups, kind, config)
    rule = "q_proj+k_proj+v_proj=qkv"
    merge_checkpoint(tmp_path / "split", tmp_path / "parts", tmp_path / "a")
    receipt = merge_checkpoint(tmp_path / "fused", tmp_path / "parts", tmp_path / "b", names=rule)
    want, got = rows_of(tmp_path / "a", pieces), rows_of(tmp_path / "b", pieces, kind)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-6 * np.abs(array).max())
    assert {use.to for use in receipt.uses if ".0." in use.tensor} == {("m.0.attn.qkv.weight",)}
    assert len(receipt.uses) == 12
    assert receipt.options["map"] == [rule]
    assert [t.entry for t in receipt.targets] == ["m.0.attn.qkv", "m.1.attn.qkv"]
    audit = verify_checkpoint(
        tmp_path / "fused", tmp_path / "parts", tmp_path / "b", names=rule, min_kept=0.999
    )
    assert not audit.problems
    seen = inspect_adapter(tmp_path / "parts", tmp_path / "fused", names=rule)
    assert [site.name for site in seen.sites] == ["m.0.attn.qkv", "m.1.attn.qkv"]


@pytest.mark.parametrize("groups", [1, 2])
def test_fused_adapters_merge_into_split_bases(tmp_path: Path, groups: int) -> None:
    pieces, _ = checkpoints(tmp_path, groups)
    rule = f"qkv@{groups}=q_proj+k_proj+v_proj"
    merge_checkpoint(tmp_path / "split", tmp_path / "parts", tmp_path / "a")
    receipt = merge_checkpoint(tmp_path / "split", tmp_path / "whole", tmp_path / "b", names=rule)
    want, got = rows_of(tmp_path / "a", pieces), rows_of(tmp_path / "b", pieces)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-6 * np.abs(array).max())
    hit = {use.to for use in receipt.uses if ".1." in use.tensor}
    assert hit == {tuple(f"m.1.attn.{part}.weight" for part in QKV)}


def test_missing_parts_get_their_rows_from_the_base_and_its_configuration(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    pieces, fused = checkpoints(tmp_path, 1, config={"model_type": "phi3", **heads})
    parts, rule = Adapter.load(tmp_path / "parts"), "q_proj+k_proj+v_proj=qkv"
    some = parts.replace(sites={k: v for k, v in parts.sites.items() if "k_proj" not in k})
    merge_checkpoint(tmp_path / "fused", some, tmp_path / "a", names=rule)
    for name, array in rows_of(tmp_path / "a", pieces).items():
        np.testing.assert_array_equal(array[8:12], fused[name][8:12])
        assert (array[:8] != fused[name][:8]).any()
    one = parts.replace(sites={k: v for k, v in parts.sites.items() if "v_proj" in k})
    merge_checkpoint(tmp_path / "fused", one, tmp_path / "b", names=rule)
    for name, array in rows_of(tmp_path / "b", pieces).items():
        np.testing.assert_array_equal(array[:12], fused[name][:12])
    (tmp_path / "fused" / "config.json").write_text("{}")
    with pytest.raises(ShapeError, match=r"q_proj, m.0.attn.k_proj: nothing tells.*q_proj:ROWS"):
        merge_checkpoint(tmp_path / "fused", one, tmp_path / "c", names=rule)
    said = "q_proj:8+k_proj:4+v_proj=qkv"
    merge_checkpoint(tmp_path / "fused", one, tmp_path / "c", names=said)
    same = [read_safetensors(tmp_path / n / "model.safetensors") for n in ("b", "c")]
    assert all((same[0][name] == same[1][name]).all() for name in same[0])
    assert not (tmp_path / "d").exists()


def test_rules_that_match_nothing_and_names_that_collide_are_errors(tmp_path: Path) -> None:
    checkpoints(tmp_path, 1)
    paths = tmp_path / "split", tmp_path / "parts", tmp_path / "out"
    with pytest.raises(TargetError, match=r"'x=y': matches no.*\n.*'a\+b=c': matches no"):
        merge_checkpoint(*paths, names=["x=y", "attn=attn", "a+b=c"])
    with pytest.raises(UsageError, match="two modules cannot get the same name"):
        merge_checkpoint(*paths, names="k_proj=q_proj")
    with pytest.raises(UsageError, match="the adapter has that already"):
        merge_checkpoint(*paths, names="q_proj=k_proj:4+z:4")
    with pytest.raises(TargetError, match=r"m\.0\.attn\.x.*: the base has no such layer"):
        merge_checkpoint(*paths, names="q_proj=x+y")
    with pytest.raises(ShapeError, match="nothing tells how many outputs"):
        merge_checkpoint(*paths, names="q_proj+x+y=z")
    assert not paths[2].exists()


def test_one_map_serves_several_adapters_with_names_of_their_own(tmp_path: Path) -> None:
    checkpoints(tmp_path, 1)
    parts = Adapter.load(tmp_path / "parts")
    other = parts.renamed(lambda name: f"wrapped.{name}")
    pair = [(parts, 0.5), (other, 0.5)]
    merge_checkpoint(tmp_path / "split", pair, tmp_path / "a", names=r"^wrapped\.=")
    merge_checkpoint(tmp_path / "split", tmp_path / "parts", tmp_path / "b")
    one, two = (read_safetensors(tmp_path / n / "model.safetensors") for n in "ab")
    for name, array in two.items():
        np.testing.assert_allclose(one[name], array, rtol=0, atol=1e-6)
    with pytest.raises(TargetError, match=r"--map '\^wrapped\\.='"):
        merge_checkpoint(tmp_path / "split", other, tmp_path / "c")


def test_a_renamed_copy_and_rows_reach_the_base(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = {
        "wte.weight": rng.standard_normal((5, 4)).astype("float32"),
        "fc.weight": rng.standard_normal((4, 4)).astype("float32"),
        "head.weight": rng.standard_normal((3, 4)).astype("float32"),
    }
    config = LoraConfig(
        r=2, target_modules=["fc"], modules_to_save=["head"], trainable_token_indices={"wte": [2]}
    )
    adapter = PeftModel(base).add("a", config)
    adapter = adapter.replace(
        extra={"head.weight": np.ones((3, 4), "float32")},
        tokens={"wte": np.full((1, 4), 2, "float32")},
    )
    adapter.renamed(lambda name: f"net.{name}").save(tmp_path / "adapter")
    write_safetensors(tmp_path / "base.safetensors", base)
    out = tmp_path / "out.safetensors"
    done = merge_checkpoint(
        tmp_path / "base.safetensors", tmp_path / "adapter", out, names=r"^net\.="
    )
    got = read_safetensors(out)
    assert (got["head.weight"] == 1).all()
    assert (got["wte.weight"][2] == 2).all()
    goes = {use.tensor.rpartition("model.")[2]: use.to for use in done.uses}
    assert goes["net.head.weight"] == ("head.weight",)
    assert ("wte.weight",) in goes.values()


APART = "h.0.block_sparse_moe.experts.{}.{}.weight"
STACKS = ("h.0.mlp.experts.gate_up_proj", "h.0.mlp.experts.down_proj")


def experts(rng: np.random.Generator, count: int) -> dict[str, Any]:
    """Draw the layers of experts, as Mixtral's files have them."""
    shapes = {"w1": (6, 4), "w3": (6, 4), "w2": (4, 6)}
    return {
        APART.format(i, name): rng.standard_normal(shape)
        for i in range(count)
        for name, shape in shapes.items()
    }


def stacks(apart: Any, count: int) -> dict[str, Any]:
    """Stack them, as transformers has them in memory."""
    layers = [{n: apart[APART.format(i, n)] for n in ("w1", "w2", "w3")} for i in range(count)]
    up = np.stack([np.concatenate([one["w1"], one["w3"]]) for one in layers])
    return dict(zip(STACKS, (up, np.stack([one["w2"] for one in layers])), strict=True))


def merged_file(tmp_path: Path, base: Any, adapter: Any, names: Any) -> Any:
    """Merge into a file, audit it, and read it."""
    paths = [tmp_path / name for name in ("base.safetensors", "out.safetensors")]
    write_safetensors(paths[0], base)
    merge_checkpoint(paths[0], adapter, paths[1], names=names, overwrite=True)
    assert not verify_checkpoint(paths[0], adapter, paths[1], names=names).problems
    return read_safetensors(paths[1])


@pytest.mark.parametrize("targets", [STACKS, STACKS[:1], STACKS[1:]])
@pytest.mark.parametrize("flags", [{}, {"use_rslora": True, "r": 3}])
@pytest.mark.parametrize("filed", [False, True])
def test_a_stack_of_experts_merges_as_the_experts_apart(
    targets: Any, flags: Any, filed: bool, tmp_path: Path
) -> None:
    base = experts(np.random.default_rng(0), 3)
    given: dict[str, Any] = {"r": 2, "lora_alpha": 5, "init_lora_weights": False, **flags}
    model = PeftModel(stacks(base, 3))
    config = LoraConfig(**given, target_modules=[], target_parameters=[*targets])
    adapter: Any = model.add("a", config, dtype="float64")
    if filed:  # there the parameters have no names
        adapter.save(tmp_path / "a")
        adapter = tmp_path / "a"
    got = stacks(merged_file(tmp_path, base, adapter, "mixtral"), 3)
    for name, want in model.merge().items():
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-12)
        assert (name in targets) != np.array_equal(want, model.weights[name])


@pytest.mark.parametrize("absent", [(), ("w3",), ("w1", "w3"), ("experts.0", "experts.2.w2")])
@pytest.mark.parametrize("ranks", [{}, {"w1": 1, r"2\.w2": 3}])
def test_experts_apart_merge_as_their_stack(absent: Any, ranks: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = experts(rng, 3)
    config = LoraConfig(r=2, lora_alpha=3, rank_pattern=ranks)
    sites = {}
    for tensor, array in base.items():
        site = Site(tensor.removesuffix(".weight"), array.shape[1], array.shape[0])
        if not any(f".{part}." in tensor for part in absent):
            sites[site.name] = lora(rng, site.n_in, site.n_out, config.at(site).r)
    model = PeftModel(base)
    adapter = Adapter(replace(config, target_modules=[*sites]), sites)
    model.add("a", adapter)
    got = merged_file(tmp_path, stacks(base, 3), adapter, "mixtral-stacked")
    for name, want in stacks(model.merge(), 3).items():
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-12)


PART, SIX = np.ones((6, 4)), {"lora_A.weight": np.ones((1, 4)), "lora_B.weight": np.ones((6, 1))}
UP = "experts.{}.w1+experts.{}.w3=experts.up"


@pytest.mark.parametrize(
    ("sites", "base", "rule", "said"),
    [
        ({"experts.0.w1": SIX}, {"a": PART}, UP, "experts.up: the base has no such stack"),
        ({"experts.0.w1": SIX}, {"experts.up": PART}, UP, "experts.up: the base has no such stack"),
        (
            {"experts.2.w1": SIX},
            {"experts.up": np.ones((2, 12, 4))},
            UP,
            "experts.up: has 2 experts, and the adapter one of 3",
        ),
        (
            {"experts.0.w1": SIX, "experts.1.w1": {**SIX, "lora_A.weight": np.ones((1, 5))}},
            {"experts.up": np.ones((2, 12, 4))},
            UP,
            "experts of 4 and 5 inputs differ",
        ),
        (
            {"experts.0.w1": {**SIX, "lora_B.bias": np.ones(6)}},
            {"experts.up": np.ones((1, 12, 4))},
            UP.replace("{}.w1", "{}.w1:6"),
            "lora_B.bias cannot be stacked",
        ),
        (
            {"experts.0.w1": SIX},
            {"experts.up": np.ones((1, 12, 4))},
            UP.replace("{}.w1", "{}.w1:5"),
            "no linear layer of 5 outputs has such",
        ),
        ({"experts.up": SIX}, {"experts.0.w1.weight": PART}, "", "the base has no such layer"),
        ({"experts.up": SIX}, {"a.weight": PART}, "", "the base has no layer experts.0.w1"),
        (
            {"experts.up": SIX},
            {"experts.0.w1.weight": PART, "experts.0.w3.weight": np.ones((6, 5))},
            "",
            r"experts.up: experts of sizes \[\(\(4, 6\), \(5, 6\)\)\] cannot be one tensor",
        ),
        (
            {"experts.up": {**SIX, "lora_diag": np.ones(1)}},
            {"experts.0.w1.weight": PART, "experts.0.w3.weight": PART},
            "",
            "lora_diag cannot be stacked or unstacked",
        ),
    ],
)
def test_experts_that_cannot_be_regrouped_are_named(
    sites: Any, base: Any, rule: str, said: str, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "base.safetensors", base)
    stack = rule == ""
    config = LoraConfig(
        r=1,
        lora_bias=any("lora_B.bias" in p for p in sites.values()),
        target_modules=[] if stack else [*sites],
        target_parameters=[*sites] if stack else None,
    )
    adapter = Adapter(config, sites)
    rule = rule or "=".join(reversed(UP.split("=")))
    with pytest.raises((ConfigError, ShapeError, TargetError), match=said):
        merge_checkpoint(tmp_path / "base.safetensors", adapter, names=rule, dry_run=True)


def test_what_stacks_have_of_a_part_without_an_adapter_is_said() -> None:
    config = LoraConfig(r=1, target_modules=["w1"])
    adapter = Adapter(config, {"experts.0.w1": SIX, "experts.1.w1": SIX})
    (rule,) = read_rules(UP)
    with pytest.raises(ShapeError, match=r"how many outputs experts\.\{\}\.w3 has"):
        put_together(adapter, rule, None)
    (rule,) = read_rules(UP.replace("w3", "w3:2"))
    stacked, moved = put_together(adapter, rule, None)
    assert tuple(stacked.sites["experts.up"]["lora_B.weight"].shape) == (8, 2)
    assert moved == {f"experts.{i}.{n}": ("experts.up",) for i in (0, 1) for n in ("w1", "w3")}
    assert put_together(Adapter(config, {"fc": SIX}), rule, None) is None
