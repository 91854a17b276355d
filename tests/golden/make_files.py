"""Write small adapters of every shape that Hugging Face PEFT's files come in.

Run in an environment with peft and transformers::

    python -m tests.golden.make_files            # write tests/golden/files/<name>/
    python -m tests.golden.make_files --check    # compare what it writes now with these
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from tests.golden.compare import TOLERANCE, close
from tests.hf.reference import complete

FILES = Path(__file__).parent / "files"
TEXT, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DECOMPOSED = {"adamss": 1e-4, "psoft": 1e-4, "tinylora": 1e-4, "frod": float("inf")}
"""How far singular vectors in single precision may be off elsewhere; rounding chooses FRoD's."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6)
        self.k = nn.Linear(8, 6, bias=False)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 8)
        self.c1d = Conv1D(10, 8)


class Net(nn.Module):
    """A layer of every kind; no layer is ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.emb = nn.Embedding(9, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.conv3 = nn.Conv3d(2, 4, 3)
        self.score = nn.Linear(8, 3)
        self.lm_head = nn.Linear(8, 16, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Deep(nn.Module):
    """More than twenty modules to name: Hugging Face PEFT shortens such lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(11)])


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def make_gpt(kind: type = GPT2LMHeadModel) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return kind(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def make_classifier() -> nn.Module:
    return make_gpt(GPT2ForSequenceClassification)


def make_half() -> nn.Module:
    return make_net().to(torch.bfloat16)


def make_deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep()


def make_gated() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, use_cache=False))


