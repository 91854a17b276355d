"""Adapters on whole models of eight architectures, both ways, against Hugging Face PEFT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.algebra.converting import convert  # noqa: E402
from peft_any.integrations.torch import attach, detach_adapter, merge_into  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.registry import method_for  # noqa: E402
from tests.hf.models import base_of, outputs, quietly  # noqa: E402
from tests.hf.whole import (  # noqa: E402
    adapted,
    close,
    compare,
    fill,
    merged,
    saved_once,
    their_config,
    trained,
)

LORA = {"r": 3, "lora_alpha": 5}
ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj", "projection"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "whisper": ["q_proj", "encoder_attn.v_proj", "fc2"],
    "diffusion": ["to_q", "to_v", "to_out"],
}
FEEDFORWARD = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "vit": (["k_proj", "v_proj", "projection"], ["projection"]),
    "mixtral": (["q_proj", "v_proj", "o_proj"], ["o_proj"]),
    "whisper": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "diffusion": (["to_k", "to_v", "to_out"], ["to_out"]),
}
CONVOLVED = {
    "whisper": ["conv1", "conv2", "k_proj"],
    "diffusion": ["conv1", "conv2", "shortcut", "downsample", "to_k"],
}
NORMS = {
    "llama": ["input_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],
    "bert": ["LayerNorm"],
    "t5": ["layer_norm"],
    "vit": ["layernorm_before", "layernorm"],
    "mixtral": ["input_layernorm", "norm"],
    "whisper": ["layer_norm", "final_layer_norm"],
    "diffusion": ["norm1", "norm3"],
}
EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", LORA),
    "rslora": ("LORA", {**LORA, "use_rslora": True}),
    "dora": ("LORA", {**LORA, "use_dora": True}),
    "adalora": ("ADALORA", {"init_r": 3, "total_step": 9}),
    "loha": ("LOHA", {"r": 3, "alpha": 5}),
    "lokr": ("LOKR", {"r": 3, "alpha": 5}),
    "lokr-decomposed": ("LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 2}),
    "oft": ("OFT", {"oft_block_size": 4}),
    "oft-exact": ("OFT", {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "hira": ("HIRA", {"r": 3}),
    "beft": ("BEFT", {}),
    "c3a": ("C3A", {"block_size": 4}),
    "deft": ("DEFT", {"r": 3}),
    "delora": ("DELORA", {"r": 3}),
    "fourierft": ("FOURIERFT", {"n_frequency": 9}),
    "frod": ("FROD", {"sparse_rate": 0.1, "progressbar": False}),
    "glora": ("GLORA", {"r": 3}),
    "gralora": ("GRALORA", {"r": 4, "gralora_k": 2}),
    "hra": ("HRA", {"r": 4}),
    "miss": ("MISS", {"r": 2}),
    "osf": ("OSF", {}),
    "peanut": ("PEANUT", {"r": 3, "depth": 1}),
    "pvera": ("PVERA", {"r": 4}),
    "randlora": ("RANDLORA", {"r": 2, "randlora_alpha": 8}),
    "road": ("ROAD", {"variant": "road_2", "group_size": 4}),
    "shira": ("SHIRA", {"r": 2}),
    "supertuning": ("SUPERTUNING", {"sparsity": 0.8, "r": 2}),
    "tinylora": ("TINYLORA", {"u": 8}),
    "unilora": ("UNILORA", {"theta_d_length": 40}),
    "vblora": ("VBLORA", {"r": 2, "num_vectors": 6, "vector_length": 4}),
    "vera": ("VERA", {"r": 4}),
    "waveft": ("WAVEFT", {"n_frequency": 9}),
}
CONVOLVING = {"lora", "rslora", "dora", "adalora", "loha", "lokr", "lokr-decomposed", "oft",
              "oft-exact", "boft", "hira"}  # fmt: skip
"""What adapts convolutions as well."""
TRANSPOSED = {"lora", "rslora", "dora", "adalora", "deft", "fourierft", "frod", "gralora", "hira",
              "pvera", "randlora", "tinylora", "unilora", "vblora", "vera", "waveft"}  # fmt: skip
"""What Hugging Face PEFT has for Conv1D."""
BY_TURNS = {
    "llama": "deft frod glora osf peanut",
    "bert": "beft frod pvera shira supertuning tinylora",
    "t5": "peanut unilora vblora waveft",
    "vit": "beft frod glora",
    "mixtral": "waveft tinylora",
    "whisper": "deft frod supertuning vblora",
    "diffusion": "osf shira",
}
ALWAYS = {*EVERY} - {*" ".join(BY_TURNS.values()).split()}

Row = tuple[str, str, str, dict[str, Any]]
"""Label, model, method, fields."""


def on_every_model() -> list[Row]:
    """Say what each architecture is tried with; of some methods by turns."""
    rows: list[Row] = []
    for model, targets in ATTENTION.items():
        chosen = TRANSPOSED if model == "gpt2" else ALWAYS | {*BY_TURNS[model].split()}
        linear = [name for name in targets if name != "projection"]
        for label in sorted(chosen):
            method, fields = EVERY[label]
            named = targets if label in CONVOLVING else linear
            rows.append((label, model, method, {**fields, "target_modules": named}))
        every, feedforward = FEEDFORWARD[model]
        fields = {"target_modules": every, "feedforward_modules": feedforward}
        rows.append(("ia3", model, "IA3", fields))
        rows.append(("ln-tuning", model, "LN_TUNING", {"target_modules": NORMS[model]}))
        if model not in ("mixtral", "diffusion"):  # with stacked experts; no transformer
            fields = {**LORA, "target_modules": "all-linear"}
            rows.append(("all-linear", model, "LORA", fields))
    return rows


def on_convolutions() -> list[Row]:
    """Say what convolutions of models that have some are tried with."""
    rows: list[Row] = [
        (f"convolved-{label}", model, EVERY[label][0], {**EVERY[label][1], "target_modules": named})
        for model, named in CONVOLVED.items()
        for label in ("lora", "dora", "hira", "loha", "lokr", "oft")
        if (model, label) != ("whisper", "oft")  # which has no Conv1d
    ]
    targets = CONVOLVED["diffusion"]
    return [
        *rows,
        ("convolved-ia3", "diffusion", "IA3",
         {"target_modules": targets, "feedforward_modules": []}),
        ("convolved-loha-effective", "diffusion", "LOHA",
         {"r": 3, "use_effective_conv2d": True, "target_modules": targets}),
        ("convolved-boft", "diffusion", "BOFT",
         {"boft_block_size": 3, "target_modules": ["conv_in"]}),
    ]  # fmt: skip


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS: list[Row] = [
    *on_every_model(),
    *on_convolutions(),
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
    ("experts", "mixtral", "LORA",
     {"r": 2, "target_modules": ["k_proj"], "target_parameters": EXPERTS}),
    ("router", "mixtral", "LORA",
     {"r": 2, "target_modules": [], "target_parameters": ["mlp.gate.weight", *EXPERTS]}),
    ("saved", "whisper", "LORA",
     {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["layer_norm"]}),
    ("bias-all", "diffusion", "LORA",
     {"r": 2, "target_modules": ["conv_in", "time"], "bias": "all"}),
    ("saved", "diffusion", "LORA",
     {"r": 2, "target_modules": ["to_q"], "modules_to_save": ["norm2"]}),
    ("lora-bias", "diffusion", "LORA",
     {"r": 2, "target_modules": ["conv1", "to_out"], "lora_bias": True}),
]  # fmt: skip
UNCALLED = {("whisper", label) for label, model, *_ in ROWS if "convolved" in label}
"""Its convolutions have strides, which Hugging Face PEFT's layers lack where Whisper reads them."""
FOLDED = {("vit", "oft"), ("vit", "oft-exact"), ("diffusion", "convolved-oft")}
"""Convolutions, which Hugging Face PEFT calls otherwise than it merges them; ours are merged."""

