"""Files as users have them: other names, old or null fields, half precision, whole modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from peft_any import merge_checkpoint  # noqa: E402
from peft_any.adapter import Adapter  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from tests.hf.models import base_of, make, quietly  # noqa: E402
from tests.hf.reference import host, state_of  # noqa: E402
from tests.hf.whole import adapted, compare, fill, merged, saved_once  # noqa: E402

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
OLD = ("r", "lora_alpha", "target_modules", "peft_type", "task_type", "bias", "fan_in_fan_out")


def old(config: dict[str, Any]) -> dict[str, Any]:
    """Write a configuration as PEFT 0.2 did."""
    return {k: config[k] for k in OLD} | {"enable_lora": None, "merge_weights": False}


def null(config: dict[str, Any]) -> dict[str, Any]:
    """Write null for what is false."""
    return {k: None if v is False else v for k, v in config.items()}


def empty(config: dict[str, Any]) -> dict[str, Any]:
    """Write empty lists and mappings for null."""
    fields = ("alora_invocation_tokens", "exclude_modules", "modules_to_save", "target_parameters")
    mappings = ("corda_config", "eva_config", "loftq_config", "megatron_config")
    return config | {k: [] for k in fields} | {k: {} for k in mappings} | {"layers_pattern": ""}


Row = tuple[str, str, dict[str, Any], str, Callable[[dict[str, Any]], dict[str, Any]]]
ROWS: dict[str, Row] = {
    "old": ("llama", "LORA", LORA, "default", old),
    "null": ("llama", "LORA", LORA, "default", null),
    "empty": ("llama", "LORA", LORA, "default", empty),
    "null-ia3": ("llama", "IA3", {"target_modules": ["k_proj"], "feedforward_modules": []},
                 "default", null),
    "null-lokr": ("llama", "LOKR", {"r": 2, "target_modules": ["q_proj"]}, "default", null),
    "null-oft": ("llama", "OFT", {"oft_block_size": 4, "target_modules": ["q_proj"]}, "default",
                 null),
    "named": ("llama", "LORA", {**LORA, "modules_to_save": ["lm_head"]}, "mine", dict),
    "named-as-a-factor": ("llama", "LORA", LORA, "lora_A", dict),
    "a-module-of-modules": ("llama", "LORA", {**LORA, "modules_to_save": ["mlp"]}, "default", dict),
    "patterns": ("llama", "LORA", {
        **LORA, "rank_pattern": {r".*layers\.(0|1)\.self_attn\.q_proj": 5,
                                 "^model.layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {r"layers\.\d\.self_attn\.v_proj": 9}}, "default", dict),
    "exclude": ("llama", "LORA", {
        **LORA, "target_modules": "all-linear", "exclude_modules": r".*\.(mlp|0)\..*"},
        "default", dict),
    "guessed": ("gpt2", "IA3", {}, "default", dict),
    "dora-on-an-embedding": ("bert", "LORA", {
        **LORA, "target_modules": ["word_embeddings", "query"], "use_dora": True},
        "default", dict),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=[*ROWS])
def test_files_of_odd_forms_merge_as_in_hf(row: Row, tmp_path: Path) -> None:
    model, method, fields, name, edit = row
    weights = saved_once(base_of(model))
    theirs = adapted(model, method, fields, name)
    with quietly():
        theirs.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with quietly():
        theirs = peft.PeftModel.from_pretrained(base_of(model), folder)
    ours = PeftModel(weights)
    ours.add("a", Adapter.load(folder))
    compare(ours.merge(), merged(theirs, weights))


def test_an_adapter_of_a_compiled_base_goes_onto_the_plain_one(tmp_path: Path) -> None:
    plain = base_of("llama")
    weights = saved_once(plain)
    with quietly():
        fields = {**LORA, "modules_to_save": ["lm_head"]}
        theirs = peft.get_peft_model(torch.compile(plain), peft.LoraConfig(**fields)).eval()
        draw = torch.Generator().manual_seed(1)
        for p in theirs.parameters():
            if p.requires_grad:
                p.data.copy_(torch.randn(p.shape, generator=draw))
        theirs.save_pretrained(tmp_path / "a")
    assert any(
        "_orig_mod" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors")
    )
    adapter = Adapter.load(tmp_path / "a")
    ours = PeftModel(weights)
    ours.add("a", adapter)
    with quietly():
        want = state_of(theirs.merge_and_unload())
    compare(ours.merge(), {k.removeprefix("_orig_mod."): v for k, v in want.items()})
    adapter.save(tmp_path / "plain")
    with quietly():
        again = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path / "plain")
    compare(ours.merge(), merged(again, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = base_of("llama").to(dtype)
    weights = saved_once(plain)
    with quietly():
        theirs = peft.get_peft_model(plain, peft.LoraConfig(**LORA), autocast_adapter_dtype=False)
        fill(theirs, "default", 1)
        theirs.save_pretrained(tmp_path)
    wide = {k: v.astype("float32") for k, v in weights.items()}
    ours = PeftModel(wide)
    ours.add("a", Adapter.load(tmp_path))
    with quietly():
        want = {k: host(v) for k, v in theirs.float().merge_and_unload().state_dict().items()}
    compare(ours.merge(), want)


def test_embeddings_saved_with_a_tied_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with quietly():
        plain = make("llama", tie_word_embeddings=True)
        plain.save_pretrained(tmp_path / "base")
        theirs = peft.get_peft_model(plain, peft.LoraConfig(**LORA))
        fill(theirs, "default", 1)
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
        want = state_of(theirs.merge_and_unload())
    merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert want.keys() - got.keys() == {"lm_head.weight"}
    compare(got, {k: np.asarray(want[k]) for k in got})
