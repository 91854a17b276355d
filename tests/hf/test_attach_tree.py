"""Adapters of Hugging Face PEFT on a Llama in JAX, named as transformers': the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")
jax = pytest.importorskip("jax")
eqx = pytest.importorskip("equinox")
nnx = pytest.importorskip("flax.nnx")

import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402

from peft_any.adapter import Adapter  # noqa: E402
from peft_any.integrations.jax import attach_tree, detach_tree, merge_tree  # noqa: E402
from tests.hf.models import base_of, quietly  # noqa: E402
from tests.hf.reference import state_of  # noqa: E402
from tests.hf.test_models import ATTENTION, FEEDFORWARD, LORA  # noqa: E402
from tests.hf.whole import adapted  # noqa: E402

pytestmark = pytest.mark.hf

HEADS, GROUPS, SIZE = 4, 2, 4
QKVO = {"target_modules": ATTENTION["llama"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", {**LORA, **QKVO}),
    "dora": ("LORA", {**LORA, "use_dora": True, **QKVO}),
    "all-linear": ("LORA", {**LORA, "target_modules": "all-linear"}),
    "embedding": ("LORA", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("LORA", {**LORA, **QKVO, "modules_to_save": ["lm_head"]}),
    "oft": ("OFT", {"oft_block_size": 4, **QKVO}),
    "boft": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2, **QKVO}),
    "vera": ("VERA", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "ia3": (
        "IA3",
        {"target_modules": FEEDFORWARD["llama"][0], "feedforward_modules": FEEDFORWARD["llama"][1]},
    ),
}


def linear(form: str, weight: Any) -> Any:
    """Make a layer without bias of a weight (out, in)."""
    n_out, n_in = weight.shape
    if form == "dict":
        return {"kernel": weight.T}
    if form == "flax":
        made = nnx.Linear(n_in, n_out, use_bias=False, rngs=nnx.Rngs(0))
        made.kernel = nnx.Param(weight.T)
        return made
    layer = eqx.nn.Linear(n_in, n_out, use_bias=False, key=jax.random.key(0))
    return eqx.tree_at(lambda m: m.weight, layer, weight)


def table(form: str, weight: Any) -> Any:
    if form == "dict":
        return {"embedding": weight}
    if form == "flax":
        made = nnx.Embed(*weight.shape, rngs=nnx.Rngs(0), dtype=weight.dtype)
        made.embedding = nnx.Param(weight)
        return made
    return eqx.nn.Embedding(weight=weight)


def tree_of(form: str, state: dict[str, Any]) -> Any:
    """Nest a checkpoint's tensors, as layers of a framework."""
    tree: dict[str, Any] = {}
    for name, array in state.items():
        *path, _ = name.split(".")
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        weight = jnp.asarray(array)
        if path[-1] == "embed_tokens":
            node[path[-1]] = table(form, weight)
        else:
            node[path[-1]] = {"weight": weight} if weight.ndim == 1 else linear(form, weight)
    return tree


def call(layer: Any, x: Any) -> Any:
    if isinstance(layer, dict):
        return layer["embedding"][x] if "embedding" in layer else x @ layer["kernel"]
    if isinstance(layer, eqx.Module):
        lead = x.ndim - (0 if isinstance(layer, eqx.nn.Embedding) else 1)
        for _ in range(lead):
            layer = jax.vmap(layer)
    return layer(x)


def norm(layer: Any, x: Any) -> Any:
    return layer["weight"] * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def turned(x: Any) -> Any:
    """Turn pairs of channels by their positions: x (batch, heads, tokens, size)."""
    angles = jnp.arange(x.shape[2])[:, None] / 10000.0 ** (jnp.arange(0, SIZE, 2) / SIZE)
    angles = jnp.concatenate([angles, angles], -1).astype(x.dtype)
    one, two = jnp.split(x, 2, -1)
    return x * jnp.cos(angles) + jnp.concatenate([-two, one], -1) * jnp.sin(angles)


def attention(t: Any, x: Any) -> Any:
    def heads(name: str, n: int) -> Any:
        return call(t[name], x).reshape(*x.shape[:2], n, SIZE).transpose(0, 2, 1, 3)

    q, k, v = heads("q_proj", HEADS), heads("k_proj", GROUPS), heads("v_proj", GROUPS)
    k, v = (jnp.repeat(a, HEADS // GROUPS, axis=1) for a in (turned(k), v))
    scores = turned(q) @ jnp.swapaxes(k, -1, -2) / SIZE**0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    y = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3)
    return call(t["o_proj"], y.reshape(*x.shape[:2], -1))


def llama(t: Any, ids: Any) -> Any:
    h = call(t["model"]["embed_tokens"], ids)
    for layer in t["model"]["layers"].values():
        h = h + attention(layer["self_attn"], norm(layer["input_layernorm"], h))
        x, m = norm(layer["post_attention_layernorm"], h), layer["mlp"]
        h = h + call(m["down_proj"], jax.nn.silu(call(m["gate_proj"], x)) * call(m["up_proj"], x))
    return call(t["lm_head"], norm(t["model"]["norm"], h))


@pytest.mark.parametrize("label", METHODS)
def test_a_llama_with_an_attached_adapter_is_hfs(label: str, tmp_path: Path) -> None:
    method, fields = METHODS[label]
    base = base_of("llama")
    theirs = adapted("llama", method, fields)
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    with quietly(), torch.no_grad():
        theirs.save_pretrained(tmp_path / "a")
        want, plain = theirs(ids).logits.numpy(), base(ids).logits.numpy()
    assert np.abs(want - plain).max() > 1e-4
    numbers = jnp.asarray(ids.numpy())
    forms = ("equinox", "flax", "dict")
    for form in forms if label == "lora" else [forms[[*METHODS].index(label) % 3]]:  # by turns
        tree = tree_of(form, state_of(base))
        task = attach_tree(tree, Adapter.load(tmp_path / "a"))

        def logits(p: Any, x: Any, task: Any = task) -> Any:
            return llama(task.bind(p), x), llama(merge_tree(task, p), x)

        for y in jax.jit(logits)(task.params, numbers):
            close(y, want)
        assert detach_tree(task) is tree
        if (label, form) == ("lora", "dict"):
            close(jax.jit(llama)(tree, numbers), plain)


def close(got: Any, want: Any) -> None:
    assert np.abs(np.asarray(got) - want).max() <= 1e-5 * np.abs(want).max()
