"""Adapters of Hugging Face PEFT on small random transformers: our merge equals its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.registry import method_for  # noqa: E402
from tests.hf.reference import host, load, quietly, state_of  # noqa: E402

RTOL = 1e-5


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    )


def bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=12,
        )
    )


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    )


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
}
LORA = {"r": 3, "lora_alpha": 5}
ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj", "projection"],
}
FEEDFORWARD = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "vit": (["k_proj", "v_proj", "projection"], ["projection"]),
}

ROWS: list[tuple[str, str, str, dict[str, Any]]] = []
"""Label, model, method, fields."""
for _model, _targets in ATTENTION.items():
    _linear = [name for name in _targets if name != "projection"]
    ROWS += [
        ("lora", _model, "LORA", {**LORA, "target_modules": _targets}),
        ("rslora", _model, "LORA", {**LORA, "use_rslora": True, "target_modules": _targets}),
        ("dora", _model, "LORA", {**LORA, "use_dora": True, "target_modules": _targets}),
        ("all-linear", _model, "LORA", {**LORA, "target_modules": "all-linear"}),
        ("adalora", _model, "ADALORA", {"init_r": 3, "total_step": 9, "target_modules": _targets}),
        (
            "ia3",
            _model,
            "IA3",
            {
                "target_modules": FEEDFORWARD[_model][0],
                "feedforward_modules": FEEDFORWARD[_model][1],
            },
        ),
        ("vera", _model, "VERA", {"r": 4, "target_modules": _linear}),
    ]
    if _model != "gpt2":  # Hugging Face PEFT has these for no Conv1D
        ROWS += [
            ("loha", _model, "LOHA", {"r": 3, "alpha": 5, "target_modules": _targets}),
            ("lokr", _model, "LOKR", {"r": 3, "alpha": 5, "target_modules": _targets}),
            (
                "lokr-decomposed",
                _model,
                "LOKR",
                {"r": 1, "decompose_both": True, "decompose_factor": 2, "target_modules": _targets},
            ),
            ("oft", _model, "OFT", {"oft_block_size": 4, "target_modules": _targets}),
            (
                "oft-exact",
                _model,
                "OFT",
                {
                    "r": 2,
                    "oft_block_size": 0,
                    "use_cayley_neumann": False,
                    "target_modules": _targets,
                },
            ),
            ("boft", _model, "BOFT", {"boft_block_size": 4, "target_modules": _targets}),
        ]
ROWS += [
    (
        "regex",
        "llama",
        "LORA",
        {**LORA, "target_modules": r"model\.layers\.1\.(self_attn|mlp)\.(up|v|o)_proj"},
    ),
    (
        "layers",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    (
        "layers-pattern",
        "llama",
        "LORA",
        {
            **LORA,
            "target_modules": ["v_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
        },
    ),
    (
        "patterns",
        "llama",
        "LORA",
        {
            **LORA,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "v_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 11},
        },
    ),
    (
        "exclude",
        "llama",
        "LORA",
        {**LORA, "target_modules": "all-linear", "exclude_modules": ["down_proj", "lm_head"]},
    ),
    (
        "head-saved",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    (
        "norm-saved",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    ),
    ("embedding", "llama", "LORA", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    (
        "embedding-dora",
        "llama",
        "LORA",
        {**LORA, "use_dora": True, "target_modules": ["embed_tokens"]},
    ),
    ("head", "llama", "LORA", {**LORA, "target_modules": ["lm_head", "q_proj"]}),
    (
        "tokens",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj"], "trainable_token_indices": [7, 1, 5]},
    ),
    (
        "tokens-of",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 2]}},
    ),
    (
        "embedding-saved",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    (
        "causal",
        "llama",
        "LORA",
        {**LORA, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    ),
    (
        "oft-embedding",
        "llama",
        "OFT",
        {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    (
        "ia3-head-saved",
        "llama",
        "IA3",
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
    ),
    ("bias-all", "gpt2", "LORA", {**LORA, "target_modules": ["c_attn"], "bias": "all"}),
    (
        "bias-only",
        "gpt2",
        "LORA",
        {**LORA, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
    ),
    ("lora-bias", "gpt2", "LORA", {**LORA, "target_modules": ["c_fc"], "lora_bias": True}),
    (
        "square",
        "gpt2",
        "LORA",
        {**LORA, "target_modules": r"transformer\.h\.\d+\.attn\.c_proj", "fan_in_fan_out": True},
    ),
    (
        "square-unsaid",
        "gpt2",
        "LORA",
        {**LORA, "target_modules": r"transformer\.h\.\d+\.attn\.c_proj"},
    ),
    (
        "square-dora",
        "gpt2",
        "LORA",
        {**LORA, "use_dora": True, "target_modules": r".*\.attn\.c_proj"},
    ),
    ("square-vera", "gpt2", "VERA", {"r": 4, "target_modules": r".*\.attn\.c_proj"}),
    (
        "square-adalora",
        "gpt2",
        "ADALORA",
        {"init_r": 3, "total_step": 9, "target_modules": r".*\.attn\.c_proj"},
    ),
    (
        "square-ia3",
        "gpt2",
        "IA3",
        {"target_modules": r".*\.attn\.c_proj", "feedforward_modules": []},
    ),
    (
        "square-ia3-feedforward",
        "gpt2",
        "IA3",
        {"target_modules": r".*\.attn\.c_proj", "feedforward_modules": r".*\.attn\.c_proj"},
    ),
    ("embedding", "gpt2", "LORA", {**LORA, "target_modules": ["wpe", "c_attn"]}),
    ("tied", "gpt2", "LORA", {**LORA, "target_modules": ["wte", "c_attn"]}),
    (
        "tied-tokens",
        "gpt2",
        "LORA",
        {**LORA, "target_modules": ["c_attn"], "trainable_token_indices": [4, 0]},
    ),
    (
        "tied-tokens",
        "t5",
        "LORA",
        {**LORA, "target_modules": ["q"], "trainable_token_indices": {"shared": [4, 0]}},
    ),
    ("tied", "t5", "LORA", {**LORA, "target_modules": ["shared", "q"]}),
    (
        "classifier",
        "bert",
        "LORA",
        {**LORA, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    (
        "bias-all",
        "bert",
        "LORA",
        {**LORA, "target_modules": ["query", "dense"], "bias": "all", "lora_bias": True},
    ),
    ("bias-only", "bert", "LORA", {**LORA, "target_modules": ["query"], "bias": "lora_only"}),
    (
        "oft-bias",
        "bert",
        "OFT",
        {"oft_block_size": 8, "target_modules": ["query"], "bias": "oft_only"},
    ),
    (
        "boft-bias",
        "bert",
        "BOFT",
        {
            "boft_block_num": 4,
            "boft_block_size": 0,
            "target_modules": ["query"],
            "bias": "boft_only",
        },
    ),
    ("vera-bias", "bert", "VERA", {"r": 4, "target_modules": ["dense"], "bias": "vera_only"}),
    (
        "vera-regenerated",
        "bert",
        "VERA",
        {"r": 4, "target_modules": ["query", "dense"], "save_projection": False},
    ),
    (
        "embeddings",
        "bert",
        "LORA",
        {**LORA, "target_modules": ["word_embeddings", "position_embeddings", "query"]},
    ),
    ("relative", "t5", "LORA", {**LORA, "target_modules": ["relative_attention_bias", "q"]}),
    (
        "encoder",
        "t5",
        "LORA",
        {**LORA, "target_modules": r"encoder\..*\.(q|wi)", "task_type": "SEQ_2_SEQ_LM"},
    ),
    (
        "patches",
        "vit",
        "LORA",
        {**LORA, "target_modules": ["projection"], "modules_to_save": ["classifier"]},
    ),
    (
        "patches-bias",
        "vit",
        "LORA",
        {**LORA, "target_modules": ["projection", "q_proj"], "bias": "lora_only"},
    ),
    (
        "loha-effective",
        "vit",
        "LOHA",
        {"r": 2, "use_effective_conv2d": True, "target_modules": ["projection"]},
    ),
    (
        "lokr-effective",
        "vit",
        "LOKR",
        {"r": 2, "use_effective_conv2d": True, "target_modules": ["projection"]},
    ),
]

STACKS: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    ("lora", "llama", "LORA", LORA, {"r": 2, "use_rslora": True}),
    ("dora", "llama", "LORA", {**LORA, "use_dora": True}, {"r": 2, "use_dora": True}),
    ("dora-lora", "llama", "LORA", {**LORA, "use_dora": True}, {"r": 2}),
    ("lora-dora", "llama", "LORA", LORA, {"r": 2, "use_dora": True}),
    ("lora", "gpt2", "LORA", LORA, {"r": 2}),
    ("dora", "gpt2", "LORA", {**LORA, "use_dora": True}, {"r": 2, "use_dora": True}),
    ("dora", "vit", "LORA", {**LORA, "use_dora": True}, {"r": 2, "use_dora": True}),
    ("loha", "llama", "LOHA", {"r": 2}, {"r": 3}),
    ("lokr", "llama", "LOKR", {"r": 2}, {"r": 3}),
    ("ia3", "bert", "IA3", {"feedforward_modules": ["value"]}, {"feedforward_modules": ["value"]}),
    ("oft", "llama", "OFT", {"oft_block_size": 4}, {"oft_block_size": 2}),
    ("boft", "bert", "BOFT", {"boft_block_size": 4}, {"boft_block_size": 2}),
    ("vera", "llama", "VERA", {"r": 4}, {"r": 4, "d_initial": 0.3}),
]
MERGED_ONLY = {"OFT": "its forward rotates the input in the other order than its merges do"}
"""Methods whose several active adapters act otherwise in Hugging Face PEFT's forward."""


