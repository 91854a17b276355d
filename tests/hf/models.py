"""Small random models of many architectures, for the tests with Hugging Face PEFT."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
PAIR = {**TEXT, "num_attention_heads": 2}
GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
ROUTED = {**GROUPED, "num_experts_per_tok": 2, "experts_implementation": "eager"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**PAIR, "max_position_embeddings": 12}),
    "gpt2": ("GPT2LMHeadModel",
             {"vocab_size": 40, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**PAIR, "pad_token_id": 0}),
    # experts (experts, n_in, n_out), of one square tensor and one that is not
    "gpt_oss": ("GptOssForCausalLM",
                {**ROUTED, "intermediate_size": 16, "num_local_experts": 4, "head_dim": 8}),
    "llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": False}),
    # two tensors of experts (experts, n_out, n_in) in each block
    "mixtral": ("MixtralForCausalLM", {**ROUTED, "num_local_experts": 3}),
    # holds what a Llama has apart
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "roberta": ("RobertaForSequenceClassification", PAIR),
    "t5": ("T5ForConditionalGeneration",
           {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2,
            "num_heads": 2}),
    "vit": ("ViTForImageClassification",
            {**PAIR, "image_size": 8, "patch_size": 4, "num_labels": 3}),
    # an encoder of spectra, Conv1d, and a decoder with cross attention
    "whisper": ("WhisperForConditionalGeneration",
                {"vocab_size": 40, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1,
                 "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                 "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 6,
                 "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1,
                 "eos_token_id": 2, "decoder_start_token_id": 1}),
}  # fmt: skip
"""The usual class of an architecture in transformers, and its sizes."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence what transformers and Hugging Face PEFT say about toy models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def make(name: str, kind: str | None = None, **sizes: Any) -> Any:
    """Make a model; `kind` and `sizes` stand for the usual class and sizes of its architecture."""
    if name == "diffusion":
        return Diffusion()
    usual, small = MODELS[name]
    cls = getattr(transformers, kind or usual)
    return cls(cls.config_class(**{**small, **sizes}))


def base_of(name: str, kind: str | None = None, **sizes: Any) -> Any:
    """Make a model with weights of trained size."""
    torch.manual_seed(3)
    with quietly():
        model = make(name, kind, **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def outputs(model: Any, name: str) -> torch.Tensor:
    """Run a model on something."""
    new = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (2, 7), generator=new)
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=new).to(kind)

    given: dict[str, Any] = {"input_ids": ids}
    if name == "vit":
        given = {"pixel_values": draw(2, 3, 8, 8)}
    if name == "t5":
        given["decoder_input_ids"] = ids[:, :4]
    if name == "whisper":
        given = {"input_features": draw(2, 8, 12), "decoder_input_ids": ids}
    if name == "diffusion":
        given = {"sample": draw(2, 3, 8, 8), "time": draw(2, 8)}
    with torch.no_grad(), quietly():
        made = model(**given)
    return made if name == "diffusion" else made.logits