rows = pytest.mark.parametrize(
    ("label", "model", "method", "fields"), ROWS, ids=[f"{m}-{label}" for label, m, _, _ in ROWS]
)

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


def test_each_architecture_has_ten_methods_or_more() -> None:
    methods = Counter(model for model, _ in {(model, method) for _, model, method, _ in ROWS})
    assert methods.keys() == ATTENTION.keys()
    assert min(methods.values()) >= 10


def test_no_method_has_less_than_two_architectures() -> None:
    models = Counter(method for _, method in {(model, method) for _, model, method, _ in ROWS})
    assert models.keys() == {method for method, _ in EVERY.values()} | {"IA3", "LN_TUNING"}
    assert min(models.values()) >= 2


@rows
def test_what_hf_writes_we_merge(
    label: str, model: str, method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    weights, theirs = saved_once(base_of(model)), adapted(model, method, fields)
    with quietly():
        theirs.save_pretrained(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    ours = PeftModel(weights)
    ours.add("a", adapter)
    compare(ours.merge(), merged(theirs, weights))
    fresh = PeftModel(weights)
    own: Any = method_for(method)
    fresh.add("b", own(**fields)).save(tmp_path / "b")
    written, made = (
        {k: v.shape for k, v in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in "ab"
    )
    # Hugging Face PEFT writes an adapted embedding's base, too.
    assert {k: v for k, v in written.items() if not k.endswith("base_layer.weight")} == made


@rows
def test_what_hf_writes_we_apply(
    label: str, model: str, method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = adapted(model, method, fields)
    with quietly():
        theirs.save_pretrained(tmp_path / "a")
    if (model, label) in FOLDED:
        called, theirs = outputs(theirs, model), theirs.merge_and_unload()
        assert (called - outputs(theirs, model)).abs().max() > 0.1
    if (model, label) in UNCALLED:
        theirs = theirs.merge_and_unload()
    want = outputs(theirs, model)

    ours = base_of(model)
    before, keys = outputs(ours, model), [*ours.state_dict()]
    attach(ours, Adapter.load(tmp_path / "a"))
    assert [*ours.state_dict()] == keys
    close(outputs(ours, model), want)
    detach_adapter(ours)
    assert torch.equal(outputs(ours, model), before)
    assert not torch.equal(before, want)
    attach(ours, Adapter.load(tmp_path / "a"))
    close(outputs(merge_into(ours), model), want)


@rows
def test_what_we_write_hf_merges(
    label: str, model: str, method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    plain = base_of(model)
    weights = saved_once(plain)
    own: Any = method_for(method)
    adapter = trained(PeftModel(weights).add("a", own(**fields), seed=4))
    ours = PeftModel(weights)
    ours.add("a", adapter)
    adapter.save(tmp_path / "a")
    if own.begun:
        convert(tmp_path / "a", tmp_path / "lora", base=weights)
    with quietly():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / ("lora" if own.begun else "a"))
    want = merged(theirs, weights)
    compare(ours.merge(), want)
    assert any((want[k] != v).any() for k, v in weights.items())


@pytest.mark.parametrize("stack", STACKS, ids=[f"{model}-{label}" for label, model, *_ in STACKS])
def test_stacked_adapters_are_hfs_several_active_ones(
    stack: tuple[str, str, str, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    _, model, method, first, second = stack
    plain = base_of(model)
    weights = saved_once(plain)
    targets = [t for t in ATTENTION[model] if method != "VERA" or t in ("q_proj", "o_proj")]
    one, two = (their_config(method, {"target_modules": targets, **f}) for f in (first, second))
    with quietly():
        theirs = peft.get_peft_model(plain, one, "first")
        theirs.add_adapter("second", two)
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
