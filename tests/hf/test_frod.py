"""FRoD on several layers: roles share a basis, and Hugging Face PEFT pairs it with its own U."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.frod.model import _category_from_key
from torch import nn

from peft_any import Adapter, ConfigError, FrodConfig, PeftModel, ShapeError, convert
from peft_any.errors import UsageError
from peft_any.joint import role_of
from tests.hf import reference
from tests.hf.whole import compare, fill

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # within torch
TARGETS = ["q", "dense"]
BLOCKS = 3
FIELDS: dict[str, Any] = {"sparse_rate": 0.1, "projection_prng_key": 5, "target_modules": TARGETS}


def net_of(dtype: str, *, faint: bool = False) -> nn.Module:
    """Make blocks with layers of three roles; `faint` ones read nothing of some inputs."""
    torch.manual_seed(0)
    blocks = nn.ModuleList()
    for _ in range(BLOCKS):
        block = nn.Module()
        block.q = nn.Linear(6, 10)
        block.attention = nn.Module()
        block.attention.output = nn.Module()
        block.attention.output.dense = nn.Linear(10, 6)
        block.output = nn.Module()
        block.output.dense = nn.Linear(12, 3, bias=False)
        blocks.append(block)
    net = nn.Module()
    net.layer = blocks
    if faint:
        for block in blocks:
            block.q.weight.data[:, :2] = 0.0
    return net.to(getattr(torch, dtype)).eval()


def written(folder: Path, net: nn.Module, **fields: Any) -> Any:
    """Let Hugging Face PEFT write an adapter with trained-looking values."""
    dtype = next(net.parameters()).dtype
    with reference.quietly():
        config = peft.FrodConfig(progressbar=False, **{**FIELDS, **fields})
        theirs = peft.get_peft_model(net, config).to(dtype).eval()
    fill(theirs, "default", 1)
    with reference.quietly():
        theirs.save_pretrained(folder)
    return theirs


def layers_of(theirs: Any) -> dict[str, Any]:
    """Give the adapted modules by name."""
    model = theirs.base_model.model
    return {name: module for name, module in model.named_modules() if hasattr(module, "frod_U")}


@pytest.mark.parametrize("faint", [False, True])
def test_several_layers_of_several_roles_are_read_and_written(faint: bool, tmp_path: Path) -> None:
    net = net_of("float32", faint=faint)
    weights = reference.state_of(net)
    theirs = written(tmp_path / "a", net)
    ours = PeftModel(weights)
    adapter = ours.add("a", Adapter.load(tmp_path / "a"))
    assert len({name.partition(".")[2] for name in adapter.shared}) == 3
    x = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    with torch.no_grad():
        y = reference.host(layers_of(theirs)["layer.1.q"](torch.tensor(x)))
    compare({"y": ours.bind().layers["layer.1.q"](x)}, {"y": y})
    with reference.quietly():
        compare(ours.merge(), reference.state_of(theirs.merge_and_unload()))
    adapter.save(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_in_double_precision_all_but_the_rounding_of_u_is_hfs(tmp_path: Path) -> None:
    net = net_of("float64")
    weights = reference.state_of(net)
    theirs = written(tmp_path / "a", net)
    adapter = PeftModel(weights).add("a", Adapter.load(tmp_path / "a"))
    sites = {}
    for name, module in layers_of(theirs).items():
        u = reference.host(module.frod_U["default"]).astype("float64")
        np.testing.assert_allclose(adapter.sites[name]["frod_found_U"], u, rtol=0, atol=6e-8)
        sites[name] = {**adapter.sites[name], "frod_found_U": u}
    ours = PeftModel(weights)
    ours.add("a", adapter.replace(sites=sites))
    with reference.quietly():
        want = reference.state_of(theirs.merge_and_unload())
    for name, merged in ours.merge().items():
        np.testing.assert_allclose(merged, want[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hf_refuses_ours_since_it_would_pair_it_with_its_own_u(dtype: str, tmp_path: Path) -> None:
    net = net_of(dtype)
    weights = reference.state_of(net)
    rng = np.random.default_rng(3)
    made = PeftModel(weights).add("a", FrodConfig(**FIELDS), dtype=dtype)
    sites = {
        name: {k: a if k == "frod_U" else a + 0.2 * rng.standard_normal(a.shape).astype(dtype)
               for k, a in p.items()}
        for name, p in made.sites.items()
    }  # fmt: skip
    model = PeftModel(weights)
    model.add("a", made.replace(sites=sites)).save(tmp_path / "a")
    with pytest.raises(TypeError, match="'<' not supported"):
        peft.PeftModel.from_pretrained(net, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    said = json.loads(path.read_text())
    assert said["sparse_rate"] == "peft_any"

    again = PeftModel(weights)
    adapter = again.add("a", Adapter.load(tmp_path / "a"))
    compare(again.merge(), model.merge())
    adapter.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / path.name).read_text()) == said
    with pytest.raises(ConfigError, match=r"sparse_rate='peft_any' cannot start anew"):
        PeftModel(weights).add("a", adapter.config)
    convert(tmp_path / "a", tmp_path / "lora", base=weights)
    with reference.quietly():
        lora = peft.PeftModel.from_pretrained(net_of(dtype), tmp_path / "lora")
        compare(reference.state_of(lora.merge_and_unload()), model.merge())

    path.write_text(json.dumps({**said, "sparse_rate": FIELDS["sparse_rate"]}))
    with reference.quietly():
        theirs = peft.PeftModel.from_pretrained(net, tmp_path / "a").to(getattr(torch, dtype))
        fresh = peft.get_peft_model(net_of(dtype), peft.FrodConfig(progressbar=False, **FIELDS))
    for key, places in fresh.base_model.frod_s_indices.items():
        ours_places = made.shared[f"frod_s_indices.{key}"]
        np.testing.assert_array_equal(ours_places, reference.host(places["default"]))
    x = torch.tensor(rng.standard_normal((4, 6)).astype(dtype))
    want = model.bind().layers["layer.0.q"](reference.host(x))
    with torch.no_grad():
        stale = reference.host(layers_of(theirs)["layer.0.q"](x))
        reference.paired(theirs)
        y = reference.host(layers_of(theirs)["layer.0.q"](x))
    compare({"y": y}, {"y": want})
    assert np.abs(stale - want).max() > 0.1  # why the mark is there


@pytest.mark.parametrize(
    "name",
    ["fc", "0.fc", "h.3.fc", "a.fc", "layers.0.self_attn.q_proj", "layer.1.attention.output.dense",
     "attention.output.dense", "layer.1.output.dense", "output.dense", "x.attention.self.query"],
)  # fmt: skip
def test_roles_are_hfs(name: str) -> None:
    assert role_of(name) == _category_from_key(name)


def test_a_file_without_v_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", net_of("float32"), save_projection=False)
    with pytest.raises(ConfigError, match=r"save_projection=False must be true: .* merge it there"):
        Adapter.load(tmp_path / "a")


def test_layers_of_one_role_have_the_same_inputs(tmp_path: Path) -> None:
    weights = {"h.0.fc.weight": np.eye(3, 4), "h.1.fc.weight": np.eye(3, 5)}
    with pytest.raises(ShapeError, match=r"h\.1\.fc: 5 inputs cannot share a basis with the 4 of"):
        PeftModel(weights).add("a", FrodConfig(target_modules=["fc"]))
    written(tmp_path / "a", net_of("float32"))
    adapter = Adapter.load(tmp_path / "a")
    shared = {k: a for k, a in adapter.shared.items() if k != "frod_V.q"}
    with pytest.raises(ShapeError, match=r"frod_V\.q: missing, of shape \(6, 6\)"):
        PeftModel(reference.state_of(net_of("float32"))).add("a", adapter.replace(shared=shared))


def test_another_name_may_give_another_role(tmp_path: Path) -> None:
    net = net_of("float32")
    weights = reference.state_of(net)
    theirs = written(tmp_path / "a", net)
    adapter = Adapter.load(tmp_path / "a").renamed(lambda name: name.replace(".q", ".attn.wq"))
    assert "frod_V.attn_wq" in adapter.shared
    ours = PeftModel({name.replace(".q.", ".attn.wq."): w for name, w in weights.items()})
    ours.add("a", adapter)
    with reference.quietly():
        want = reference.state_of(theirs.merge_and_unload())
    compare(ours.merge(), {name.replace(".q.", ".attn.wq."): w for name, w in want.items()})

    def one_role(name: str) -> str:
        return name.replace("attention.output.dense", "0.dense").replace("output.dense", "1.dense")

    with pytest.raises(UsageError, match=r"would share frod_V\.dense with sites that have another"):
        Adapter.load(tmp_path / "a").renamed(one_role)
