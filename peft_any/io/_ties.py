"""Which stored tensors a model uses under several names: embeddings tied to the output head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared"}
# What the input embedding is called in models of other types.
_OTHERS = {
    "ctrl": "w",
    "openai-gpt": "tokens_embed",
    "xlnet": "word_embedding",
    **dict.fromkeys(("falcon_mamba", "flaubert", "mamba", "mamba2", "rwkv", "xlm"), "embeddings"),
}
# The module transformers ties to the input embedding, by model_type; the rest say lm_head.
_HEADS = {
    model: head
    for head, models in {
        "cls.predictions.decoder": "bert big_bird deberta deberta-v2 ernie fnet layoutlm lxmert "
        "megatron-bert mobilebert mra nomic_bert nystromformer roc_bert roformer squeezebert tapas "
        "visual_bert yoso",
        "decoder": "modernbert modernbert-decoder",
        "embed_out": "gpt_neox gpt_neox_japanese",
        "generator_lm_head": "convbert electra",
        "head": "rwkv",
        "lm_head.decoder": "bert-generation camembert data2vec-text esm gte ibert longformer mpnet "
        "roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
        "lm_loss": "xlnet",
        "output": "git",
        "output_projection": "biogpt trocr",
        "pred_layer.proj": "flaubert xlm",
        "predictions.decoder": "albert",
        "proj_out": "moonshine moonshine_streaming whisper",
        "vocab_projector": "distilbert",
    }.items()
    for model in models.split()
}
_WITH_HEAD = ("LM", "LMHeadModel", "ForConditionalGeneration", "ForPreTraining")
# The embedding that goes with a stack of layers, where only the head is stored.
_STACKS = {"layers": "embed_tokens", "h": "wte"}
_CHUNK = 1 << 20


def tied_groups(
    tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Names that transformers makes one tensor on loading.

    Parameters
    ----------
    tensors : mapping of str to numpy.ndarray
        What is stored; values are read only where several names of a group are stored.
    config : mapping
        ``config.json``; transformers ties unless ``tie_word_embeddings`` is false. Without a
        config nothing is known to be tied.

    Returns
    -------
    tuple of tuple of str
        Each group begins with a stored name; of several stored ones those with equal bytes
        belong to it.

    Examples
    --------
    >>> tied_groups({"model.embed_tokens.weight": None}, {"architectures": ["LlamaForCausalLM"]})
    (('model.embed_tokens.weight', 'lm_head.weight'),)
    """
    if not config:
        return ()
    kind = str(config.get("model_type"))
    head = f"{_HEADS.get(kind, 'lm_head')}.weight"
    leaves = {_OTHERS[kind]} if kind in _OTHERS else _EMBEDDINGS
    tied = _has_head(config) and _tie_flag(config)
    groups, biases = [], list[tuple[str, ...]]()
    for embedding in _embeddings(tensors, head, leaves):
        names = [embedding]
        if embedding.endswith("shared.weight"):
            inner = embedding.removesuffix("shared.weight")
            names += [f"{inner}{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
        if tied:
            stored = [name for name in tensors if name == head or name.endswith(f".{head}")]
            outer = "language_model." if embedding.startswith("language_model.model.") else ""
            names.append(stored[0] if stored else outer + head)
            biases = _biases(tensors, names[-1])
        here = [name for name in names if name in tensors]
        same = [name for name in here[1:] if _equal(tensors[here[0]], tensors[name])]
        group = (*here[:1], *same, *(name for name in names if name not in tensors))
        if here and len(group) > 1:
            groups.append(group)
    return (*groups, *biases)


def _biases(tensors: Mapping[str, Any], head: str) -> list[tuple[str, ...]]:
    """The bias of a masked model's head, which its decoder has too: ties go with the weight's."""
    module = head.removesuffix(".weight")
    outer, _, last = module.rpartition(".")
    first, second = f"{outer}.bias", f"{module}.bias"
    if last != "decoder" or first not in tensors:
        return []
    apart = second in tensors and not _equal(tensors[first], tensors[second])
    return [] if apart else [(first, second)]


def _has_head(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return True
    return any(str(name).endswith(_WITH_HEAD) for name in architectures)


def _tie_flag(config: Mapping[str, Any]) -> bool:
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    return config.get("tie_word_embeddings", inner) is not False


def _embeddings(tensors: Mapping[str, Any], head: str, leaves: set[str]) -> list[str]:
    """The token embeddings: the stored one, else the one that the layers' names imply."""
    found = []
    for name in tensors:
        *path, leaf, kind = ("", *name.split("."))
        if kind == "weight" and leaf in leaves and not any(p.isdigit() for p in path):
            found.append(name)
    shared = [name for name in found if name.endswith("shared.weight")]
    if found or head not in tensors:
        return (shared or found)[:1]
    for name in tensors:
        parts = name.split(".")
        for stack, leaf in _STACKS.items():
            if stack in parts:
                inside = "embed_in" if head == "embed_out.weight" else leaf
                return [".".join([*parts[: parts.index(stack)], inside, "weight"])]
    return []


def _equal(one: Any, two: Any) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    a, b = one.reshape(-1).view(np.uint8), two.reshape(-1).view(np.uint8)
    parts = (slice(i, i + _CHUNK) for i in range(0, len(a), _CHUNK))
    return all(np.array_equal(a[part], b[part]) for part in parts)
