"""VB-LoRA's short files, which hold places and weights in place of logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn

from peft_any import Adapter, PeftModel
from tests.hf import reference

BOUND = {"float32": 1e-5, "float64": 1e-10}


def net_of(dtype: str) -> nn.Module:
    """Make a network with fixed weights."""
    torch.manual_seed(0)
    layers = {"one": nn.Linear(6, 8), "two": nn.Linear(8, 4)}
    return nn.ModuleDict(layers).to(getattr(torch, dtype)).eval()


@pytest.mark.parametrize("dtype", [*BOUND])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_short_files_are_read_and_written(topk: int, dtype: str, tmp_path: Path) -> None:
    base = net_of(dtype)
    weights = reference.state_of(base)
    config = peft.VBLoRAConfig(
        r=3, num_vectors=7, vector_length=2, topk=topk, init_vector_bank_bound=0.5,
        init_logits_std=1.0, save_only_topk_weights=True, target_modules=["one", "two"],
    )  # fmt: skip
    with reference.quietly():
        theirs = peft.get_peft_model(base, config).to(getattr(torch, dtype)).eval()
        theirs.save_pretrained(tmp_path / "a")
        want = reference.state_of(theirs.merge_and_unload())
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.sites["one"]["vblora_logits_A_topk_indices"].dtype == np.uint8
    ours = PeftModel(weights)
    ours.add("a", adapter)
    for name, merged in ours.merge().items():
        np.testing.assert_allclose(merged, want[name], rtol=0, atol=BOUND[dtype], err_msg=name)
    adapter.save(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    if dtype == "float64":
        return  # HF PEFT itself cannot read a short file of double precision
    with reference.quietly():
        again = peft.PeftModel.from_pretrained(net_of(dtype), tmp_path / "b")
        got = reference.state_of(again.to(getattr(torch, dtype)).merge_and_unload())
    for name, merged in want.items():
        np.testing.assert_allclose(got[name], merged, rtol=0, atol=BOUND[dtype], err_msg=name)
