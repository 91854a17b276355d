"""A program for `test_jax_trees.py`: adapters on trees that are spread over four CPU devices.

It prints one JSON object, ``{tree: findings}``; the devices must be asked for before JAX starts.
"""

from __future__ import annotations

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_any import LoraConfig
from peft_any.integrations.jax import attach_tree, merge_tree

CONFIG = LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["fc"])


class Flax(nnx.Module):
    """A module of Flax's."""

    def __init__(self, weight: Any) -> None:
        self.fc = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
        self.fc.kernel = nnx.Param(weight.T)


def main() -> None:
    """Try each kind of tree."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "model"))
    host = np.random.default_rng(0).standard_normal((16, 8)).astype("float32")
    x = np.random.default_rng(1).standard_normal((4, 8)).astype("float32")
    rows, columns = PartitionSpec("model", None), PartitionSpec(None, "model")
    weight = jax.device_put(host, NamedSharding(mesh, rows))
    given = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None)))
    linear = eqx.nn.Linear(8, 16, use_bias=False, key=jax.random.key(0))
    kernel = jax.device_put(host.T, NamedSharding(mesh, columns))
    module = Flax(weight)
    module.fc.kernel = nnx.Param(kernel)
    trees: dict[str, tuple[Any, Any, Any, Any]] = {
        "equinox": (
            {"fc": eqx.tree_at(lambda m: m.weight, linear, weight)},
            lambda t, x: jax.vmap(t["fc"])(x),
            lambda t: t["fc"].weight,
            weight,
        ),
        "flax": (module, lambda t, x: t.fc(x), lambda t: t.fc.kernel.get_value(), kernel),
        "dict": (
            {"fc": {"kernel": kernel}},
            lambda t, x: x @ t["fc"]["kernel"],
            lambda t: t["fc"]["kernel"],
            kernel,
        ),
    }
    alone = attach_tree({"fc": {"weight": jnp.asarray(host)}}, CONFIG)
    want = x @ np.asarray(merge_tree(alone)["fc"]["weight"]).T
    print(json.dumps({name: found(tree, given, want) for name, tree in trees.items()}))


def found(form: tuple[Any, Any, Any, Any], x: Any, want: Any) -> Any:
    """Say how one tree's results lie, and how far they are from those of one device."""
    tree, call, leaf, base = form
    task = attach_tree(tree, CONFIG)
    merged = leaf(merge_tree(task))
    outputs = [
        call(task.bind(), x),
        jax.jit(lambda p, x: call(task.bind(p), x))(task.params, x),
        call(merge_tree(task), x),
    ]
    slopes = jax.jit(jax.grad(lambda p, x: jnp.sum(call(task.bind(p), x) ** 2)))(task.params, x)
    return {
        "devices": len(jax.devices()),
        "fresh": all(len(a.devices()) == 4 for a in jax.tree.leaves(task.params)),
        "merged": bool(merged.sharding.is_equivalent_to(base.sharding, 2)),
        "spread": [not y.sharding.is_fully_replicated for y in outputs],
        "finite": all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(slopes)),
        "far": [float(np.abs(np.asarray(y) - want).max() / np.abs(want).max()) for y in outputs],
    }


if __name__ == "__main__":
    main()
