"""Small models and adapters on disk, for tests of what reads and writes checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from peft_any import Adapter, PeftModel, write_safetensors
from peft_any.io.safetensors import StreamWriter
from peft_any.method import Tuner

BF16 = np.dtype(ml_dtypes.bfloat16)
Weights = dict[str, np.ndarray]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "vocab_size": 11,
}


def llama(dtype: Any = BF16, *, layers: int = 2, width: int = 8, head: bool = True) -> Weights:
    """Draw a language model's tensors."""
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    weights = {"model.embed_tokens.weight": draw(11, width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = draw(width)
        weights[at + "self_attn.q_proj.weight"] = draw(width, width)
        weights[at + "self_attn.q_proj.bias"] = draw(width)
        weights[at + "self_attn.v_proj.weight"] = draw(4, width)
        weights[at + "mlp.up_proj.weight"] = draw(12, width)
    weights["model.norm.weight"] = draw(width)
    if head:
        weights["lm_head.weight"] = draw(11, width)
    return weights


def single(root: Path, weights: Weights, **config: Any) -> Path:
    """Write a model directory with one file."""
    root.mkdir(parents=True, exist_ok=True)
    write_safetensors(root / "model.safetensors", weights, {"format": "pt"})
    side_files(root, **config)
    return root


def sharded(root: Path, weights: Weights, shards: int = 2, **config: Any) -> Path:
    """Write a model directory with shards and their index."""
    root.mkdir(parents=True, exist_ok=True)
    names = [*weights]
    step = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        part = names[i * step : (i + 1) * step]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        specs = [(n, weights[n].dtype.name, weights[n].shape) for n in part]
        with StreamWriter(root / file, specs, {"format": "pt"}) as out:
            for name in part:
                out.write(name, weights[name])
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": weight_map,
    }
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    side_files(root, **config)
    return root


def side_files(root: Path, **config: Any) -> None:
    """Write what stands beside a model's weights."""
    (root / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=2))
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    (root / "generation_config.json").write_text("{}")


def adapter(
    root: Path,
    weights: Weights,
    config: Tuner,
    *,
    scale: float = 0.1,
    seed: int = 3,
    **changes: Any,
) -> Path:
    """Write an adapter of random values."""
    made = random_adapter(weights, config, scale=scale, seed=seed)
    made.replace(**changes).save(root)
    return root


def random_adapter(
    weights: Weights, config: Tuner, *, scale: float = 0.1, seed: int = 3
) -> Adapter:
    """Start an adapter and move all its parameters by random amounts."""
    rng = np.random.default_rng(seed)
    fresh = PeftModel(weights).add("default", config, seed=seed)
    sites = {
        site: {
            k: (a + scale * rng.standard_normal(a.shape)).astype("float32") for k, a in p.items()
        }
        for site, p in fresh.sites.items()
    }
    return fresh.replace(sites=sites)
