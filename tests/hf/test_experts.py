"""Experts in one tensor and apart: merges between the two layouts equal Hugging Face PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from peft import IA3Config, LoraConfig, get_peft_model  # noqa: E402
from peft import PeftModel as TheirModel  # noqa: E402

import peft_any  # noqa: E402
from peft_any import (  # noqa: E402
    PeftModel,
    TargetError,
    merge_checkpoint,
    read_safetensors,
    verify_checkpoint,
    write_safetensors,
)
from tests.hf.reference import quietly  # noqa: E402
from tests.hf.test_parameters import BOTH, CASES, SIZES, same, state  # noqa: E402
from tests.hf.test_parameters import model_of as known_model  # noqa: E402

PRECISION = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
APART = {"mixtral": ["w1", "w2", "w3"], "qwen-moe": ["gate_proj", "up_proj", "down_proj"]}
models = pytest.mark.parametrize("name", APART)
precision = pytest.mark.parametrize(("dtype", "rtol"), PRECISION)


def model_of(name: str, dtype: torch.dtype) -> Any:
    if name == "mixtral":
        return known_model(name, dtype)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, intermediate_size=24, num_experts=3, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config).to(dtype).eval()


def adapted(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """Let Hugging Face PEFT adapt it, with trained-looking numbers."""
    options = {"r": 2, "lora_alpha": 5, **options}
    with quietly():
        model = get_peft_model(model_of(name, dtype), LoraConfig(**options)).eval()
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def loaded(name: str, path: Path, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Let transformers read a checkpoint, and give its tensors as they are in memory."""
    with quietly():
        return state(type(model_of(name, dtype)).from_pretrained(path, dtype=dtype))


@models
@precision
@pytest.mark.parametrize("case", ["both", "one", "rank-pattern", "weight"])
def test_an_adapter_of_stacks_is_merged_into_experts_apart(
    name: str, case: str, dtype: torch.dtype, rtol: float, tmp_path: Path
) -> None:
    theirs = adapted(name, dtype, **{"target_modules": [], **CASES[case]})
    with quietly():
        theirs.save_pretrained(tmp_path / "adapter")
        model_of(name, dtype).save_pretrained(tmp_path / "base")
    files = tmp_path / "base", tmp_path / "adapter"
    with pytest.raises(TargetError, match=f"stores experts apart.* --map {name},"):
        merge_checkpoint(*files, tmp_path / "no")
    done = merge_checkpoint(*files, tmp_path / "out", names=name)
    assert all(use.to for use in done.uses)
    with quietly():
        want = state(theirs.merge_and_unload())
    same(loaded(name, tmp_path / "out", dtype), want, rtol)
    assert not verify_checkpoint(*files, tmp_path / "out", names=name).problems


@models
@precision
def test_an_adapter_of_experts_apart_is_merged_into_stacks(
    name: str, dtype: torch.dtype, rtol: float, tmp_path: Path
) -> None:
    with quietly():
        model_of(name, dtype).save_pretrained(tmp_path / "apart")
    base = state(model_of(name, dtype))
    write_safetensors(tmp_path / "stacked.safetensors", base)
    apart = read_safetensors(tmp_path / "apart" / "model.safetensors")
    config = peft_any.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights=False, target_modules=[*APART[name], "q_proj"]
    )
    kind = str(dtype).removeprefix("torch.")
    PeftModel(apart).add("a", config, dtype=kind).save(tmp_path / "adapter")
    files = tmp_path / "stacked.safetensors", tmp_path / "adapter"
    with pytest.raises(TargetError, match=f"in one tensor: give --map {name}-stacked,"):
        merge_checkpoint(*files, tmp_path / "no.safetensors")
    out = tmp_path / "out.safetensors"
    done = merge_checkpoint(*files, out, names=f"{name}-stacked")
    assert all(use.to for use in done.uses)
    with quietly():
        theirs = TheirModel.from_pretrained(model_of(name, dtype), tmp_path / "adapter")
        want = state(theirs.merge_and_unload())
    same(read_safetensors(out), want, rtol)
    merge_checkpoint(tmp_path / "apart", tmp_path / "adapter", tmp_path / "again")
    same(loaded(name, tmp_path / "again", dtype), want, rtol)


