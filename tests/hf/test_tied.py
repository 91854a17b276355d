"""A base with tied embeddings: what Hugging Face PEFT saves of each way to adapt them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_any import Adapter, merge_checkpoint, verify_checkpoint  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from tests.hf.reference import quietly  # noqa: E402
from tests.hf.test_live import ROUNDING, compare  # noqa: E402

IDS = torch.tensor([[7, 3, 1, 9], [3, 7, 1, 2]])
BOTH = ["embed_tokens", "lm_head"]
Q = {"target_modules": ["q_proj"]}
TIE = {"ensure_weight_tying": True}
ROWS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    # fields, whether embeddings are saved along, whether a merge leaves one tensor
    "table": ({"target_modules": ["embed_tokens", "q_proj"], **TIE}, False, True),
    "both": ({"target_modules": BOTH, **TIE}, False, True),
    "head": ({"target_modules": ["lm_head"], **TIE}, False, True),
    "regex": ({"target_modules": r".*(embed_tokens|q_proj)", **TIE}, False, True),
    "both-saved-along": ({"target_modules": BOTH, **TIE}, True, True),
    "both-not-ensured": ({"target_modules": BOTH}, False, False),
    "head-not-ensured": ({"target_modules": ["lm_head"]}, False, False),
    "copy-of-table": ({**Q, "modules_to_save": ["embed_tokens"], **TIE}, False, True),
    "copy-of-head": ({**Q, "modules_to_save": ["lm_head"], **TIE}, False, True),
    "copies": ({**Q, "modules_to_save": [*BOTH], **TIE}, False, True),
    "copies-saved-along": ({**Q, "modules_to_save": ["embed_tokens"], **TIE}, True, True),
    "copies-not-ensured": ({**Q, "modules_to_save": [*BOTH]}, False, False),
    "tokens": ({**Q, "trainable_token_indices": [1, 3], **TIE}, False, True),
    "tokens-saved-along": ({**Q, "trainable_token_indices": [1, 3], **TIE}, True, True),
    "tokens-of-both": (
        {**Q, "trainable_token_indices": {n: [1, 3] for n in BOTH}, **TIE}, False, True
    ),
    "tokens-of-each": (
        {**Q, "trainable_token_indices": {BOTH[0]: [1, 3], BOTH[1]: [2, 3]}}, False, False
    ),
    "tokens-of-the-head": ({**Q, "trainable_token_indices": {"lm_head": [1, 3]}}, False, False),
}  # fmt: skip


def tied() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("row", ROWS.values(), ids=[*ROWS])
def test_tied_embeddings_act_as_in_hf(row: tuple[Any, bool, bool], tmp_path: Path) -> None:
    fields, along, one = row
    with quietly(), torch.no_grad():
        tied().save_pretrained(tmp_path / "base")
        theirs = peft.get_peft_model(tied(), peft.LoraConfig(r=2, lora_alpha=3, **fields))
        draw = torch.Generator().manual_seed(1)
        for p in theirs.parameters():
            if p.requires_grad:  # in place: a tie lies in the memory
                p.copy_(torch.randn(p.shape, generator=draw) / 4)
        theirs.eval().save_pretrained(tmp_path / "a", save_embedding_layers=along or "auto")
        want, plain = theirs(IDS).logits.numpy(), tied()(IDS).logits.numpy()
    assert abs(want - plain).max() > 0.01

    adapter = Adapter.load(tmp_path / "a")
    assert not adapter.notes
    adapter.save(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()

    ours = tied()
    attach(ours, adapter)
    with torch.no_grad():
        compare({"y": ours(IDS).logits.numpy()}, {"y": want}, ROUNDING["float32"])

    receipt = merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert (not receipt.untied) == one
    assert not [said for said in receipt.warnings if "does not target" in said]
    verify_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] == one
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        compare({"y": merged(IDS).logits.numpy()}, {"y": want}, ROUNDING["float32"])
