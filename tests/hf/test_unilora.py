"""UniLoRA on several layers, whose order decides which numbers each of them gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from peft_any import Adapter, ConfigError, PeftModel, ShapeError, UniLoraConfig
from peft_any.io.safetensors import write_safetensors
from peft_any.surgery.merge import merge_checkpoint
from tests.hf import reference

BOUND = {"float32": 1e-5, "float64": 1e-10}
TARGETS = ["zeta", "beta", "alpha"]


def net_of(dtype: str) -> nn.Module:
    """Make a network whose layers are not in alphabetical order."""
    torch.manual_seed(0)
    layers = {"zeta": nn.Linear(6, 8), "beta": nn.Linear(8, 4), "alpha": nn.Linear(4, 6)}
    return nn.ModuleDict(layers).to(getattr(torch, dtype)).eval()


def written(folder: Path, dtype: str, **fields: Any) -> dict[str, np.ndarray]:
    """Let Hugging Face PEFT write an adapter, and give the weights merged with it."""
    config = peft.UniLoraConfig(
        r=3, theta_d_length=31, init_theta_d_bound=0.5, target_modules=TARGETS, **fields
    )
    with reference.quietly():
        theirs = peft.get_peft_model(net_of(dtype), config).to(getattr(torch, dtype)).eval()
        theirs.save_pretrained(folder)
        return reference.state_of(theirs.merge_and_unload())


def compare(got: dict[str, Any], want: dict[str, Any], dtype: str) -> None:
    assert got.keys() == want.keys()
    for name, merged in got.items():
        np.testing.assert_allclose(merged, want[name], rtol=0, atol=BOUND[dtype], err_msg=name)


@pytest.mark.parametrize("dtype", [*BOUND])
@pytest.mark.parametrize("saved", [False, True])
def test_several_layers_are_read_and_written(saved: bool, dtype: str, tmp_path: Path) -> None:
    want = written(tmp_path / "a", dtype, save_indices=saved)
    ours = PeftModel(reference.state_of(net_of(dtype)))
    adapter = Adapter.load(tmp_path / "a")
    assert sorted(adapter.sites) == (sorted(TARGETS) if saved else [])
    assert ours.add("a", adapter, rederive=not saved).num_parameters == 31
    compare(ours.merge(), want, dtype)
    ours["a"].save(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("dtype", [*BOUND])
@pytest.mark.parametrize("saved", [False, True])
def test_a_fresh_adapter_means_the_same_in_hf(saved: bool, dtype: str, tmp_path: Path) -> None:
    ours = PeftModel(reference.state_of(net_of(dtype)))
    config = UniLoraConfig(
        r=3, theta_d_length=31, init_theta_d_bound=0.5, target_modules=TARGETS, save_indices=saved
    )
    ours.add("a", config, dtype=dtype).save(tmp_path / "a")
    with reference.quietly():
        theirs = peft.PeftModel.from_pretrained(net_of(dtype), tmp_path / "a")
        want = reference.state_of(theirs.merge_and_unload())
    compare(ours.merge(), want, dtype)


def test_the_order_of_layers_is_not_guessed(tmp_path: Path) -> None:
    written(tmp_path / "a", "float32")
    weights = reference.state_of(net_of("float32"))
    adapter = Adapter.load(tmp_path / "a")
    with pytest.raises(ConfigError, match="order of the model's layers: give rederive=True"):
        PeftModel(weights).add("a", adapter)
    with pytest.raises(ShapeError, match="unilora_theta_d: missing"):
        PeftModel(weights).add("a", adapter.replace(shared={}), rederive=True)
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base" / "model.safetensors", weights)
    for rederive in (False, True):
        with pytest.raises(ConfigError, match="files do not keep the order"):
            merge_checkpoint(
                tmp_path / "base", [tmp_path / "a"], tmp_path / "out", rederive=rederive
            )
    written(tmp_path / "saved", "float32", save_indices=True)
    merge_checkpoint(tmp_path / "base", [tmp_path / "saved"], tmp_path / "out")