@models
def test_experts_of_other_ranks_and_missing_ones_are_stacked(name: str, tmp_path: Path) -> None:
    """Each layout's own merge is the reference of the other."""
    dtype, rtol = PRECISION[1]
    with quietly():
        model_of(name, dtype).save_pretrained(tmp_path / "apart")
    write_safetensors(tmp_path / "stacked.safetensors", state(model_of(name, dtype)))
    apart = read_safetensors(tmp_path / "apart" / "model.safetensors")
    first, last = APART[name][0], f"experts.1.{APART[name][1]}"
    config = peft_any.LoraConfig(
        r=3,
        init_lora_weights=False,
        target_modules=[f"experts.0.{first}", f"experts.2.{first}", last],
        rank_pattern={f"experts.2.{first}": 2},
        alpha_pattern={f"experts.2.{first}": 7},
    )
    PeftModel(apart).add("a", config, dtype="float64").save(tmp_path / "adapter")
    adapter, out = tmp_path / "adapter", tmp_path / "out.safetensors"
    merge_checkpoint(tmp_path / "stacked.safetensors", adapter, out, names=f"{name}-stacked")
    merge_checkpoint(tmp_path / "apart", adapter, tmp_path / "again")
    same(read_safetensors(out), loaded(name, tmp_path / "again", dtype), rtol)


@models
@precision
def test_all_linear_is_theirs(name: str, dtype: torch.dtype, rtol: float, tmp_path: Path) -> None:
    theirs = adapted(name, dtype, target_modules="all-linear")
    theirs.save_pretrained(tmp_path / "adapter")
    base = state(model_of(name, dtype))
    config = peft_any.LoraConfig(
        r=2, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
    )
    model, kind = PeftModel(base), str(dtype).removeprefix("torch.")
    ours = model.add("a", config, dtype=kind)
    ours.save(tmp_path / "ours")
    names = [tmp_path / n / "adapter_model.safetensors" for n in ("ours", "adapter")]
    mine, other = ({k: v.shape for k, v in read_safetensors(p).items()} for p in names)
    assert mine == other
    with quietly():
        again = TheirModel.from_pretrained(model_of(name, dtype), tmp_path / "ours")
        want = state(again.merge_and_unload())
        theirs = state(theirs.merge_and_unload())
    same({k: np.asarray(v) for k, v in model.merge().items()}, want, rtol)
    same(peft_any.merge(base, peft_any.Adapter.load(tmp_path / "adapter")), theirs, rtol)


def test_gpt_oss_keeps_its_experts_out_of_all_linear(tmp_path: Path) -> None:
    with quietly():
        theirs = get_peft_model(
            known_model("gpt_oss"), LoraConfig(r=2, target_modules="all-linear")
        )
    theirs.save_pretrained(tmp_path / "adapter")
    config = peft_any.LoraConfig(r=2, target_modules="all-linear")
    PeftModel(state(known_model("gpt_oss"))).add("a", config).save(tmp_path / "ours")
    names = [tmp_path / n / "adapter_model.safetensors" for n in ("ours", "adapter")]
    mine, other = ({k: v.shape for k, v in read_safetensors(p).items()} for p in names)
    assert mine == other
    assert BOTH[0] not in str(other)


def test_other_methods_leave_experts_and_routers_out_of_all_linear() -> None:
    config: dict[str, Any] = {"target_modules": "all-linear", "feedforward_modules": []}
    with quietly():
        theirs = get_peft_model(model_of("qwen-moe", torch.float32), IA3Config(**config))
    ours = PeftModel(state(model_of("qwen-moe", torch.float32)))
    made = ours.add("a", peft_any.IA3Config(**config))
    adapted = {k.partition(".ia3_l")[0] for k in state(theirs) if ".ia3_l" in k}
    assert {f"base_model.model.{name}" for name in made.sites} == adapted
