"""Where methods that act within attention are placed, and what they add there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft_any._typing import Array, Params
from peft_any.backend import (
    astype,
    compute_dtype,
    creation_device,
    dtype_name,
    namespace,
)
from peft_any.errors import ConfigError, ShapeError, TargetError, nearest
from peft_any.layer import Kind, Site
from peft_any.layout import layout
from peft_any.prompt import Attended

FUSED = "c_attn"
"""GPT-2's layer that gives queries, keys and values, one beside the other."""


def widths(
    config: Attended, weights: Mapping[str, Any], kinds: Mapping[str, Kind | Site] | None = None
) -> dict[str, int]:
    """Name the attention modules that a configuration chooses, with the width of their input.

    Blocks are ordered by the numbers in their names: safetensors files hold ``layers.10``
    before ``layers.2``.

    Raises
    ------
    ConfigError
        If there are fewer than the configuration asks for.
    TargetError
        If one of them has no projection of keys.
    """
    every = layout(weights, kinds)
    parents = {name.rpartition(".")[0] for name in every}
    found = {}
    for module in config.modules(sorted(parents, key=_numbered)):
        keys = [every[k] for p in ("k_proj", FUSED) if (k := f"{module}.{p}") in every]
        if not keys:
            raise TargetError(
                f"{module}: {config.peft_type} cannot act here: the module has neither k_proj "
                f"nor {FUSED}; name the attention in target_modules"
            )
        found[module] = keys[0].n_in
    return found


def check(config: Attended, sites: Mapping[str, Params], wide: Mapping[str, int]) -> None:
    """Refuse a loaded adapter whose modules or shapes are not those of the base.

    Raises
    ------
    TargetError, ShapeError
        Naming what differs.
    """
    if sites.keys() != wide.keys():
        raise TargetError(
            f"{config.where}: the adapter's modules {sorted(sites)} are not those that the "
            f"configuration chooses of this base, {sorted(wide)}"
        )
    for module, p in sites.items():
        got = {name: tuple(array.shape) for name, array in p.items()}
        if got != (want := config.shapes(wide[module])):
            raise ShapeError(f"{module}: parameters {got} do not fit the base: {want} would")


def gain(
    module: str,
    q: Array,
    layers: Mapping[str, Any],
    active: Mapping[str, tuple[Attended, float]],
    params: Mapping[str, Mapping[str, Params]],
) -> Array:
    """Compute what the active adapters add to the output of an attention module.

    Parameters
    ----------
    module : str
    q : array (batch, heads, tokens, c)
    layers : mapping of str to callable
        A bound model's.
    active : mapping of str to (Attended, float)
        Configurations and weights, by adapter.
    params : mapping {adapter: {module: {name: array}}}

    Returns
    -------
    array (batch, tokens, d)
        In `q`'s dtype, computed in at least float32.
    """
    names = {p: f"{module}.{p}" for p in ("k_proj", "v_proj", FUSED, "o_proj")}
    there = {p: name for p, name in names.items() if name in layers}
    if FUSED not in there and not {"k_proj", "v_proj"} <= there.keys():
        modules = {name.rpartition(".")[0] for name in layers}
        raise TargetError(
            f"{module}: has no projections of keys and values{nearest(module, modules)}"
        )
    batch, heads, tokens, c = q.shape
    xp, wide = namespace(q), compute_dtype(q)
    q, out = astype(q, wide), dtype_name(q)
    dtype, device = q.dtype, creation_device(q)
    total = None
    for adapter, (config, weight) in active.items():
        if module in params[adapter]:
            p = {name: astype(array, wide) for name, array in params[adapter][module].items()}
            term = weight * config.attend(p, q, *_projections(there, layers))
            total = term if total is None else total + term
    if total is None:
        size = layers[there["o_proj"]].base.site.n_out if "o_proj" in there else heads * c
        total = xp.zeros((batch, tokens, size), dtype=dtype, device=device)
    elif "o_proj" in there:  # Hugging Face PEFT leaves GPT-2's output projection, c_proj, out
        total = layers[there["o_proj"]](total)
    return astype(total, out)


def _projections(there: Mapping[str, str], layers: Mapping[str, Any]) -> tuple[Any, Any]:
    if FUSED not in there:
        return layers[there["k_proj"]], layers[there["v_proj"]]
    fused = layers[there[FUSED]]
    d = fused.base.site.n_out // 3
    return (lambda x: fused(x)[..., d : 2 * d]), (lambda x: fused(x)[..., 2 * d :])


def _numbered(name: str) -> list[tuple[int, str]]:
    """Sort numbers in a name by their values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def active(
    placed: Mapping[str, Any], weights: Mapping[str, float]
) -> dict[str, tuple[Attended, float]]:
    """Choose the active adapters that act within attention, with their weights."""
    configs = {name: placed[name].adapter.config for name in weights}
    return {n: (c, weights[n]) for n, c in configs.items() if isinstance(c, Attended)}


def refuse(configs: Mapping[str, Any], how: str) -> None:
    """Refuse what adapters that act within attention cannot do: be merged, or mixed in a batch.

    Raises
    ------
    ConfigError
        Naming the first of them.
    """
    for name, config in configs.items():
        if isinstance(config, Attended):
            raise ConfigError(f"adapter {name!r}: {how}: {config.refusal}")
