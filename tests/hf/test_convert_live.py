"""Hugging Face PEFT's own adapters as LoRAs: loaded there, they do what the adapters do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from peft_any import convert, write_safetensors
from tests.hf import reference

BOUND = {"float32": 1e-5, "float64": 1e-10}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "miss": (peft.MissConfig, {"r": 2}),
    "bat": (peft.MissConfig, {"r": 2, "init_weights": "bat"}),
    "hra": (peft.HRAConfig, {"r": 2}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 2}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 2}),
    "delora": (peft.DeloraConfig, {"r": 2}),
    "gralora": (peft.GraloraConfig, {"r": 4, "alpha": 4}),
    "road": (peft.RoadConfig, {"group_size": 2}),
    "shira": (peft.ShiraConfig, {"r": 2, "random_seed": 1}),
    "randlora": (peft.RandLoraConfig, {"r": 2}),
    "adamss": (peft.AdamssConfig, {"r": 3, "num_subspaces": 2, "subspace_rank": 2}),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.2, "progressbar": False}),
    "psoft": (peft.PsoftConfig, {"r": 3, "psoft_alpha": 2}),
}


class Net(nn.Module):
    """Two layers of other sizes, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(torch.tanh(self.one(x)))
        return y


def net_of(dtype: str) -> Net:
    """Make a network with fixed weights."""
    torch.manual_seed(0)
    return Net().to(getattr(torch, dtype)).eval()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # SHiRA's own
@pytest.mark.parametrize("dtype", [*BOUND])
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_converted_adapter_is_the_adapter(kind: str, dtype: str, tmp_path: Path) -> None:
    make, fields = KINDS[kind]
    write_safetensors(tmp_path / "base.safetensors", reference.state_of(net_of(dtype)))
    with reference.quietly():
        attached = net_of("float32" if kind == "psoft" else dtype)  # it decomposes no float64
        model = peft.get_peft_model(attached, make(target_modules=["one", "two"], **fields))
    model = model.to(getattr(torch, dtype)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p), alpha=1.0 if "norm" not in name else 0.0)
    x = torch.randn(5, 6, dtype=getattr(torch, dtype))
    want = model(x).detach()
    with reference.quietly():
        model.save_pretrained(tmp_path / "a")
    reference.complete(tmp_path / "a", model)
    _, record = convert(tmp_path / "a", tmp_path / "lora", base=tmp_path / "base.safetensors")
    assert record.error is not None
    assert record.error < BOUND[dtype]
    with reference.quietly():
        again = peft.PeftModel.from_pretrained(net_of(dtype), tmp_path / "lora")
    assert again.peft_config["default"].peft_type == "LORA"
    got = again.to(getattr(torch, dtype)).eval()(x).detach()
    size = float(want.abs().max())
    bound = max(BOUND[dtype], 1e-6 if kind == "frod" else 0.0)  # its U is in single precision
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=bound * size)
