"""UniLoRA on several layers, whose order decides which numbers each of them gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from peft_any import Adapter, ConfigError, PeftModel, ShapeError, UniLoraConfig, traversal
from peft_any.integrations.torch import attach
from peft_any.io.safetensors import read_safetensors, write_safetensors
from peft_any.surgery.merge import merge_checkpoint
from peft_any.traversal import in_model_order, known_parts
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


def test_the_order_of_layers_is_told_by_a_state_dict(tmp_path: Path) -> None:
    want = written(tmp_path / "a", "float32")
    weights = reference.state_of(net_of("float32"))
    adapter = Adapter.load(tmp_path / "a")
    ours = PeftModel(weights)
    ours.add("a", adapter)
    compare(ours.merge(), want, "float32")
    with pytest.raises(ShapeError, match="unilora_theta_d: missing"):
        PeftModel(weights).add("a", adapter.replace(shared={}), rederive=True)
    net = net_of("float32")
    attach(net, adapter)
    with torch.no_grad():
        y = net["zeta"](torch.ones(1, 6))
    np.testing.assert_allclose(
        reference.host(y), np.ones((1, 6)) @ want["zeta.weight"].T + want["zeta.bias"], atol=1e-5
    )


def test_the_order_of_names_is_not_taken_for_it(tmp_path: Path) -> None:
    written(tmp_path / "a", "float32")
    adapter = Adapter.load(tmp_path / "a")
    weights = dict(sorted(reference.state_of(net_of("float32")).items()))
    match = "alpha: the base's tensors do not tell in which order the model has alpha, beta, zeta"
    with pytest.raises(ConfigError, match=match):
        PeftModel(weights).add("a", adapter)
    with pytest.raises(ConfigError, match=match):  # nor is an adapter begun in it
        PeftModel(weights).add("a", adapter.config)
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base" / "model.safetensors", weights)
    for rederive in (False, True):
        with pytest.raises(ConfigError, match=match):
            merge_checkpoint(
                tmp_path / "base", [tmp_path / "a"], tmp_path / "out", rederive=rederive
            )
    written(tmp_path / "saved", "float32", save_indices=True)
    merge_checkpoint(tmp_path / "base", [tmp_path / "saved"], tmp_path / "out")


KINDS = [kind for kinds in traversal._KNOWN.values() for kind in kinds.split()]
SMALL = {
    "num_hidden_layers": 11, "num_layers": 11, "n_layer": 11, "n_layers": 11, "encoder_layers": 11,
    "decoder_layers": 11, "attention_types": [[["global"], 11]],
}  # fmt: skip
"""More than ten: their names do not sort as their numbers do."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_known_models_is_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    sizes = {k: v for k, v in SMALL.items() if k in config.to_dict()}
    config = type(config)(**sizes)
    with torch.device("meta"), reference.quietly():
        model = transformers.AutoModel.from_config(config)
    linear = (nn.Linear, reference.Conv1D)
    layers = [
        n for n, m in model.named_modules() if isinstance(m, linear) and any(map(str.isdigit, n))
    ]
    assert len(layers) >= 44
    tensors = [*model.state_dict()]
    assert in_model_order(set(layers), tensors) == layers
    assert in_model_order(set(layers), sorted(tensors), known_parts({"model_type": kind})) == layers
    with pytest.raises(ConfigError, match="do not tell in which order"):
        in_model_order(set(layers), sorted(tensors))


def test_a_checkpoint_of_a_known_model_is_merged_as_hf_merges_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 16}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=11, num_key_value_heads=1)
    with reference.quietly():
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "base")
        fields = peft.UniLoraConfig(
            r=2,
            theta_d_length=50,
            init_theta_d_bound=0.5,
            target_modules=["q_proj", "k_proj", "up_proj"],
        )
        theirs = peft.get_peft_model(model, fields)
        theirs.save_pretrained(tmp_path / "a")
        want = reference.state_of(theirs.merge_and_unload())
    merge_checkpoint(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    got = read_safetensors(tmp_path / "out" / "model.safetensors")
    compare(got, {name: want[name] for name in got}, "float32")