Made = tuple[Callable[[], nn.Module], Callable[[], Any]]
LANGUAGE = {"task_type": "CAUSAL_LM"}
PAIR = ["q", "fc1"]
SCALES = {r"layers.0.attn.q": 4, "conv2": 3}
MADE: dict[str, Made] = {
    "lora": (make_net, lambda: LoraConfig(r=2, lora_alpha=5, target_modules=["q", "fc1", "fc2"])),
    "lora-kinds": (
        make_net,
        lambda: LoraConfig(
            r=2,
            target_modules=["q", "emb", "conv1", "conv2", "conv3", "c1d"],
            rank_pattern=SCALES,
            alpha_pattern={"emb": 3},
        ),
    ),
    "dora": (
        make_net,
        lambda: LoraConfig(r=2, target_modules=["q", "emb", "conv2", "c1d"], use_dora=True),
    ),
    "lora-attention": (make_net, lambda: LoraConfig(r=2, target_modules=["mha"])),
    "lora-attention-bias": (make_net, lambda: LoraConfig(r=1, target_modules=["mha"], bias="all")),
    "lora-all-linear": (make_net, lambda: LoraConfig(r=1, target_modules="all-linear")),
    "lora-regex": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=r".*\.(q|fc1)", exclude_modules=["layers.0.attn.q"]),
    ),
    "lora-bias-all": (make_net, lambda: LoraConfig(r=1, target_modules=["q"], bias="all")),
    "lora-bias-own": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=["q", "k", "c1d"], bias="lora_only"),
    ),
    "lora-of-bias": (make_net, lambda: LoraConfig(r=1, target_modules=["q"], lora_bias=True)),
    "lora-saved": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=["q"], modules_to_save=["score", "norm"]),
    ),
    "lora-tokens": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=["q"], trainable_token_indices=[3, 1]),
    ),
    "lora-tokens-named": (
        make_net,
        lambda: LoraConfig(
            r=1,
            target_modules=["q"],
            trainable_token_indices={"embed_tokens": [0, 2], "emb": [5]},
        ),
    ),
    "lora-embeddings": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=["embed_tokens", "lm_head"]),
    ),
    "lora-layers": (
        make_net,
        lambda: LoraConfig(
            r=1, target_modules=["q"], layers_to_transform=[1], layers_pattern="layers"
        ),
    ),
    "lora-many": (
        make_deep,
        lambda: LoraConfig(
            r=1,
            target_modules=[f"layers.{i}.{name}" for i in range(11) for name in ("fc1", "fc2")],
        ),
    ),
    "lora-half": (make_half, lambda: LoraConfig(r=2, target_modules=["q"], use_rslora=True)),
    "lora-monteclora": (
        make_net,
        lambda: LoraConfig(r=2, monteclora_config=peft.MontecloraConfig(), target_modules=["q"]),
    ),
    "lora-velora": (
        make_net,
        lambda: LoraConfig(
            r=2, velora_config=peft.VeloraConfig(num_groups=2), target_modules=["q"]
        ),
    ),
    "lora-gpt": (
        make_gpt,
        lambda: LoraConfig(
            r=1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **LANGUAGE
        ),
    ),
    "lora-classifier": (
        make_classifier,
        lambda: LoraConfig(r=1, target_modules=["c_fc"], task_type="SEQ_CLS"),
    ),
    "adamss": (
        make_net,
        lambda: peft.AdamssConfig(r=4, num_subspaces=2, subspace_rank=2, target_modules=PAIR),
    ),
    "beft": (make_net, lambda: peft.BeftConfig(target_modules=["q", "fc1"])),
    "c3a": (make_net, lambda: peft.C3AConfig(block_size=2, target_modules=PAIR)),
    "deft": (make_net, lambda: peft.DeftConfig(r=2, target_modules=PAIR)),
    "delora": (make_net, lambda: peft.DeloraConfig(r=2, target_modules=PAIR)),
    "fourierft": (make_net, lambda: peft.FourierFTConfig(n_frequency=9, target_modules=PAIR)),
    "frod": (make_net, lambda: peft.FrodConfig(target_modules=PAIR)),
    "glora": (make_net, lambda: peft.GloraConfig(r=2, target_modules=["q", "k"])),
    "gralora": (make_net, lambda: peft.GraloraConfig(r=2, hybrid_r=1, target_modules=PAIR)),
    "hira": (make_net, lambda: peft.HiraConfig(r=2, target_modules=["q", "emb", "conv2", "c1d"])),
    "hra": (make_net, lambda: peft.HRAConfig(r=2, target_modules=["q", "conv2"])),
    "miss": (make_net, lambda: peft.MissConfig(r=2, target_modules=PAIR)),
    "lily": (
        make_net,
        lambda: peft.LilyConfig(r=2, stride_A=2, num_B=3, target_modules=PAIR),
    ),
    "miss-bat": (make_net, lambda: peft.MissConfig(r=2, init_weights="bat", target_modules=PAIR)),
    "ln-tuning": (make_net, lambda: peft.LNTuningConfig(target_modules=["norm"])),
    "trainable-tokens": (make_net, lambda: peft.TrainableTokensConfig(token_indices=[1, 5])),
    "osf": (make_net, lambda: peft.OSFConfig(effective_rank=3, target_modules=PAIR)),
    "peanut": (make_net, lambda: peft.PeanutConfig(r=2, depth=1, target_modules=PAIR)),
    "poly": (make_net, lambda: peft.PolyConfig(r=2, n_tasks=2, n_skills=3, target_modules=PAIR)),
    "psoft": (make_net, lambda: peft.PsoftConfig(r=3, psoft_alpha=2, target_modules=PAIR)),
    "pvera": (make_net, lambda: peft.PveraConfig(r=2, target_modules=PAIR)),
    "randlora": (make_net, lambda: peft.RandLoraConfig(r=2, target_modules=PAIR)),
    "road": (make_net, lambda: peft.RoadConfig(group_size=2, target_modules=PAIR)),
    "shira": (make_net, lambda: peft.ShiraConfig(r=1, random_seed=0, target_modules=PAIR)),
    "supertuning": (make_net, lambda: peft.SupertuningConfig(sparsity=0.8, target_modules=PAIR)),
    "supertuning-bare": (
        make_net,
        lambda: peft.SupertuningConfig(
            sparsity=0.8, r=1, save_precomputed_indices=False, target_modules=PAIR
        ),
    ),
    "waveft": (
        make_net,
        lambda: peft.WaveFTConfig(
            n_frequency=10, proportional_parameters=True, target_modules=["q", "fc1", "c1d"]
        ),
    ),
    "adalora": (
        make_net,
        lambda: AdaLoraConfig(init_r=4, target_r=2, target_modules=["q", "fc1"], total_step=10),
    ),
    "ia3": (
        make_net,
        lambda: IA3Config(
            target_modules=["q", "fc2", "conv2", "conv3", "c1d"],
            feedforward_modules=["fc2", "conv3"],
        ),
    ),
    "loha": (
        make_net,
        lambda: LoHaConfig(r=2, target_modules=["q", "conv2", "conv1"], use_effective_conv2d=True),
    ),
    "lokr": (
        make_net,
        lambda: LoKrConfig(r=2, target_modules=["q", "fc1", "conv2"], decompose_both=True),
    ),
    "oft": (
        make_net,
        lambda: OFTConfig(oft_block_size=4, target_modules=["q", "fc1", "emb"], bias="oft_only"),
    ),
    "boft": (
        make_net,
        lambda: BOFTConfig(
            boft_block_size=4, target_modules=["q", "fc1", "conv2"], bias="boft_only"
        ),
    ),
    "tinylora": (
        make_net,
        lambda: peft.TinyLoraConfig(u=5, weight_tying=0.5, target_modules=["q", "fc1", "emb"]),
    ),
    "unilora": (
        make_net,
        lambda: peft.UniLoraConfig(r=2, theta_d_length=20, save_indices=True, target_modules=PAIR),
    ),
    "vblora": (
        make_net,
        lambda: peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=2, target_modules=PAIR),
    ),
    "vblora-short": (
        make_net,
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=5, vector_length=2, save_only_topk_weights=True, target_modules=PAIR
        ),
    ),
    "vera": (make_net, lambda: VeraConfig(r=4, target_modules=["q", "fc1"])),
    "vera-seeded": (
        make_net,
        lambda: VeraConfig(r=4, target_modules=["q", "fc1", "c1d"], save_projection=False),
    ),
    "adaption-prompt": (
        make_gpt,
        lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **LANGUAGE),
    ),
    "cartridge": (make_gpt, lambda: peft.CartridgeConfig(num_virtual_tokens=3, **LANGUAGE)),
    "cpt": (make_gpt, lambda: peft.CPTConfig(cpt_token_ids=[3, 1], **LANGUAGE)),
    "multitask": (
        make_gpt,
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **LANGUAGE),
    ),
    "p-tuning": (
        make_gpt,
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_reparameterization_type="LSTM", **LANGUAGE
        ),
    ),
    "prefix": (make_gpt, lambda: PrefixTuningConfig(num_virtual_tokens=3, **LANGUAGE)),
    "prefix-projected": (
        make_gpt,
        lambda: PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **LANGUAGE
        ),
    ),
    "prompt": (make_gpt, lambda: PromptTuningConfig(num_virtual_tokens=3, **LANGUAGE)),
    "xlora": (
        make_gated,
        lambda: peft.XLoraConfig(hidden_size=8, xlora_depth=2, xlora_size=6, **LANGUAGE),
    ),
    "prompt-classifier": (
        make_classifier,
        lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    # `save_embedding_layers=True`, as after a resized vocabulary
    "embeddings": (make_net, lambda: LoraConfig(r=1, target_modules=["q"])),
    "embeddings-saved": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=["q"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "embeddings-tokens": (
        make_net,
        lambda: LoraConfig(r=1, target_modules=["q"], trainable_token_indices=[3, 1]),
    ),
}


def adapt(name: str) -> Any:
    """Make one adapted model, with random parameters."""
    base, config = MADE[name]
    half = {"autocast_adapter_dtype": name != "lora-half"}
    model = gated(base(), config()) if name == "xlora" else None
    model = model or peft.get_peft_model(base(), config(), **half)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) / 8
            parameter.data = values.to(parameter.dtype)
    if name == "adalora":
        names = [f"layers.{i}.{part}.lora_E" for i in (0, 1) for part in ("attn.q", "fc1")]
        kept = {n: [True, False, True, i == 0] for i, n in enumerate(names)}
        model.peft_config["default"].rank_pattern = kept
    return model


