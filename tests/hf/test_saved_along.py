"""Every method with a whole module, embeddings and a second adapter saved along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch  # noqa: E402

from peft_any import Adapter, PeftModel  # noqa: E402
from peft_any.method import Tuner  # noqa: E402
from peft_any.registry import method_for, method_names  # noqa: E402
from tests.hf.reference import quietly, state_of  # noqa: E402
from tests.hf.test_models import base_of, compare, fill, merged  # noqa: E402

TARGETS = {"target_modules": ["q_proj", "o_proj"]}
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 5},
    "ADAMSS": {"r": 6, "num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 7},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["norm", "input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 2},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 1, "random_seed": 0},
    "SUPERTUNING": {"sparsity": 0.5},
    "TINYLORA": {"u": 3},
    "TRAINABLE_TOKENS": {"token_indices": [1, 3]},
    "UNILORA": {"theta_d_length": 20, "r": 2, "save_indices": True},
    "VBLORA": {"vector_length": 2, "num_vectors": 5, "r": 2},
    "WAVEFT": {"n_frequency": 8},
}
UNMERGED = {"ADAPTION_PROMPT", "LILY", "POLY", "XLORA"}
BIASES = {"BEFT"}
"""Llama's layers have none."""
NAMES = [
    name
    for name in method_names()
    if issubclass(method_for(name), Tuner)
    and not method_for(name).marks
    and name not in UNMERGED | BIASES
]
WHOLE = {"modules_to_save": ["lm_head"]}
ALONE = {
    "LN_TUNING",  # HF's merge leaves the wrapper of a whole module there
    "TRAINABLE_TOKENS",  # it has no such field
}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_along_is_read_and_written(name: str, tmp_path: Path) -> None:
    base = base_of("llama")
    weights = state_of(base)
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    given = (TARGETS if name != "TRAINABLE_TOKENS" else {}) | FIELDS.get(name, {})
    given = given | ({} if name in ALONE else WHOLE)
    with quietly():
        theirs = peft.get_peft_model(base, kind(**given), "mine").eval()
        if name != "ADALORA":  # which has one
            theirs.add_adapter("other", kind(**given))
        draw = torch.Generator().manual_seed(1)
        for p in theirs.parameters():
            if p.requires_grad:
                p.data.copy_(torch.randn(p.shape, generator=draw) / 8)
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    folder = tmp_path / "mine"
    adapter = Adapter.load(folder)
    assert "model.embed_tokens.weight" in adapter.extra
    assert adapter.notes == ()
    adapter.save(tmp_path / "again")
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / part).read_bytes() == (folder / part).read_bytes()
    ours = PeftModel(weights)
    ours.add("a", adapter)
    with quietly():
        again = peft.PeftModel.from_pretrained(base_of("llama"), folder)
    compare(ours.merge(), merged(again, weights))


@pytest.mark.parametrize("name", ["TINYLORA", "VBLORA"])
def test_a_targeted_head_saved_along_is_read_and_written(name: str, tmp_path: Path) -> None:
    """Its layer holds the arrays that all share, and PEFT saves them once more with it."""
    base = base_of("llama")
    weights = state_of(base)
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    with quietly():
        config = kind(target_modules=["q_proj", "lm_head"], **FIELDS[name])
        theirs = peft.get_peft_model(base, config).eval()
    fill(theirs, "default", 1)
    with quietly():
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    adapter = Adapter.load(tmp_path / "a")
    adapter.save(tmp_path / "b")
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / part).read_bytes() == (tmp_path / "a" / part).read_bytes()
    ours = PeftModel(weights)
    ours.add("a", adapter)
    compare(ours.merge(), merged(theirs, weights))
