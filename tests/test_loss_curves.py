"""One training script, 200 steps, the same losses on every library: for each of the methods."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from peft_any import PeftModel, PrefixTuningConfig, PromptTuningConfig, value_and_grad
from peft_any.backend import namespace, to_numpy
from peft_any.registry import Config
from peft_any.train import adamw, apply_updates, cosine
from peft_any.train.allocator import RankAllocator
from tests.test_train import CONFIGS, data_of, enable, weights_of
from tests.test_train import loss as loss_of_layers

STEPS, WIDTH, HEADS, TOKENS = 200, 8, 2, 4
SIZES = {"num_virtual_tokens": 3, "token_dim": WIDTH}
LAYERS = {"num_layers": 1, "num_attention_heads": HEADS}
METHODS: dict[str, Config] = {
    **CONFIGS,
    "prompt": PromptTuningConfig(**SIZES),
    "prefix": PrefixTuningConfig(**SIZES, **LAYERS),
    "prefix-projected": PrefixTuningConfig(prefix_projection=True, **SIZES, **LAYERS),
}
DOUBLE = {"adalora"}
"""Its regulariser, a norm and no square, has a kink where it vanishes: single precision's last bit
turns the gradient there, and Adam makes a whole step of it."""


def attention(q: Any, k: Any, v: Any) -> Any:
    xp = namespace(q, k, v)
    scores = q @ xp.matrix_transpose(k) / q.shape[-1] ** 0.5
    scores = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return (scores / xp.sum(scores, axis=-1, keepdims=True)) @ v


def loss_of_tokens(bound: Any, batch: Any, config: Any) -> Any:
    """Read a sequence by one attention layer that sees the virtual tokens too."""
    x, y = batch
    p, xp = bound.params["task"][""], namespace(x)
    x = xp.reshape(x, (x.shape[0] // TOKENS, TOKENS, WIDTH))
    if isinstance(config, PromptTuningConfig):
        x = config.prepend(p, x)
    heads = xp.reshape(x, (*x.shape[:2], HEADS, WIDTH // HEADS))
    k = v = xp.permute_dims(heads, (0, 2, 1, 3))
    if isinstance(config, PrefixTuningConfig):
        k, v = config.concat_to_kv(p, k, v, 0)
    read = xp.mean(attention(xp.permute_dims(heads, (0, 2, 1, 3)), k, v), axis=2)
    gap = xp.reshape(read, (read.shape[0], WIDTH))[:, : y.shape[-1]] - y[::TOKENS, :]
    return xp.mean(gap * gap)


@cache
def curve(name: str, library: str) -> list[float]:
    """Train by a loop as a user writes it; only the compilation on JAX is not the same for all."""
    config, dtype = METHODS[name], "float64" if name in DOUBLE else "float32"
    model = PeftModel(weights_of(library, dtype))
    model.add("task", config, seed=1, dtype=dtype)
    x, y = data_of(library, dtype=dtype)
    allocator = RankAllocator(config) if name == "adalora" else None

    def loss(params: Any, batch: Any) -> Any:
        bound = model.bind(params)
        if name.startswith("pr"):
            return loss_of_tokens(bound, batch, config)
        value = loss_of_layers(bound, batch)
        return value if allocator is None else value + config.regularizer(params["task"].values())

    slopes = value_and_grad(loss)
    if library == "jax":
        import jax

        slopes = jax.jit(slopes)
    optimizer = adamw(cosine(0.01, STEPS, warmup=10))
    params: Any = dict(model.parameters)
    state = optimizer.init(params)
    kept = None if allocator is None else allocator.init(params["task"])
    losses = []
    for step in range(STEPS):
        rows = slice(16 * (step % 3), 16 * (step % 3) + 16)
        value, grads = slopes(params, (x[rows, ...], y[rows, ...]))
        updates, state = optimizer.update(grads, state, params)
        params = model.settled(apply_updates(params, updates))
        if allocator is not None:
            params["task"], kept = allocator.update(grads["task"], kept, params["task"], step + 1)
        losses.append(float(to_numpy(value)))
    return losses


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("library", ["strict", "torch", "jax"])
def test_two_hundred_steps(library: str, name: str) -> None:
    enable(library)
    want = curve(name, "numpy")
    assert min(want[-6:]) < 0.99 * want[0]
    np.testing.assert_allclose(curve(name, library), want, rtol=1e-5)
