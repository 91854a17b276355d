"""A program for `test_spread.py`: adapters on JAX arrays that are spread over four CPU devices.

It prints one JSON object, ``{method: findings}``; the devices must be asked for before JAX starts.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_any import PeftModel, value_and_grad
from tests.spread import CONFIGS, HOST, INPUT, network

SPREAD = {
    "fc1.weight": PartitionSpec("model", None),
    "fc1.bias": PartitionSpec("model"),
    "fc2.weight": PartitionSpec(None, "model"),
}


def main() -> None:
    """Try every configuration."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "model"))

    def put(array: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(array, NamedSharding(mesh, spec))

    weights = {name: put(array, SPREAD[name]) for name, array in HOST.items()}
    x = put(INPUT, PartitionSpec("data", None))
    print(json.dumps({name: found(name, weights, x) for name in CONFIGS}))


def found(name: str, weights: dict[str, Any], x: Any) -> dict[str, Any]:
    """Say how one method's results lie, and how far they are from NumPy's."""
    model, host = PeftModel(weights), PeftModel(HOST)
    model.add("a", CONFIGS[name])
    host.add("a", CONFIGS[name])
    params = {n: {s: dict(p) for s, p in sites.items()} for n, sites in model.parameters.items()}
    merged, want = model.merge(), host.merge()

    def eager(params: Any, x: Any) -> Any:
        return network(model, params, x, jnp)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(eager(params, x) ** 2)

    def host_loss(params: Any) -> Any:
        return np.sum(network(host, params, INPUT, np) ** 2)

    first = model.bind(params).layers["fc1"](x)
    plain = x @ weights["fc1.weight"].T + weights["fc1.bias"]
    outputs = [f(params, x) for f in (eager, jax.jit(eager))]
    _, slopes = value_and_grad(loss)(params, x)
    _, host_slopes = value_and_grad(host_loss)(host.parameters)
    leaves = [a for p in params["a"].values() for a in p.values()]
    return {
        "devices": len(jax.devices()),
        "fresh": all(len(a.devices()) == 4 for a in leaves),
        "merged": all(same(array, weights[key]) for key, array in merged.items()),
        "output": same(first, plain),
        "spread": [not y.sharding.is_fully_replicated for y in outputs],
        "far": [
            *(distance(a, want[k]) for k, a in merged.items()),
            *(distance(y, network(host, host.parameters, INPUT, np)) for y in outputs),
            *(
                distance(slope, host_slopes["a"][site][key])
                for site, p in slopes["a"].items()
                for key, slope in p.items()
            ),
        ],
    }


def same(one: Any, two: Any) -> bool:
    """Whether two arrays lie on the devices alike."""
    return bool(one.sharding.is_equivalent_to(two.sharding, one.ndim))


def distance(one: Any, two: Any) -> float:
    """Give the largest difference, by the largest entry."""
    one, two = np.asarray(one), np.asarray(two)
    return float(np.abs(one - two).max() / max(np.abs(two).max(), 1e-30))


if __name__ == "__main__":
    main()
