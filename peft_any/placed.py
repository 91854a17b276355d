"""Putting an adapter on a base: a fresh one, or one that was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from peft_any import attention
from peft_any._typing import Array, DTypeLike, Params
from peft_any.adapter import Adapter
from peft_any.backend import astype, backend_of, compute_dtype, dtype_name, is_floating, move
from peft_any.checks import refuse_restart
from peft_any.completing import (
    Placed,
    completed,
    filled,
    library,
    order_of,
    rederived,
    refuse_lacking,
    root_of,
)  # fmt: skip
from peft_any.errors import ConfigError, ShapeError, TargetError, nearest
from peft_any.extras import refuse_faults
from peft_any.layer import Kind, Site
from peft_any.layout import layout
from peft_any.method import Prompt, Tuner
from peft_any.naming import nesting
from peft_any.naming.experts import with_experts
from peft_any.origin import made_on
from peft_any.prompt import Attended
from peft_any.prompts import table_of
from peft_any.registry import Config
from peft_any.replication import refuse_unrepeated
from peft_any.rng import Fresh
from peft_any.selection import select
from peft_any.targets import check_params, configured, place
from peft_any.tokens import input_table

ATTACHABLE = "a configuration, or an adapter that Adapter.load read"
Attachable: TypeAlias = Annotated[Adapter | Config, ATTACHABLE]


def fitted(
    adapter: Adapter,
    weights: Mapping[str, Array],
    kinds: Mapping[str, Kind | Site] | None,
    *,
    vouched: bool = False,
) -> Placed:
    """Fit a loaded adapter to a base, moving its arrays to the base's library.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        Listing everything that does not fit.
    """
    if isinstance(adapter.config, Attended):
        attention.check(
            adapter.config, adapter.sites, attention.widths(adapter.config, weights, kinds)
        )
        return Placed(adapter.to(library(weights)), {}, {})
    if new := nesting.names(adapter.config, adapter.sites, weights, kinds):
        adapter = adapter.replace(sites=nesting.named(adapter.sites, new))
    sites = place(adapter, weights, kinds)
    adapter = filled(adapter.to(library(weights)), sites)
    adapter = adapter.with_shared([*sites.values()], lambda name: dtype_name(weights[name]))
    config = adapter.config
    if isinstance(config, Prompt):
        adapter = adapter.replace(shared=config.resumed(adapter.shared))
    configs = configured(config, sites) if isinstance(config, Tuner) else {}
    return completed(Placed(adapter, sites, configs), weights, vouched=vouched)


def fresh(
    config: Config,
    weights: Mapping[str, Array],
    kinds: Mapping[str, Kind | Site] | None,
    seed: int,
    dtype: DTypeLike,
    *,
    vouched: bool = False,
) -> Placed:
    """Start a new adapter of a configuration on a base.

    Raises
    ------
    ConfigError, TargetError
        If the configuration does not fit the base.
    """
    root = Fresh(seed, library(weights), dtype=dtype)
    if isinstance(config, Prompt):
        if config.reads_table and (name := input_table(weights)):
            root.base = table_of(weights[name])
        return Placed(Adapter(config, {}, config.init(root)), {}, {})
    if isinstance(config, Attended):
        wide = attention.widths(config, weights, kinds)
        return Placed(
            Adapter(config, {m: config.init(root.at(m), d) for m, d in wide.items()}), {}, {}
        )
    if not isinstance(config, Tuner):
        raise ConfigError(f"{config.where}: is neither a Tuner nor a Prompt")
    refuse_restart(config, config.where)
    refuse_unrepeated(config, weights)
    config = with_experts(config, weights)
    every = layout(weights, kinds, config)
    sites = {
        name: every[name] for name in nesting.registered(select(config, every, weights), every)
    }
    configs = configured(config, sites)
    order = order_of(config, sites, weights, vouched=vouched)
    root = root_of(weights, sites, order, seed, dtype)
    root.shared = shared = config.init_shared([*sites.values()], root)
    params = {name: configs[name].init(site, root.at(name)) for name, site in sites.items()}
    for name, site in sites.items():
        _refuse_nameless(config, params[name])
        check_params(configs[name], params[name], site)
    for (at, key), first in config.ties(params).items():
        params[at][key] = params[first][key]
    made = Adapter(config, params, shared).with_copies(weights, sites)
    made = made.replace(metadata={**made.metadata, **made_on(weights, sites.values())})
    return Placed(made, sites, configs)


def _refuse_nameless(config: Tuner, params: Params) -> None:
    """Refuse a method whose files could not be read again."""
    if not getattr(config, "peft_type", ""):
        raise ConfigError(
            f"{config.where}: a method without a peft_type cannot be used: give its class one, "
            'class MineConfig(Additive, peft_type="MINE", prefix="mine_")'
        )
    odd = [k for k in params if not (config.prefix and k.startswith(config.prefix))]
    odd = [k for k in odd if k not in config.frozen]
    if odd:
        raise ConfigError(
            f"{config.where}: parameters {odd} cannot be stored: their names begin with the "
            f"class's prefix, which is {config.prefix!r}"
        )


def attached(
    name: str,
    adapter: Attachable,
    weights: Mapping[str, Array],
    kinds: Mapping[str, Kind | Site] | None,
    *,
    seed: int = 0,
    dtype: DTypeLike = "float32",
    rederive: bool = False,
    in_order: bool = False,
) -> Placed:
    """Put a loaded adapter, or a fresh one of a configuration, on a base, complete.

    `in_order` says that the weights come in the order of the model's layers, as `rederive` does.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        If it does not fit the base, or lacks what its writer took from it.
    """
    if isinstance(adapter, Config):
        placed = fresh(adapter, weights, kinds, seed, dtype, vouched=rederive or in_order)
    elif isinstance(adapter, Adapter):
        placed = fitted(adapter, weights, kinds, vouched=rederive or in_order)
        if not isinstance(adapter.config, Prompt):  # whose nets are there in training alone
            refuse_faults(adapter, f"adapter {name!r}")
    else:
        raise ConfigError(
            f"adapter {name!r}: {adapter!r:.60} cannot be attached: give {ATTACHABLE}"
        )
    if rederive:
        placed = rederived(placed, weights)
    refuse_lacking(placed)
    return placed


def given(placed: Placed, values: Mapping[str, Mapping[str, Array]]) -> Placed:
    """Put other arrays in the place of an adapter's own.

    Parameters
    ----------
    placed : Placed
    values : mapping {site: {name: array}}
        As `Adapter.trainable` names them, in part or whole.

    Raises
    ------
    ShapeError, TargetError
        If a site, a name or a shape is not the adapter's.
    """
    adapter = placed.adapter
    own = adapter.trainable()
    for site, arrays in values.items():
        for name, array in arrays.items():
            if name not in own.get(site, {}):
                known = [f"{s}.{n}" for s, names in own.items() for n in names]
                raise TargetError(
                    f"{site}.{name}: is not a parameter of the adapter"
                    f"{nearest(f'{site}.{name}', known)}"
                )
            if array.shape != own[site][name].shape:
                raise ShapeError(
                    f"{site}.{name}: shape {tuple(array.shape)} cannot take the place of "
                    f"{tuple(own[site][name].shape)}: give the arrays of model.parameters, changed"
                )
            if not is_floating(array) and is_floating(own[site][name]):
                raise ShapeError(
                    f"{site}.{name}: {dtype_name(array)} values cannot be parameters: they are "
                    "no floats"
                )
    loose = values.get("", {})
    rows = {f"{module}.trainable_tokens_delta": module for module in adapter.tokens}
    sites = {s: {**p, **values.get(s, {})} for s, p in adapter.sites.items()}
    for (site, name), first in placed.ties.items():
        if name in values.get(first, {}):
            sites[site][name] = values[first][name]
    changed = adapter.replace(
        sites=sites,
        shared={k: loose.get(k, a) for k, a in adapter.shared.items()},
        extra={k: loose.get(k, a) for k, a in adapter.extra.items()},
        tokens={m: loose.get(k, adapter.tokens[m]) for k, m in rows.items()},
    )
    return Placed(changed, placed.sites, placed.configs)


def ported(params: Mapping[str, Any], weights: Mapping[str, Array]) -> dict[str, Any]:
    """Move {adapter: {site: {name: array}}} to a base's library, where they are of another."""
    to = library(weights)

    def here(array: Array) -> Any:
        return array if backend_of(array).name == to.name else move(array, to)

    return {
        adapter: {site: {k: here(a) for k, a in p.items()} for site, p in sites.items()}
        for adapter, sites in params.items()
    }


def summed(
    tensor: str,
    base: Array,
    copies: Mapping[str, Array],
    weights: Mapping[str, float],
    *,
    stacked: bool,
) -> Array:
    """Put full copies of a base tensor in its place: one of them, or their weighted sum.

    Raises
    ------
    TargetError
        If several are to act one upon another.
    """
    if not copies:
        return base
    if len(copies) == 1 and weights[next(iter(copies))] == 1.0:
        return next(iter(copies.values()))
    if stacked:
        raise TargetError(
            f"{tensor}: adapters {[*copies]} each carry a full copy of it and cannot act "
            "together: activate one, or give weights for their sum"
        )
    wide = astype(base, compute_dtype(base))
    total = wide
    for name, new in copies.items():
        total = total + weights[name] * (astype(new, dtype_name(wide)) - wide)
    return astype(total, dtype_name(base))
