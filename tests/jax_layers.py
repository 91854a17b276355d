"""Trees of JAX with one layer each, of the table's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_any.layer import Dense, Site


@dataclass(frozen=True)
class Form:
    """A framework's layer.

    Attributes
    ----------
    make : callable (base, layer's key) -> tree or None
        The tree, in which the layer has the site's name; None where there is no such layer.
    call : callable (tree, site, x) -> array
    """

    make: Callable[[Dense], Any]
    call: Callable[[Any, Site, Any], Any]


def nested(name: str, leaf: Any) -> Any:
    """Put a layer under a dotted name, in dicts."""
    for part in reversed(name.split(".")):
        leaf = {part: leaf}
    return leaf


def at(tree: Any, name: str) -> Any:
    """Look a layer up."""
    for part in name.split("."):
        tree = tree[part]
    return tree


def equinox_tree(base: Dense) -> Any:
    import equinox as eqx

    site, key = base.site, jax.random.key(0)
    weight = jnp.asarray(base.stored())
    bias = None if base.bias is None else jnp.asarray(base.bias)
    made: Any
    if site.kind == "Linear":
        made = eqx.nn.Linear(site.n_in, site.n_out, use_bias=site.bias, key=key)
    elif site.kind == "Embedding":
        return nested(site.name, eqx.nn.Embedding(weight=weight))
    elif site.is_conv:
        n = len(site.kernel)
        shape = {"groups": site.groups, "use_bias": site.bias, "stride": 2, "padding": 1}
        made = eqx.nn.Conv(n, site.n_in, site.n_out, site.kernel, **shape, key=key)
        bias = None if bias is None else bias.reshape(-1, *(1 for _ in site.kernel))
    elif site.kind == "Norm":
        made = eqx.nn.LayerNorm(site.n_out, use_bias=site.bias)
    else:
        return None
    where = (lambda m: m.weight) if bias is None else (lambda m: (m.weight, m.bias))
    return nested(site.name, eqx.tree_at(where, made, weight if bias is None else (weight, bias)))


def equinox_call(tree: Any, site: Site, x: Any) -> Any:
    layer = at(tree, site.name)
    if site.is_conv:
        return jax.vmap(layer)(x)
    for _ in range(x.ndim - (0 if site.kind == "Embedding" else 1)):
        layer = jax.vmap(layer)
    return layer(x)


def flax_tree(base: Dense) -> Any:
    from flax import nnx

    site, rngs = base.site, nnx.Rngs(0)
    weight = jnp.asarray(base.stored())
    made: Any
    if site.kind == "Linear":
        made = nnx.Linear(site.n_in, site.n_out, use_bias=site.bias, rngs=rngs)
        made.kernel = nnx.Param(weight.T)
    elif site.kind == "Embedding":
        made = nnx.Embed(site.n_in, site.n_out, rngs=rngs, dtype=weight.dtype)
        made.embedding = nnx.Param(weight)
    elif site.is_conv:
        shape: Any = {"use_bias": site.bias, "strides": 2, "feature_group_count": site.groups}
        made = nnx.Conv(site.n_in, site.n_out, site.kernel, **shape, rngs=rngs)
        made.kernel = nnx.Param(jnp.transpose(weight, (*range(2, weight.ndim), 1, 0)))
    elif site.kind == "Norm":
        made = nnx.LayerNorm(site.n_out, use_bias=site.bias, rngs=rngs)
        made.scale = nnx.Param(weight)
    else:
        return None
    if base.bias is not None:
        made.bias = nnx.Param(jnp.asarray(base.bias))
    return nested(site.name, made)


def flax_call(tree: Any, site: Site, x: Any) -> Any:
    return at(tree, site.name)(jnp.moveaxis(x, 1, -1) if site.is_conv else x)


def dict_tree(base: Dense) -> Any:
    site = base.site
    tensors = {name: jnp.asarray(a) for name, a in base.tensors().items()}
    if site.kind == "Linear":
        bias = {} if base.bias is None else {"bias": tensors[site.bias_name]}
        return nested(site.name, {"kernel": tensors[site.weight].T, **bias})
    return tensors


def dict_call(tree: Any, site: Site, x: Any) -> Any:
    if site.kind == "Linear":
        layer = at(tree, site.name)
        y = x @ layer["kernel"]
        return y + layer["bias"] if "bias" in layer else y
    weight, bias = tree[site.weight], tree.get(site.bias_name)
    if site.kind == "Embedding":
        return weight[x]
    if site.kind in ("Conv1D", "MultiheadAttention"):
        y = x @ (weight if site.kind == "Conv1D" else weight.T)
    else:
        y = jnp.asarray(weight) * 1
    return y if bias is None or y.shape[-1:] != bias.shape else y + bias


FORMS = {
    "equinox": Form(equinox_tree, equinox_call),
    "flax": Form(flax_tree, flax_call),
    "dict": Form(dict_tree, dict_call),
}


def input_of(site: Site, dtype: str = "float64", seed: int = 0) -> Any:
    """Draw what a row's layer takes."""
    rng = np.random.default_rng([seed, 7])
    if site.kind == "Embedding":
        return jnp.asarray(rng.integers(0, site.n_in, (2, 3)))
    lead = (2, site.n_in, *(5 for _ in site.kernel)) if site.is_conv else (2, 3, site.n_in)
    return jnp.asarray(rng.standard_normal(lead).astype(dtype))
