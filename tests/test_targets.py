"""Targets: Hugging Face PEFT's rules, and errors where it passes in silence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_any.adapter import Adapter
from peft_any.errors import ConfigError, PeftError, ShapeError, TargetError
from peft_any.extras import fresh_copies
from peft_any.layer import KINDS, Site
from peft_any.layout import layout
from peft_any.methods.fourierft import FourierFTConfig
from peft_any.methods.ia3 import IA3Config
from peft_any.methods.loha import LoHaConfig
from peft_any.methods.lora import LoraConfig
from peft_any.model import PeftModel
from peft_any.selection import Rules, select
from peft_any.targets import configured, place, sites_of_params

RULES = Path(__file__).parent / "golden" / "files" / "rules.json"


def shaped(**shapes: Any) -> dict[str, Any]:
    """Stand-ins for arrays, with ``__`` for the dots of names."""
    return {k.replace("__", "."): SimpleNamespace(shape=v) for k, v in shapes.items()}


def sites(*names: str, kind: Any = "Linear") -> dict[str, Site]:
    return {name: Site(name, 4, 4, kind) for name in names}


LLAMA = sites(
    *(
        f"model.layers.{i}.{part}"
        for i in (0, 1, 10)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ),
    "lm_head",
) | sites("model.embed_tokens", kind="Embedding")


def chosen(**fields: Any) -> list[str]:
    return [n.removeprefix("model.") for n in select(LoraConfig(**fields), LLAMA)]


Q = [f"layers.{i}.self_attn.q_proj" for i in (0, 1, 10)]


# Layout


def test_layers_are_told_by_name_and_shape() -> None:
    found = layout(
        shaped(
            wte__weight=(9, 4),
            h__0__ln__weight=(4,),
            h__0__attn__c_attn__weight=(4, 12),
            h__0__attn__c_attn__bias=(12,),
            h__0__attn__c_proj__weight=(4, 4),
            h__0__attn__c_proj__bias=(4,),
            h__0__attn__rel=(3, 3),
            mha__in_proj_weight=(12, 4),
            mha__in_proj_bias=(12,),
            mha__out_proj__weight=(4, 5),
            c1__weight=(6, 2, 3),
            c2__weight=(6, 2, 3, 1),
            c3__weight=(6, 2, 3, 1, 2),
            lm_head__weight=(9, 4),
            weight=(2, 3),
        )
    )
    assert [(s.name, s.kind, s.n_in, s.n_out, s.bias) for s in found.values()] == [
        ("wte", "Embedding", 9, 4, False),
        ("h.0.attn.c_attn", "Conv1D", 4, 12, True),
        ("h.0.attn.c_proj", "Conv1D", 4, 4, True),
        ("mha", "MultiheadAttention", 4, 12, True),
        ("mha.out_proj", "Linear", 5, 4, False),
        ("c1", "Conv1d", 2, 6, False),
        ("c2", "Conv2d", 2, 6, False),
        ("c3", "Conv3d", 2, 6, False),
        ("lm_head", "Linear", 4, 9, False),
        ("", "Linear", 3, 2, False),
    ]
    assert all(
        s.weight in {"weight", f"{n}.weight", f"{n}.in_proj_weight"} for n, s in found.items()
    )


@pytest.mark.parametrize(
    "name",
    [
        "wte", "wpe", "shared", "relative_attention_bias", "embed_tokens", "embed_positions",
        "word_embeddings", "position_embeddings", "token_type_embeddings", "emb", "embedding",
        "embeddings", "tok_embeddings", "embed_in", "tokens_embed",
    ],
)  # fmt: skip
def test_usual_embeddings_are_known(name: str) -> None:
    assert layout(shaped(**{f"a__{name}__weight": (9, 4)}))[f"a.{name}"].kind == "Embedding"
    linear = shaped(**{f"{name}__weight": (9, 4), f"{name}__bias": (9,)})
    assert layout(linear)[name].kind == "Linear"  # an embedding has no bias


def test_the_flag_decides_where_no_bias_proves_anything() -> None:
    config = LoraConfig(fan_in_fan_out=True)
    tensors = shaped(a__fc__weight=(4, 8), lm_head__weight=(9, 4))
    kinds = {n: s.kind for n, s in layout(tensors, config=config).items()}
    assert kinds == {"a.fc": "Conv1D", "lm_head": "Linear"}
    assert {s.kind for s in layout(tensors).values()} == {"Linear"}
    proven = tensors | shaped(b__weight=(4, 8), b__bias=(8,))
    assert layout(proven, config=config)["a.fc"].kind == "Linear"  # Conv1D always has a bias


def test_kinds_overrule_the_guess() -> None:
    tensors = shaped(x__fc__weight=(4, 4), y__fc__weight=(4, 4), c__weight=(6, 2, 3))
    found = layout(tensors, {"x.fc": "Conv1D", r"y\..*": "Embedding"})
    assert [s.kind for s in found.values()] == ["Conv1D", "Embedding", "Conv1d"]
    grouped = layout(tensors, {"c": Site("c", 4, 6, "Conv1d", (3,), 2)})["c"]
    assert (grouped.n_in, grouped.groups, grouped.width) == (4, 2, 6)


@pytest.mark.parametrize(
    ("kinds", "error", "words"),
    [
        ({"fcc": "Linear"}, TargetError, r"kinds\['fcc'\]: matches no layer .nearest: 'fc'"),
        ({"fc": "Conv2d"}, TargetError, r"shape \(4, 4\) cannot be a Conv2d"),
        ({"fc": "Lin"}, ConfigError, "'Lin' is not one of"),
        ({"(": "Linear"}, ConfigError, "not a regular expression"),
    ],
)
def test_wrong_kinds_are_refused(kinds: Any, error: type[PeftError], words: str) -> None:
    with pytest.raises(error, match=words):
        layout(shaped(fc__weight=(4, 4)), kinds)


def test_a_whole_name_goes_before_an_ending() -> None:
    kinds: Any = {"fc": "Conv1D", "encoder.fc": "Linear"}
    found = layout(shaped(encoder__fc__weight=(4, 4), fc__weight=(4, 4)), kinds)
    assert {name: site.kind for name, site in found.items()} == kinds


@given(
    st.dictionaries(
        st.from_regex(r"([a-z]{1,3}\.){0,2}(weight|bias|in_proj_weight|gamma)", fullmatch=True),
        st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple),
        max_size=8,
    )
)
def test_any_checkpoint_has_a_layout_that_agrees_with_its_shapes(shapes: Any) -> None:
    tensors = {k: SimpleNamespace(shape=v) for k, v in shapes.items()}
    for name, site in layout(tensors).items():
        assert site.name == name
        assert site.kind in KINDS
        assert site.stored_shape == shapes[site.weight]
        assert site.bias == (site.bias_name in shapes)


# Selection


def test_lists_match_whole_names_and_what_follows_a_dot() -> None:
    assert chosen(target_modules=["q_proj"]) == Q
    assert chosen(target_modules=["model.layers.0.self_attn.q_proj", "lm_head"]) == [
        Q[0],
        "lm_head",
    ]
    assert chosen(target_modules=["1.self_attn.q_proj"]) == [Q[1]]  # not layer 10 or 11


def test_strings_match_the_whole_name() -> None:
    assert chosen(target_modules=r".*\.q_proj") == Q
    assert chosen(target_modules=r"model\.layers\.1\..*") == [
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.k_proj",
        "layers.1.mlp.up_proj",
    ]


def test_all_linear_leaves_the_output_embedding_out() -> None:
    assert chosen(target_modules="All-Linear") == [
        n.removeprefix("model.") for n, s in LLAMA.items() if s.kind == "Linear" and n != "lm_head"
    ]
    found = sites("fc", "score", "cls.predictions.decoder") | sites("e", kind="Embedding")
    found |= {"conv": Site("conv", 2, 2, "Conv1d", (1,))} | sites("t", kind="Conv1D")
    assert select(LoraConfig(target_modules="all-linear"), found) == ["fc", "score", "t"]
    classifier = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    assert select(classifier, found) == ["fc", "t"]


def test_exclusions_and_saved_modules_are_left_out() -> None:
    assert chosen(target_modules=["q_proj"], exclude_modules=["0.self_attn.q_proj"]) == Q[1:]
    assert chosen(target_modules=["q_proj"], exclude_modules=r".*\.1\..*") == [Q[0], Q[2]]
    assert chosen(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]) == Q
    names = select(
        LoraConfig(target_modules=["a"], modules_to_save=["head"]), sites("x.a", "head.a")
    )
    assert names == ["x.a"]  # anything below a saved module, too


def test_layer_indices_filter_suffixes_but_not_whole_names() -> None:
    assert chosen(target_modules=["q_proj"], layers_to_transform=1) == [Q[1]]
    assert chosen(target_modules=["q_proj"], layers_to_transform=[0, 10]) == [Q[0], Q[2]]
    assert chosen(target_modules=["q_proj"], layers_to_transform=[]) == Q
    both = ["q_proj", "model.layers.0.mlp.up_proj"]
    assert chosen(target_modules=both, layers_to_transform=[1]) == ["layers.0.mlp.up_proj", Q[1]]
    experts = sites("m.layers.1.experts.0.w", "m.layers.0.experts.1.w")
    config = LoraConfig(target_modules=["w"], layers_to_transform=[1])
    assert select(config, experts) == ["m.layers.1.experts.0.w"]  # the first index
    config = LoraConfig(target_modules=["w"], layers_to_transform=[1], layers_pattern=["experts"])
    assert select(config, experts) == ["m.layers.0.experts.1.w"]
    config = LoraConfig(target_modules=["w"], layers_to_transform=[1], layers_pattern="layers")
    assert select(config, sites("layers.1.w", "layers.0.w")) == ["layers.1.w"]


def test_what_is_named_in_full_needs_no_layer() -> None:
    sites = {n: Site(n, 4, 4) for n in ("head", "layers.0.q_proj", "layers.1.q_proj")}
    config = LoraConfig(target_modules=["head", "layers.1.q_proj"], layers_to_transform=[0, 7])
    assert select(config, sites) == ["head", "layers.1.q_proj"]


def test_experts_apart_are_no_targets_of_an_adapter_without_any() -> None:
    names = ["h.0.mlp.shared_expert.up_proj", "h.0.mlp.experts.0.up_proj", "h.0.q_proj"]
    names.append("h.0.mlp.experts.1.up_proj")
    weights = {f"{n}.weight": np.zeros((4, 4), "float32") for n in names}
    config = LoraConfig(r=1, target_modules=["up_proj", "q_proj"])
    p = {"lora_A.weight": np.ones((1, 4)), "lora_B.weight": np.ones((4, 1))}
    dense, one, router, other = names
    assert [*place(Adapter(config, {dense: p, router: p}), weights)] == [dense, router]
    with pytest.raises(TargetError, match=rf"{other}: is targeted"):
        place(Adapter(config, {dense: p, router: p, one: p}), weights)
    with pytest.raises(TargetError, match=rf"{router}: is targeted"):
        place(Adapter(config, {dense: p}), weights)


def test_a_packed_attention_brings_its_output_half() -> None:
    found = sites("a.attn", kind="MultiheadAttention") | sites("a.attn.out_proj", "b.out_proj")
    config = LoraConfig(r=2, target_modules=["attn"], rank_pattern={"attn": 3})
    names = select(config, found)
    assert names == ["a.attn", "a.attn.out_proj"]
    numbers = configured(config, {n: found[n] for n in names}).values()
    assert [c.r for c in numbers] == [3, 3]  # HF's patterns only see the attention
    assert [c.lora_alpha for c in numbers] == [8, 16]  # and it adds the product twice


def test_entries_that_match_nothing_are_listed_all_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        chosen(target_modules=["q_proj", "q_porj", "upproj"], exclude_modules=["lm_heat"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "'q_porj' matches no layer (nearest: 'q_proj'" in lines[0]
    assert "'upproj' matches no layer (nearest: 'up_proj'" in lines[1]
    assert "exclude_modules entry 'lm_heat' matches no layer (nearest: 'lm_head'" in lines[2]


_OTHERS = {
    "h.rnn.weight_ih_l0": (32, 4),
    "h.rnn.weight_hh_l0": (32, 8),
    "h.rnn.bias_ih_l0": (32,),
    "h.rnn.bias_hh_l0": (32,),
    "h.norm.weight": (8,),
    "h.own.matrix": (3, 4),
    "h.mlp.experts.up": (2, 3, 4),
    "h.fc.weight": (8, 8),
}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "rnn",
            r"h.rnn is a recurrent layer \(weight_ih_l0 \(32, 4\), .*modules_to_save=\['rnn'\]",
        ),
        ("weight_hh_l0", "h.rnn is a recurrent layer .*leave it out"),
        ("norm", r"h.norm is a norm .*\(weight \(8,\)\).*: LNTuningConfig adapts norms"),
        ("own", r"h.own is of no kind that adapters know \(matrix \(3, 4\)\).*called weight"),
        ("experts", "h.mlp.experts is of no kind.*: name stacks of matrices in target_parameters"),
        ("fc.weight", "h.fc.weight is a tensor: name its module, 'h.fc'"),
        ("h", "h holds layers and is none: name those within, such as 'fc'"),
    ],
)
def test_what_is_there_and_takes_no_adapter_is_told_by_what_it_is(entry: str, words: str) -> None:
    weights = {name: np.zeros(shape, "float32") for name, shape in _OTHERS.items()}
    for named in ([entry], ["fc", entry], f"(.*\\.)?{entry}"):
        with pytest.raises(TargetError, match=f"matches no layer: {words}"):
            PeftModel(weights).add("new", LoraConfig(target_modules=named))
    excluded = LoraConfig(target_modules=["fc"], exclude_modules=["rnn"])
    assert [*PeftModel(weights).add("new", excluded).sites] == ["h.fc"]


def test_a_file_for_what_takes_no_adapter_is_told_what_it_is() -> None:
    weights = {name: np.zeros(shape, "float32") for name, shape in _OTHERS.items()}
    pair = {"lora_A.weight": np.zeros((8, 4)), "lora_B.weight": np.zeros((32, 8))}
    adapter = Adapter(LoraConfig(target_modules=["rnn"]), {"h.rnn": pair})
    with pytest.raises(TargetError, match=r"has no such layer: h.rnn is a recurrent layer"):
        PeftModel(weights).add("read", adapter)
    with pytest.raises(
        TargetError, match=r"kinds\['rnn'\]: matches no layer: h.rnn is a recurrent"
    ):
        PeftModel(weights, kinds={"rnn": "Linear"}).add("new", LoraConfig(target_modules=["fc"]))


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({}, ConfigError, "target_modules is not set: name .*'q_proj'.*or 'all-linear'"),
        ({"target_modules": []}, TargetError, "leaves no module"),
        ({"target_modules": "q_proj"}, TargetError, "'q_proj' matches no layer"),
        ({"target_modules": "("}, ConfigError, "not a regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": "("}, ConfigError, "regular expression"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
            TargetError,
            r"layers_to_transform \[7\] match no layer: there are \[0, 1, 10\]",
        ),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [1]},
            ConfigError,
            "layers_to_transform cannot go with",
        ),
        (
            {"target_modules": ["q_proj"], "layers_pattern": "layers"},
            ConfigError,
            "layers_pattern cannot act: set layers_to_transform",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "("},
            ConfigError,
            "not a regular expression",
        ),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
            TargetError,
            "leaves no module",
        ),
    ],
)
def test_targets_that_make_no_sense_are_refused(
    fields: dict[str, Any], error: type[PeftError], words: str
) -> None:
    with pytest.raises(error, match=words):
        chosen(**fields)


def test_expressions_of_which_python_warns() -> None:
    """A set within a set may mean something else one day: it means the same to HF PEFT now."""
    assert chosen(target_modules="model.layers.0.self_attn.[[qv]_proj") == chosen(
        target_modules="model.layers.0.self_attn.(q|v)_proj"
    )


def test_kinds_that_a_method_lacks_are_refused() -> None:
    found = sites("fc") | sites("emb", kind="Embedding")
    with pytest.raises(ConfigError, match=r"(?s)emb: is a Embedding.*LOHA cannot adapt"):
        select(LoHaConfig(target_modules=["fc", "emb"]), found)


@pytest.mark.skipif(not RULES.is_file(), reason="the recorded choices are not there")
def test_choices_equal_hugging_face_peft() -> None:
    for names, fields, hit in json.loads(RULES.read_text()):
        rules = Rules.of(LoraConfig(**fields))
        assert [n for n in names if rules.wants(n, Site(n, 4, 4))] == hit, (names, fields)


# Places of loaded parameters


LORA = {
    name: {
        "lora_A.weight": SimpleNamespace(shape=(2, n)),
        "lora_B.weight": SimpleNamespace(shape=(m, 2)),
    }
    for name, (n, m) in {"wide": (4, 8), "square": (4, 4)}.items()
}


def test_the_flag_decides_a_square_matrix_unless_other_layers_contradict() -> None:
    linear = shaped(wide__weight=(8, 4), square__weight=(4, 4))
    transposed = shaped(wide__weight=(4, 8), square__weight=(4, 4))
    for tensors, flag, kind in ((linear, False, "Linear"), (transposed, True, "Conv1D")):
        found = sites_of_params(LoraConfig(r=2, fan_in_fan_out=flag), LORA, tensors)
        assert [s.kind for s in found.values()] == [kind, kind]
    for tensors, flag in ((linear, True), (transposed, False)):
        config = LoraConfig(r=2, fan_in_fan_out=flag)
        with pytest.raises(TargetError, match=r"square: square matrices .* pass kinds="):
            sites_of_params(config, LORA, tensors)
        told = sites_of_params(config, LORA, tensors, {"square": "Linear"})
        assert told["square"].kind == "Linear"


def test_groups_are_told_from_the_parameters() -> None:
    config = IA3Config(target_modules=["c"], feedforward_modules=["c"])
    p = {"c": shaped(ia3_l=(1, 6, 1, 1))}
    site = sites_of_params(config, p, shaped(c__weight=(9, 2, 3, 3)))["c"]
    assert (site.groups, site.n_in, site.n_out) == (3, 6, 9)


def test_what_fits_no_reading_is_listed() -> None:
    tensors = shaped(wide__weight=(8, 5), square__weight=(4, 3))
    with pytest.raises(ShapeError, match=r"(?s)wide.lora_A.weight: shape .*square.lora_A"):
        sites_of_params(LoraConfig(r=2), LORA, tensors)


def test_a_shared_array_that_is_too_small_is_refused() -> None:
    from peft_any.adapter import Adapter
    from peft_any.methods.vera import VeraConfig

    p = {"fc": shaped(vera_lambda_d=(2,), vera_lambda_b=(3,))}
    shared = shaped(vera_A=(2, 3), vera_B=(3, 2), vera_C=(1,))
    adapter = Adapter(VeraConfig(r=2, target_modules=["fc"]), p, shared)
    with pytest.raises(ShapeError, match=r"(?s)vera_A: shape \(2, 3\) .*vera_C: unexpected"):
        place(adapter, shaped(fc__weight=(3, 4)))


# What goes beside the method


WEIGHTS = shaped(
    model__embed_tokens__weight=(6, 4),
    model__fc__weight=(4, 4),
    model__fc__bias=(4,),
    model__norm__bias=(4,),
    head__weight=(6, 4),
    xhead__weight=(6, 4),
)


def test_saved_modules_match_without_a_dot_and_biases_by_name() -> None:
    extra, _ = fresh_copies(LoraConfig(modules_to_save=["head"]), WEIGHTS, {})
    assert [*extra] == ["head.weight", "xhead.weight"]  # as in HF
    extra, _ = fresh_copies(LoraConfig(bias="all"), WEIGHTS, {})
    assert [*extra] == ["model.fc.bias", "model.norm.bias"]
    found = layout(WEIGHTS)
    extra, _ = fresh_copies(LoraConfig(bias="lora_only"), WEIGHTS, {"model.fc": found["model.fc"]})
    assert [*extra] == ["model.fc.bias"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"modules_to_save": ["haed"]}, TargetError, "'haed' matches no module .nearest: 'head'"),
        ({"modules_to_save": "head"}, ConfigError, "modules_to_save='head' cannot be .* a list"),
        ({"trainable_token_indices": {"wte": [1]}}, TargetError, "no embedding 'wte' is there"),
        ({"trainable_token_indices": [6]}, ConfigError, r"\[6\] cannot be rows"),
    ],
)
def test_wrong_companions_are_refused(
    fields: dict[str, Any], error: type[PeftError], words: str
) -> None:
    with pytest.raises(error, match=words):
        fresh_copies(LoraConfig(**fields), WEIGHTS, {})


def test_a_task_saves_its_head_if_it_is_there() -> None:
    weights = WEIGHTS | shaped(score__weight=(2, 4))
    extra, _ = fresh_copies(LoraConfig(task_type="SEQ_CLS"), weights, {})
    assert [*extra] == ["score.weight"]


def test_where_one_layer_is_said_to_be_transposed_those_without_a_bias_are_not() -> None:
    """Hugging Face PEFT writes one fan_in_fan_out for all layers: that of the last."""
    weights = {"a.fc.weight": np.zeros((8, 12)), "a.c.weight": np.eye(8), "a.c.bias": np.zeros(8)}
    config = FourierFTConfig(fan_in_fan_out=True, n_frequency=3, target_modules=["fc", "c"])
    assert layout(weights, config=config)["a.fc"].kind == "Conv1D"
    sites = layout(weights, {"c": "Conv1D"}, config)
    assert {name: (s.kind, s.n_in, s.n_out) for name, s in sites.items()} == {
        "a.fc": ("Linear", 12, 8),
        "a.c": ("Conv1D", 8, 8),
    }