def base_of(name: str) -> Any:
    """Make a model with weights of trained size."""
    torch.manual_seed(3)
    with quietly():
        model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


FROZEN = {"vera_A", "vera_B", "randlora_A", "randlora_B", "tinylora_P"}


def fill(model: Any, name: str, seed: int) -> None:
    """Give an adapter trained-looking values; frozen projections keep theirs."""
    torch.manual_seed(seed)
    with quietly():
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
    new = {
        k: v + 0.2 * torch.randn_like(v)
        if v.is_floating_point() and not FROZEN & {*k.split(".")}
        else v
        for k, v in state.items()
    }
    load(model, new, name)


def saved_once(model: Any) -> dict[str, np.ndarray]:
    """Give a model's tensors as transformers saves them: of tied ones the first alone."""
    state = model.state_dict()
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    return {name: host(state[name]) for name in first.values()}


def merged(model: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    with quietly():
        state = state_of(model.merge_and_unload())
    return {name: state[name] for name in names}


def compare(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        size = float(np.max(np.abs(value), initial=0.0))
        np.testing.assert_allclose(got[key], value, rtol=0, atol=RTOL * size, err_msg=key)


@pytest.mark.parametrize(
    ("label", "model", "method", "fields"), ROWS, ids=[f"{m}-{label}" for label, m, _, _ in ROWS]
)
def test_a_models_merged_weights_are_hfs(
    label: str, model: str, method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    plain = base_of(model)
    weights = saved_once(plain)
    with quietly():
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**fields)
        theirs = peft.get_peft_model(plain, config).eval()
    fill(theirs, "default", 1)
    with quietly():
        theirs.save_pretrained(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    ours = PeftModel(weights)
    ours.add("a", adapter)
    compare(ours.merge(), merged(theirs, weights))
    fresh = PeftModel(weights)
    own: Any = method_for(method)
    again = fresh.add("b", own(**fields))
    assert {*again.sites} == {*adapter.sites}
    shapes = [
        {(s, k): tuple(v.shape) for s, p in a.sites.items() for k, v in p.items()}
        for a in (again, adapter)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("stack", STACKS, ids=[f"{model}-{label}" for label, model, *_ in STACKS])
def test_stacked_adapters_are_hfs_several_active_ones(
    stack: tuple[str, str, str, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    _, model, method, first, second = stack
    plain = base_of(model)
    weights = saved_once(plain)
    targets = [t for t in ATTENTION[model] if method != "VERA" or t in ("q_proj", "o_proj")]
    make = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    with quietly():
        theirs = peft.get_peft_model(plain, make(target_modules=targets, **first), "first")
        theirs.add_adapter("second", make(target_modules=targets, **second))
        theirs.eval()
    fill(theirs, "first", 1)
    fill(theirs, "second", 2)
    with quietly():
        theirs.base_model.set_adapter(["first", "second"])
        theirs.save_pretrained(tmp_path)
    ours = PeftModel(weights)
    for name in ("first", "second"):
        ours.add(name, Adapter.load(tmp_path / name))
    ours.activate(["first", "second"])
    got = ours.merge()
    rng = np.random.default_rng(0)
    site = next(s for s in ours.sites().values() if not s.is_conv)
    x = rng.standard_normal((3, site.n_in)).astype("float32")
    layer = theirs.base_model.model.get_submodule(site.name)
    with torch.no_grad():
        y = layer(torch.tensor(x)).numpy()
    want = merged(theirs, weights)
    compare(got, want)
    bias = want.get(site.bias_name, np.float32(0))
    if method in MERGED_ONLY:
        assert np.max(np.abs(x @ want[site.weight].T + bias - y)) > 0.01
    else:
        compare({"y": ours.bind().layers[site.name](x)}, {"y": y})