def gated(base: nn.Module, config: Any) -> Any:
    """Put a gate over two experts, and name them as if they lay where the program runs."""
    with tempfile.TemporaryDirectory() as scratch:
        for i in "01":
            expert = peft.get_peft_model(make_gated(), LoraConfig(r=1, target_modules=["q_proj"]))
            expert.save_pretrained(f"{scratch}/{i}")
        config.adapters = {i: f"{scratch}/{i}" for i in "01"}
        model = peft.get_peft_model(base, config)
    model.peft_config["default"].adapters = {i: f"experts/{i}" for i in "01"}
    return model


def whole_gate(model: Any, path: Path) -> None:
    """Write a gate as Hugging Face PEFT did up to 0.19: later ones leave out some layers."""
    state = {k: v for k, v in model.state_dict().items() if "internal_xlora_classifier" in k}
    save_file(state, path, metadata={"format": "pt"})


def write(name: str, folder: Path) -> None:
    """Save one adapter as Hugging Face PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save = True if name.startswith("embeddings") else "auto"
        model = adapt(name)
        model.save_pretrained(str(folder), save_embedding_layers=save)
    complete(folder, model)
    if name == "xlora":
        whole_gate(model, folder / TENSORS)
        for i in "01":
            shutil.rmtree(folder / i)
    (folder / "README.md").unlink()
    text = json.loads((folder / TEXT).read_text())
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(text.get(field), list):  # a set there: its order is random
            text[field].sort()
    if text["auto_mapping"]:  # this file's name, if it was not imported
        text["auto_mapping"]["parent_library"] = "__main__"
    (folder / TEXT).write_text(json.dumps(text, indent=2, sort_keys=True))


def rules(count: int = 120) -> list[list[Any]]:
    """Draw module names and target fields, with the names that Hugging Face PEFT chooses."""
    rng = random.Random(0)
    words = [
        "layers",
        "h",
        "0",
        "1",
        "2",
        "attn",
        "q",
        "k",
        "mlp",
        "experts",
        "fc",
        "xfc",
        "head",
        "score",
        "enc",
        "base",
    ]
    drawn: list[list[Any]] = []
    while len(drawn) < count:
        names = {".".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(8)}
        ends = [".".join(n.split(".")[-rng.randint(1, 3) :]) for n in sorted(names)]
        some = [sorted({*rng.choices(sorted(names) + ends, k=k)}) for k in (1, 2, 3)]
        regex = [r".*\.(q|fc)", r"layers\.\d+\..*", r"(.*\.)?fc"]
        fields: dict[str, Any] = {"target_modules": rng.choice([*some, *regex])}
        fields["exclude_modules"] = rng.choice([None, None, some[0], r".*\.k"])
        fields["modules_to_save"] = rng.choice([None, None, rng.choices(words)])
        if isinstance(fields["target_modules"], list) and rng.random() < 0.6:
            fields["layers_to_transform"] = rng.choice([0, 1, [1], [0, 2], []])
            patterns = [None, "layers", "h", ["h", "layers"], "attn"]
            fields["layers_pattern"] = rng.choice(patterns)
        config = SimpleNamespace(target_parameters=None, **fields)
        found = {n: check_target_module_exists(config, n) for n in sorted(names)}
        hit = [n for n, r in found.items() if r and not isinstance(r, _ExcludedModule)]
        if hit or rng.random() < 0.1:
            given = {k: v for k, v in fields.items() if v is not None}
            drawn.append([sorted(names), given, hit])
    return drawn


def bases() -> dict[str, nn.Module]:
    """Make the base checkpoints, by the function that does."""
    makers = {base for base, _ in MADE.values()}
    return {
        make.__name__.removeprefix("make_"): make() for make in makers - {make_half, make_gated}
    }


def alike(one: Path, two: Path, rtol: float) -> bool:
    """Whether two files hold the same, but for what products round otherwise elsewhere."""
    if one.read_bytes() == two.read_bytes():
        return True
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(
        (x.dtype, x.shape) == (b[k].dtype, b[k].shape) and close(x, b[k], rtol)
        for k, x in a.items()
    )


def same(made: Path, kept: Path) -> bool:
    """Whether an adapter that is made now is the one that is kept, but for the version's name."""
    if not all((kept / part).is_file() for part in (TEXT, TENSORS)):
        return False
    texts = [json.loads((at / TEXT).read_text()) for at in (made, kept)]
    for text in texts:
        text.pop("peft_version")
    rtol = DECOMPOSED.get(kept.name, TOLERANCE["float32"])
    return texts[0] == texts[1] and alike(made / TENSORS, kept / TENSORS, rtol)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    different = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name in MADE:
            write(name, root / name)
            if same(root / name, FILES / name):
                continue  # a file that differs by rounding stays as it is
            different.append(name)
            if not check:
                shutil.copytree(root / name, FILES / name, dirs_exist_ok=True)
        choices = [json.dumps(rule, separators=(",", ":")) for rule in rules()]
        text = "[\n" + ",\n".join(choices) + "\n]\n"
        if check:
            different += ["rules"] if (FILES / "rules.json").read_text() != text else []
        else:
            (FILES / "rules.json").write_text(text)
            for name, base in bases().items():
                shapes = {k: list(v.shape) for k, v in base.state_dict().items()}
                (FILES / f"{name}.json").write_text(json.dumps(shapes, indent=1) + "\n")
    print(f"{len(MADE)} adapters, different: {different or 'none'}")
    return check and bool(different)


if __name__ == "__main__":
    sys.exit(main())
