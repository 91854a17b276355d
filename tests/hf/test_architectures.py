"""Experts, speech and diffusion: models of other shapes, both ways, against Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.integrations.torch import attach, merge_into  # noqa: E402
from peft_any.model import PeftModel  # noqa: E402
from peft_any.registry import method_for  # noqa: E402
from tests.hf.reference import quietly  # noqa: E402
from tests.hf.test_models import compare, fill, merged, saved_once  # noqa: E402


def mixtral() -> Any:
    """Make a mixture whose experts are two fused tensors in each block."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            experts_implementation="eager",
        )
    )


def whisper() -> Any:
    """Make an encoder of spectra (Conv1d) and a decoder with cross attention."""
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=40,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=6,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


class Block(nn.Module):
    """What U-Nets of diffusion models repeat: a residual block told the time, then attention."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, wide), nn.Conv2d(wide, out, 3, padding=1)
        self.time = nn.Linear(8, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(wide, out, 1)
        self.norm3 = nn.GroupNorm(4, out)
        self.to_q, self.to_k, self.to_v = (nn.Linear(out, out, bias=False) for _ in range(3))
        self.to_out = nn.Linear(out, out)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x))) + self.time(time)[..., None, None]
        x = self.shortcut(x) + self.conv2(nn.functional.silu(self.norm2(y)))
        h = self.norm3(x).flatten(2).transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(a).transpose(1, 2).reshape(x.shape)


class Diffusion(nn.Module):
    """Two such blocks, the second of half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([Block(8, 8), Block(8, 16)])
        self.downsample = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = self.down[0](self.conv_in(sample), time)
        return self.conv_out(self.down[1](self.downsample(x), time))


MODELS: dict[str, Any] = {"mixtral": mixtral, "whisper": whisper, "diffusion": Diffusion}
LINEAR = {
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "whisper": ["q_proj", "encoder_attn.v_proj", "fc2"],
    "diffusion": ["to_q", "to_v", "to_out"],
}
CONVOLVED = {
    "whisper": ["conv1", "conv2", "k_proj"],
    "diffusion": ["conv1", "conv2", "shortcut", "downsample", "to_k"],
}
EVERY: list[tuple[str, dict[str, Any]]] = [
    ("LORA", {"r": 3, "lora_alpha": 5}),
    ("LORA", {"r": 3, "use_dora": True, "use_rslora": True}),
    ("ADALORA", {"init_r": 3, "total_step": 9}),
    ("BOFT", {"boft_block_size": 4}),
    ("C3A", {"block_size": 4}),
    ("DELORA", {"r": 3}),
    ("FOURIERFT", {"n_frequency": 9}),
    ("GRALORA", {"r": 4, "gralora_k": 2}),
    ("HIRA", {"r": 3}),
    ("HRA", {"r": 4}),
    ("IA3", {"feedforward_modules": []}),
    ("LOHA", {"r": 3}),
    ("LOKR", {"r": 2, "decompose_both": True}),
    ("MISS", {"r": 2}),
    ("OFT", {"oft_block_size": 4}),
    ("RANDLORA", {"r": 2, "randlora_alpha": 8}),
    ("ROAD", {"variant": "road_2", "group_size": 4}),
    ("VERA", {"r": 4}),
]
ON_CONVOLUTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LORA", {"r": 3}),
    ("LORA", {"r": 3, "use_dora": True}),
    ("HIRA", {"r": 3}),
    ("IA3", {"feedforward_modules": []}),
    ("LOHA", {"r": 3, "use_effective_conv2d": True}),
    ("LOKR", {"r": 3}),
    ("OFT", {"oft_block_size": 4}),
]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = ["mlp.gate.weight"]
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    *((model, method, {"target_modules": LINEAR[model], **f})
      for model in MODELS for method, f in EVERY),
    *((model, method, {"target_modules": CONVOLVED[model], **f})
      for model in CONVOLVED for method, f in ON_CONVOLUTIONS
      if model == "diffusion" or method not in ("IA3", "OFT")),  # neither has them for Conv1d
    ("mixtral", "LORA", {"r": 2, "target_modules": ["k_proj"], "target_parameters": EXPERTS}),
    ("mixtral", "LORA", {"r": 2, "target_modules": [], "target_parameters": ROUTER + EXPERTS}),
    ("mixtral", "LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}),
    ("whisper", "LORA", {"r": 2, "target_modules": "all-linear"}),
    ("whisper", "LORA", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["layer_norm"]}),
    ("whisper", "LN_TUNING", {"target_modules": ["layer_norm", "final_layer_norm"]}),
    ("diffusion", "LORA", {"r": 2, "target_modules": ["conv_in", "time"], "bias": "all"}),
    ("diffusion", "LORA", {"r": 2, "target_modules": ["to_q"], "modules_to_save": ["norm2"]}),
    ("diffusion", "LORA", {"r": 2, "target_modules": ["conv1", "to_out"], "lora_bias": True}),
    ("diffusion", "BOFT", {"boft_block_size": 3, "target_modules": ["conv_in"]}),
]  # fmt: skip


