"""LoRA on parameters: stacks of experts in models of transformers, against Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft import PeftModel as TheirModel
from safetensors.numpy import load_file

import peft_any
from peft_any import Adapter, PeftModel, merge_checkpoint, verify_checkpoint, write_safetensors
from peft_any.errors import TargetError
from peft_any.integrations.torch import attach, merge_into
from tests.hf.models import make, quietly

transformers = pytest.importorskip("transformers")

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "one": {"target_parameters": BOTH[1:]},
    "rslora": {"target_parameters": BOTH, "use_rslora": True, "r": 3},
    "with-modules": {"target_parameters": BOTH[:1], "target_modules": ["q_proj", "o_proj"]},
    "rank-pattern": {"target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 1}},
    "weight": {"target_parameters": ["q_proj.weight", BOTH[0]]},
    # of a parameter the patterns name the tensor, not its module
    "weight-pattern": {
        "target_parameters": ["q_proj.weight", "v_proj.weight", BOTH[0]],
        "rank_pattern": {"q_proj.weight": 3, "v_proj": 5, "weight": 1},
        "alpha_pattern": {r"0\.self_attn\.q_proj": 11, r"1\.self_attn\.v_proj\.weight": 7},
    },
}
cases = pytest.mark.parametrize("case", CASES)
models = pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
precision = pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Make a model with experts (experts, n_out, n_in), or for GPT-OSS transposed and square."""
    torch.manual_seed(0)
    return make(name).to(dtype).eval()


def adapted(name: str, case: str, dtype: torch.dtype = torch.float64) -> Any:
    """Let Hugging Face PEFT adapt it, with trained-looking numbers."""
    options = {"r": 2, "lora_alpha": 5, "target_modules": [], **CASES[case]}
    with quietly():
        model = get_peft_model(model_of(name, dtype), LoraConfig(**options)).eval()
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def state(model: Any) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


def same(got: Any, want: Any, rtol: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        size = float(np.abs(value).max())
        np.testing.assert_allclose(got[key], value, rtol=0, atol=rtol * size, err_msg=key)


@models
@cases
@precision
def test_merged_weights_are_theirs(
    name: str, case: str, dtype: torch.dtype, rtol: float, tmp_path: Path
) -> None:
    theirs = adapted(name, case, dtype)
    theirs.save_pretrained(tmp_path / "adapter")
    base = state(model_of(name, dtype))
    adapter = Adapter.load(tmp_path / "adapter")
    merged = peft_any.merge(base, adapter)
    with quietly():
        want = state(theirs.merge_and_unload())
    same(merged, want, rtol)
    experts = [k for k in want if k.endswith("proj") and not np.array_equal(want[k], base[k])]
    assert experts
    model = PeftModel(base)
    model.add("a", adapter)
    model["a"].save(tmp_path / "again")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    same(two, one, 0.0)


@models
@cases
def test_checkpoints_are_merged_expert_by_expert(name: str, case: str, tmp_path: Path) -> None:
    theirs = adapted(name, case)
    theirs.save_pretrained(tmp_path / "adapter")
    base = state(model_of(name))
    path = tmp_path / "base.safetensors"
    write_safetensors(path, base)
    receipt = merge_checkpoint(path, tmp_path / "adapter", tmp_path / "out.safetensors")
    with quietly():
        want = state(theirs.merge_and_unload())
    same(load_file(tmp_path / "out.safetensors"), want)
    for change in receipt.changes:
        assert change.kept == pytest.approx(1, rel=1e-9)
        delta = want[change.tensor] - base[change.tensor]
        assert change.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-9)
    assert all(use.to for use in receipt.uses)
    audit = verify_checkpoint(path, tmp_path / "adapter", tmp_path / "out.safetensors")
    assert not audit.problems


@models
@cases
@precision
def test_modules_with_our_adapter_give_their_logits(
    name: str, case: str, dtype: torch.dtype, rtol: float, tmp_path: Path
) -> None:
    theirs = adapted(name, case, dtype)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokens = model_of(name, dtype), torch.arange(12).reshape(2, 6)
    attach(ours, Adapter.load(tmp_path / "adapter", backend="torch"))
    with torch.no_grad():
        want = theirs(tokens).logits
        near = {"rtol": 0, "atol": rtol * float(want.abs().max())}
        torch.testing.assert_close(ours(tokens).logits, want, **near)
        torch.testing.assert_close(merge_into(ours)(tokens).logits, want, **near)


@models
@cases
def test_what_we_write_they_read(name: str, case: str, tmp_path: Path) -> None:
    base = state(model_of(name))
    backwards = dict(sorted(base.items()))  # as checkpoints have them: down_proj comes first
    options = {"r": 2, "lora_alpha": 5, "target_modules": [], **CASES[case]}
    model = PeftModel(backwards)
    made = model.add("a", peft_any.LoraConfig(**options, init_lora_weights=False), dtype="float64")
    made.save(tmp_path / "ours")
    with quietly():
        theirs = TheirModel.from_pretrained(model_of(name), tmp_path / "ours")
        want = state(theirs.merge_and_unload())
    same({k: np.asarray(v) for k, v in model.merge().items()}, dict(sorted(want.items())))


def test_parameters_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"m.experts.{w}": rng.standard_normal((2, 4, 4)) for w in ("w1", "w2")}
    config = peft_any.LoraConfig(r=2, target_parameters=["experts.w1", "experts.w2"])
    model = PeftModel(base)
    model.add("a", config).save(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    with pytest.raises(TargetError, match=r"fit several parameters alike \(w1, w2 or w2, w1\)"):
        PeftModel(base).add("a", adapter)
    names = {"m.experts.base_layer": "m.experts.w1", "m.experts": "m.experts.w2"}
    PeftModel(base).add("a", adapter.renamed(lambda name: names[name]))


def test_renamed_matrices_keep_their_numbers() -> None:
    base = {f"{i}.{n}.weight": np.ones((5, 4)) for i in (0, 1) for n in "qk"}
    given: dict[str, Any] = {"target_parameters": ["q.weight"], "rank_pattern": {"q.weight": 3}}
    pattern = {"0.q.weight": 9, "1.q": 5}
    config = peft_any.LoraConfig(r=2, lora_alpha=4, alpha_pattern=pattern, **given)
    model, other = PeftModel(base), PeftModel({f"m.{k}": v for k, v in base.items()})
    fresh = model.add("fresh", config)
    sites = {n: {k: v + 0.5 for k, v in p.items()} for n, p in fresh.sites.items()}
    model.add("a", fresh.replace(sites=sites))
    other.add("a", model["a"].renamed(lambda name: f"m.{name}"))
    model.activate("a")
    same(other.merge(), {f"m.{k}": v for k, v in model.merge().items()})


def test_a_parameter_that_is_not_there_is_named() -> None:
    base = {"m.experts.up": np.zeros((2, 4, 3)), "fc.weight": np.zeros((3, 3))}
    with pytest.raises(TargetError, match=r"'experts\.pu' matches no stack of matrices"):
        PeftModel(base).add("a", peft_any.LoraConfig(target_parameters=["experts.pu"]))
