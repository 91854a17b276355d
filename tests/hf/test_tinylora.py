"""TinyLoRA on several layers, whose places decide their projections and which vector they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from peft_any import Adapter, ConfigError, PeftModel, TinyLoraConfig
from tests.hf import reference

BOUND = {"float32": 1e-5, "float64": 1e-10}
TARGETS = ["zeta", "beta", "alpha", "gamma", "wte"]
FIELDS: dict[str, Any] = {"r": 3, "u": 7, "init_weights": "uniform", "init_v_bound": 0.5}


def net_of(dtype: str) -> nn.Module:
    """Make a network whose layers are not in alphabetical order."""
    torch.manual_seed(0)
    layers = {
        "wte": nn.Embedding(9, 6), "zeta": nn.Linear(6, 8), "beta": nn.Linear(8, 2),
        "alpha": nn.Linear(2, 6), "gamma": nn.Linear(6, 6, bias=False),
    }  # fmt: skip
    return nn.ModuleDict(layers).to(getattr(torch, dtype)).eval()


def written(folder: Path, dtype: str, **fields: Any) -> dict[str, np.ndarray]:
    """Let Hugging Face PEFT write an adapter, and give the weights merged with it."""
    torch.manual_seed(1)
    with reference.quietly():
        config = peft.TinyLoraConfig(**FIELDS, target_modules=TARGETS, **fields)
        theirs = peft.get_peft_model(net_of(dtype), config).to(getattr(torch, dtype)).eval()
        theirs.save_pretrained(folder)
        return reference.state_of(theirs.merge_and_unload())


def compare(got: dict[str, Any], want: dict[str, Any], bound: float) -> None:
    assert got.keys() == want.keys()
    for name, merged in got.items():
        np.testing.assert_allclose(merged, want[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("dtype", [*BOUND])
@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.6, 1.0])
def test_a_saved_projection_tells_the_place(tying: float, dtype: str, tmp_path: Path) -> None:
    want = written(tmp_path / "a", dtype, weight_tying=tying)
    groups = max(1, round(5 * (1 - tying)))
    kinds: Any = {"wte": "Embedding"}
    ours = PeftModel(dict(sorted(reference.state_of(net_of(dtype)).items())), kinds=kinds)
    assert ours.add("a", Adapter.load(tmp_path / "a")).num_parameters == 7 * groups
    compare(ours.merge(), want, BOUND[dtype])
    ours["a"].save(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_without_it_a_state_dict_tells_the_order(tmp_path: Path) -> None:
    want = written(tmp_path / "a", "float32", weight_tying=0.5, save_projection=False)
    state = reference.state_of(net_of("float32"))
    ours = PeftModel(state, kinds={"wte": "Embedding"})
    ours.add("a", Adapter.load(tmp_path / "a"))
    compare(ours.merge(), want, BOUND["float32"])
    with pytest.raises(ConfigError, match="rederive=True"):
        PeftModel(dict(sorted(state.items())), kinds={"wte": "Embedding"}).add(
            "a", ours["a"].config
        )


def test_a_projection_of_another_seed_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", "float32", projection_seed=100)
    config = tmp_path / "a/adapter_config.json"
    config.write_text(config.read_text().replace('"projection_seed": 100', '"projection_seed": 3'))
    ours = PeftModel(reference.state_of(net_of("float32")), kinds={"wte": "Embedding"})
    with pytest.raises(ConfigError, match=r"tinylora_P: was not drawn for any .* projection_seed"):
        ours.add("a", Adapter.load(tmp_path / "a"))


@pytest.mark.parametrize("tying", [0.0, 0.5])
@pytest.mark.parametrize("saved", [False, True])
def test_a_fresh_adapter_means_the_same_in_hf(saved: bool, tying: float, tmp_path: Path) -> None:
    ours = PeftModel(reference.state_of(net_of("float32")), kinds={"wte": "Embedding"})
    config = TinyLoraConfig(
        **FIELDS, target_modules=TARGETS, weight_tying=tying, save_projection=saved
    )
    ours.add("a", config).save(tmp_path / "a")
    with reference.quietly():
        theirs = peft.PeftModel.from_pretrained(net_of("float32"), tmp_path / "a")
        want = reference.state_of(theirs.merge_and_unload())
    compare(ours.merge(), want, BOUND["float32"])
