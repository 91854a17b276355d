"""Adapters whose layers we fuse or split, loaded and merged by Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from tests.hf.models import make, quietly  # noqa: E402

QKV, GATES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FUSED = {"qkv_proj": (QKV, (16, 8, 8)), "gate_up_proj": (GATES, (24, 24))}
BOUND = 1e-12
"""In double precision; the files are in single precision, and read exactly."""
ROUNDED = {"lora-patterns": 1e-7}
"""Layers of different scales get theirs into B, which the file rounds to single precision."""


def llama() -> Any:
    return make("llama").double()


def phi3() -> Any:
    """Make a Phi-3, which holds what a Llama has apart."""
    return make("phi3").double()


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack the rows of a Llama's projections as Phi-3 has them."""
    out = dict(state)
    for whole, (parts, _) in FUSED.items():
        for name in [n for n in state if n.endswith(f".{parts[0]}.weight")]:
            stem = name.removesuffix(f"{parts[0]}.weight")
            out[f"{stem}{whole}.weight"] = torch.cat(
                [out.pop(f"{stem}{part}.weight") for part in parts]
            )
    return out


def trained(model: Any, config: Any) -> Any:
    """Put an adapter of Hugging Face PEFT's on a model, off its initial values."""
    torch.manual_seed(1)
    with quietly():
        made = peft.get_peft_model(model, config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made.float()


def merged_state(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    with quietly():
        state = peft.PeftModel.from_pretrained(model, folder).double().merge_and_unload()
    return dict(state.state_dict())


CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=[*QKV, *GATES, "o_proj"]),
    "lora-query-value": peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "lora-patterns": peft.LoraConfig(
        r=3,
        target_modules=[*QKV, *GATES],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 5},
        alpha_pattern={"v_proj": 11},
    ),
    "rslora": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=[*QKV, *GATES]),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=[*QKV, *GATES, "o_proj"]),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=[*QKV, *GATES]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", *GATES], feedforward_modules=[]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_adapter_does_in_phi3_what_the_split_one_does_in_llama(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = llama().float().double()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    made = llama().float()
    made.load_state_dict({k: v.float() for k, v in state.items()})
    trained(made, CONFIGS[name]).save_pretrained(tmp_path / "split")
    adapter = Adapter.load(tmp_path / "split")
    for whole, (parts, sizes) in FUSED.items():
        if any(site.endswith(parts) for site in adapter.sites):
            adapter = adapter.fused(whole, parts, sizes)
    adapter.save(tmp_path / "fused")
    other = phi3()
    other.load_state_dict(fused(state))
    want = fused(merged_state(base, tmp_path / "split"))
    got = merged_state(other, tmp_path / "fused")
    assert want.keys() == got.keys()
    changed = 0
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=ROUNDED.get(name, BOUND))
        changed += not torch.equal(tensor, fused(state)[key])
    assert changed >= 2


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "loha", "oft", "boft"])
def test_a_split_adapter_does_in_llama_what_the_fused_one_does_in_phi3(
    name: str, tmp_path: Path
) -> None:
    targets = [*FUSED, "o_proj"]
    configs = {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets),
        "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=targets),
        "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=targets),
        "loha": peft.LoHaConfig(r=3, target_modules=targets),
        "oft": peft.OFTConfig(oft_block_size=4, target_modules=targets),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=targets),
    }
    torch.manual_seed(0)
    base = llama().float().double()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    whole = phi3().float()
    whole.load_state_dict({k: v.float() for k, v in fused(state).items()})
    trained(whole, configs[name]).save_pretrained(tmp_path / "fused")
    adapter = Adapter.load(tmp_path / "fused")
    for module, (parts, sizes) in FUSED.items():
        adapter = adapter.split(module, parts, sizes)
    adapter.save(tmp_path / "split")
    other = phi3()
    other.load_state_dict(fused(state))
    want = merged_state(other, tmp_path / "fused")
    got = fused(merged_state(base, tmp_path / "split"))
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=BOUND)


def test_heads_lie_in_gpt_neox_as_transformers_reads_them(tmp_path: Path) -> None:
    heads, width, hidden = 4, 4, 16
    sizes = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": heads}
    torch.manual_seed(0)
    model = make("gpt_neox", **sizes).double()
    name = "gpt_neox.layers.0.attention.query_key_value"
    targets = peft.LoraConfig(r=2, target_modules=["query_key_value"])
    trained(make("gpt_neox", **sizes), targets).save_pretrained(tmp_path / "whole")
    whole = Adapter.load(tmp_path / "whole")
    parts = whole.split("query_key_value", QKV, (hidden,) * 3, groups=heads)
    before = model.state_dict()[f"{name}.weight"].clone()
    after = merged_state(model, tmp_path / "whole")[f"{name}.weight"]
    # As GPTNeoXAttention takes them apart: (heads, 3 · width), chunked.
    changes = (after - before).view(heads, 3 * width, hidden).chunk(3, dim=1)
    for part, change in zip(QKV, changes, strict=True):
        p = parts.sites[name.replace("query_key_value", part)]
        delta = p["lora_B.weight"].astype("float64") @ p["lora_A.weight"] * whole.config.scaling
        want = change.reshape(heads * width, hidden).numpy()
        assert abs(delta - want).max() < BOUND
    parts.fused("query_key_value", QKV, groups=heads).save(tmp_path / "again")
    fresh = make("gpt_neox", **sizes).double()
    fresh.load_state_dict({**fresh.state_dict(), f"{name}.weight": before})
    again = merged_state(fresh, tmp_path / "again")[f"{name}.weight"]
    torch.testing.assert_close(again, after, rtol=0, atol=BOUND)
