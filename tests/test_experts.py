"""LoRA on stacks of experts, against what Hugging Face PEFT recorded; experts stored apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from peft_any import (
    Adapter,
    ConfigError,
    LoraConfig,
    PeftModel,
    ShapeError,
    TargetError,
    cli,
    inspect_adapter,
    merge_checkpoint,
    read_safetensors,
)
from peft_any.naming.rules import read_rules
from tests.models import single

HERE = Path(__file__).parent / "golden" / "experts"
NAMES = sorted(path.stem for path in HERE.glob("*.safetensors"))
MIXTRAL = [name for name in NAMES if "mixtral" in name]
Tensors = dict[str, np.ndarray]


def recorded(name: str, folder: Path) -> dict[str, Tensors]:
    """Write a recorded adapter, and give its base, in both layouts, and the merged weights."""
    path = HERE / f"{name}.safetensors"
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        texts = file.metadata()
    folder.mkdir()
    data = tensors.pop("adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(data.tobytes())
    (folder / "adapter_config.json").write_text(texts["adapter_config.json"], encoding="utf-8")
    parts: dict[str, Tensors] = {"base": {}, "merged": {}, "apart": {}}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    return parts


def same(got: Any, want: Tensors) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        rtol = 1e-10 if value.dtype == np.float64 else 1e-5
        size = float(np.abs(value).max())
        np.testing.assert_allclose(got[key], value, rtol=0, atol=rtol * size, err_msg=key)


def apart(tensors: Tensors) -> Tensors:
    """Store a Mixtral's experts as transformers 4 did."""
    out: Tensors = {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".")
        at = stem.replace("mlp", "block_sparse_moe")
        for i, one in enumerate(value if last.endswith("proj") else ()):
            half = len(one) // 2
            parts = {"w2": one} if last == "down_proj" else {"w1": one[:half], "w3": one[half:]}
            out |= {f"{at}.{i}.{k}.weight": v for k, v in parts.items()}
        if not last.endswith("proj"):
            out[name.replace(".mlp.", ".block_sparse_moe.")] = value
    return out


@pytest.mark.parametrize("name", NAMES)
def test_merged_experts_are_those_that_were_recorded(name: str, tmp_path: Path) -> None:
    parts = recorded(name, tmp_path / "adapter")
    model = PeftModel(parts["base"])
    model.add("a", Adapter.load(tmp_path / "adapter"))
    same(model.merge(), parts["merged"])


@pytest.mark.parametrize("name", NAMES)
def test_the_command_merges_a_checkpoint_of_stacks(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = recorded(name, tmp_path / "adapter")
    base = single(tmp_path / "base", parts["base"])
    command = ["merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "o"]
    assert cli.run([*map(str, command), "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    changed = [k for k, v in parts["merged"].items() if not np.array_equal(v, parts["base"][k])]
    assert sorted(change["tensor"] for change in receipt["changes"]) == sorted(changed)
    same(read_safetensors(tmp_path / "o" / "model.safetensors"), parts["merged"])


@pytest.mark.parametrize("name", MIXTRAL)
def test_the_command_merges_a_checkpoint_of_experts_apart(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = recorded(name, tmp_path / "adapter")
    same(apart(parts["base"]), parts["apart"])
    base = single(tmp_path / "base", parts["apart"])
    command = ["merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "o"]
    assert cli.run([*map(str, command)]) == TargetError.exit_code
    assert "give --map mixtral, or rules like" in capsys.readouterr().err
    assert cli.run([*map(str, command), "--map", "mixtral"]) == 0
    same(read_safetensors(tmp_path / "o" / "model.safetensors"), apart(parts["merged"]))


STACKED = {"m.experts.gate_up_proj": (3, 8, 5), "m.experts.down_proj": (3, 5, 4)}
PARTS = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}


def stacked_base() -> Tensors:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(shape) for k, shape in STACKED.items()}


def apart_base() -> Tensors:
    rng = np.random.default_rng(1)
    names = [f"m.experts.{i}.{part}.weight" for i in range(3) for part in PARTS]
    return {n: rng.standard_normal(PARTS[n.split(".")[3]]) for n in names}


def saved(base: Tensors, folder: Path, **options: Any) -> Path:
    config = LoraConfig(r=2, init_lora_weights=False, **options)
    PeftModel(base).add("a", config, dtype="float64").save(folder)
    return folder


def refused(error: type[Exception], words: str, base: Path, adapter: Path, names: Any) -> None:
    with pytest.raises(error, match=words):
        merge_checkpoint(base, adapter, base.parent / "no", names=names)


def test_what_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    adapter = saved(stacked_base(), tmp_path / "a", target_parameters=["experts.down_proj"])
    weights = apart_base()
    base = single(tmp_path / "base", weights)
    words = r"m.experts.down_proj: the base has no layer m.experts.0.w2 .nearest"
    named = Adapter.load(adapter).renamed(lambda _: "m.experts.down_proj")
    named.check(stacked_base())
    with pytest.raises(TargetError, match=words):
        merge_checkpoint(base, named, tmp_path / "no", names="experts.down_proj=experts.{}.w2")
    refused(TargetError, "matches no module", base, adapter, "experts.up=experts.{}.up_proj")
    some = {k: v for k, v in weights.items() if "1.down_proj" not in k}
    hole = single(tmp_path / "hole", some)
    refused(TargetError, r"m.experts.1.down_proj: the base has no such", hole, adapter, "qwen-moe")
    odd = single(tmp_path / "odd", {**weights, "m.experts.1.down_proj.weight": np.ones((5, 6))})
    refused(ShapeError, "cannot be one tensor", odd, adapter, "qwen-moe")
    with pytest.raises(TargetError, match="matches no module"):
        inspect_adapter(adapter, names="qwen-moe")


def test_what_cannot_be_stacked_is_refused(tmp_path: Path) -> None:
    rules = "qwen-moe-stacked"
    base = single(tmp_path / "base", stacked_base())
    dora = saved(apart_base(), tmp_path / "d", target_modules=["down_proj"], use_dora=True)
    refused(ConfigError, "lora_magnitude_vector cannot be stacked", base, dora, rules)
    plain = saved(apart_base(), tmp_path / "p", target_modules=["down_proj"])
    fewer = {k: v[:2] for k, v in stacked_base().items()}
    few = single(tmp_path / "few", fewer)
    refused(TargetError, "has 2 experts, and the adapter one of 3", few, plain, rules)
    none = single(tmp_path / "none", {"m.experts.up": np.ones((3, 4, 5))})
    refused(TargetError, "m.experts.down_proj: the base has no such stack", none, plain, rules)
    half = saved(apart_base(), tmp_path / "h", target_modules=["up_proj"])
    with pytest.raises(ShapeError, match=r"tells how many outputs experts.\{\}.gate_proj has"):
        inspect_adapter(half, names=rules)
    names = "experts.{}.gate_proj:4+experts.{}.up_proj=experts.gate_up_proj"
    assert inspect_adapter(half, names=names).to_json().count("m.experts.gate_up_proj")


def test_the_rules_are_read() -> None:
    one, two = read_rules(["e.x=e.{}.a+e.{}.b", "e.{}.c=e.y"])
    assert one.stacks  # type: ignore[union-attr]
    assert two.stacks  # type: ignore[union-attr]
    assert (one.fuses, two.fuses) == (False, True)  # type: ignore[union-attr]