def base_of(name: str) -> Any:
    """Make a model with weights of trained size."""
    torch.manual_seed(3)
    with quietly():
        model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def outputs(model: Any, name: str) -> torch.Tensor:
    """Run a model on something."""
    new = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (2, 5), generator=new)
    given: dict[str, Any] = {"input_ids": ids}
    if name == "whisper":
        spectra = torch.randn((2, 8, 12), generator=new)
        given = {"input_features": spectra, "decoder_input_ids": ids}
    if name == "diffusion":
        sample = torch.randn((2, 3, 8, 8), generator=new)
        given = {"sample": sample, "time": torch.randn((2, 8), generator=new)}
    with torch.no_grad(), quietly():
        made = model(**given)
    return made if name == "diffusion" else made.logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def label(row: tuple[str, str, dict[str, Any]]) -> str:
    model, method, fields = row
    said = ["+".join([v] if isinstance(v, str) else v) for k, v in fields.items() if "target" in k]
    return "-".join([model, method.lower(), *filter(None, said), *(k for k in fields if "_d" in k)])


rows = pytest.mark.parametrize("row", ROWS, ids=label)


@rows
def test_what_hf_writes_we_merge_and_apply(
    row: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    name, method, fields = row
    plain = base_of(name)
    weights, before = saved_once(plain), outputs(plain, name)
    with quietly():
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**fields)
        theirs = peft.get_peft_model(plain, config).eval()
    fill(theirs, "default", 1)
    with quietly():
        theirs.save_pretrained(tmp_path / "a")
    ours = PeftModel(weights)
    ours.add("a", Adapter.load(tmp_path / "a"))
    convolved = fields["target_modules"] == CONVOLVED.get(name)
    uncalled = convolved and (name == "whisper" or method == "OFT")
    called = None if uncalled else outputs(theirs, name)
    compare(ours.merge(), merged(theirs, weights))
    attached = base_of(name)
    attach(attached, Adapter.load(tmp_path / "a"))
    if called is None:  # Whisper asks for a stride that PEFT's layers lack; OFT's call is another
        called = outputs(theirs.base_model.model, name)
    close(outputs(attached, name), called)
    close(outputs(merge_into(attached), name), called)
    assert (called - before).abs().max() > 1e-3 * before.abs().max()


@rows
def test_what_we_write_hf_merges(row: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    name, method, fields = row
    plain = base_of(name)
    ours = PeftModel(saved_once(plain))
    own: Any = method_for(method)
    adapter = ours.add("a", own(**fields), seed=4)
    rng = np.random.default_rng(4)

    def trained(p: dict[str, Any]) -> dict[str, Any]:
        return {
            k: (v + 0.2 * rng.standard_normal(v.shape)).astype(v.dtype)
            if v.dtype.kind == "f" and k not in adapter.config.frozen
            else v
            for k, v in p.items()
        }

    adapter = adapter.replace(sites={s: trained(p) for s, p in adapter.sites.items()})
    fresh = PeftModel(saved_once(plain))
    fresh.add("a", adapter)
    adapter.save(tmp_path / "a")
    with quietly():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
    weights = saved_once(base_of(name))
    want = merged(theirs, weights)
    compare(fresh.merge(), want)
    assert any((want[k] != v).any() for k, v in weights.items())
