"""Putting an adapter on a base: a fresh one, or one that was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_any import attention
from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.backend import Backend, astype, backend_of, compute_dtype, dtype_name, is_floating
from peft_any.errors import ConfigError, ShapeError, TargetError, nearest
from peft_any.extras import input_table, refuse_faults
from peft_any.layer import Dense, Kind, Site
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


@dataclass(frozen=True)
class Placed:
    """An adapter with the sites it adapts, and its configuration resolved at each."""

    adapter: Adapter
    sites: dict[str, Site]
    configs: dict[str, Tuner]

    def read(self) -> dict[str, Params]:
        """Give the arrays that a loss reads: the trained ones, and all of a prompt."""
        adapter = self.adapter
        return {"": adapter.shared} if isinstance(adapter.config, Prompt) else adapter.trainable()

    def settled(self, params: Mapping[str, Params]) -> dict[str, Params]:
        """Bring trained arrays, by site, to where the method keeps them."""
        config = self.adapter.config
        rules = {"": config} if isinstance(config, Prompt) else self.configs
        return {s: rules[s].settled(p) if s in rules else p for s, p in params.items()}

    def params(self, site: Site, routing: Mapping[str, Any]) -> Params:
        """Join a site's parameters, the shared ones, and what its method takes of a call."""
        takes = self.configs[site.name].takes
        more = {name: value for name, value in routing.items() if name in takes}
        return {**self.adapter.shared, **self.adapter.sites[site.name], **more}

    @property
    def ties(self) -> dict[tuple[str, str], str]:
        """Parameters that repeat those of another site (`Tuner.ties`)."""
        config = self.adapter.config
        return config.ties(self.adapter.sites) if isinstance(config, Tuner) else {}


def dense(weights: Mapping[str, Array], site: Site) -> Dense:
    """Take a layer out of a mapping of weights."""
    return Dense.of(weights[site.weight], weights[site.bias_name] if site.bias else None, site)


def library(weights: Mapping[str, Array]) -> Backend:
    """Say where the weights live.

    Raises
    ------
    ShapeError
        If there are none.
    """
    for array in weights.values():
        return backend_of(array)
    raise ShapeError("weights: an empty mapping cannot be adapted: give name -> array")


def fitted(
    adapter: Adapter, weights: Mapping[str, Array], kinds: Mapping[str, Kind | Site] | None
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
    adapter = filled(adapter.to(library(weights)), sites).with_shared([*sites.values()])
    config = adapter.config
    if isinstance(config, Prompt):
        adapter = adapter.replace(shared=config.resumed(adapter.shared))
    configs = configured(config, sites) if isinstance(config, Tuner) else {}
    return completed(Placed(adapter, sites, configs), weights)


def fresh(
    config: Config,
    weights: Mapping[str, Array],
    kinds: Mapping[str, Kind | Site] | None,
    seed: int,
    dtype: str,
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
    refuse_unrepeated(config, weights)
    config = with_experts(config, weights)
    every = layout(weights, kinds, config)
    sites = {name: every[name] for name in nesting.registered(select(config, every), every)}
    configs = configured(config, sites)
    root = Fresh(seed, library(weights), dtype=dtype, sites=(*sites.values(),))
    params = {
        name: configs[name].init(site, root.at(name, dense(weights, site)))
        for name, site in sites.items()
    }
    for name, site in sites.items():
        _refuse_nameless(config, params[name])
        check_params(configs[name], params[name], site)
    for (at, key), first in config.ties(params).items():
        params[at][key] = params[first][key]
    shared = config.init_shared([*sites.values()], root)
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
    adapter: Adapter | Config,
    weights: Mapping[str, Array],
    kinds: Mapping[str, Kind | Site] | None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    rederive: bool = False,
) -> Placed:
    """Put a loaded adapter, or a fresh one of a configuration, on a base, complete.

    Raises
    ------
    ConfigError, ShapeError, TargetError
        If it does not fit the base, or lacks what its writer took from it.
    """
    if isinstance(adapter, Config):
        placed = fresh(adapter, weights, kinds, seed, dtype)
    elif isinstance(adapter, Adapter):
        placed = fitted(adapter, weights, kinds)
        if not isinstance(adapter.config, Prompt):  # whose nets are there in training alone
            refuse_faults(adapter, f"adapter {name!r}")
    else:
        raise ConfigError(
            f"adapter {name!r}: {adapter!r:.60} cannot be attached: give a configuration, or "
            "an adapter that Adapter.load read"
        )
    if rederive:
        placed = rederived(placed, weights)
    refuse_lacking(placed)
    return placed


def rederived(placed: Placed, weights: Mapping[str, Array]) -> Placed:
    """Add to an unconverted adapter what its writer took from the base.

    Raises
    ------
    ConfigError
        If it lacks nothing.
    """
    if not lacking(placed):
        raise ConfigError(
            f"{placed.adapter.config.where}: rederive=True has nothing to redo: the adapter lacks "
            "nothing"
        )
    place = {name: i for i, name in enumerate(weights)}
    in_order = sorted(placed.sites.values(), key=lambda site: place[site.weight])
    root, params = Fresh(0, library(weights), sites=(*in_order,)), {}
    for name, site in placed.sites.items():
        new = root.at(name, dense(weights, site))
        params[name] = placed.configs[name].rederive(placed.adapter.sites[name], site, new)
    return replace(placed, adapter=placed.adapter.replace(sites=params))


def completed(placed: Placed, weights: Mapping[str, Array]) -> Placed:
    """Add unasked what follows from the base without doubt (`Tuner.certain`)."""
    config = placed.adapter.config
    alone = len(placed.sites) == 1
    sure = isinstance(config, Tuner) and (config.certain or (config.ordered and alone))
    return rederived(placed, weights) if sure and lacking(placed) else placed


def filled(adapter: Adapter, sites: Mapping[str, Site]) -> Adapter:
    """Give an adapter an entry for every site, where its file holds no tensor of any."""
    return adapter if adapter.sites else adapter.replace(sites={name: {} for name in sites})


def lacking(placed: Placed) -> dict[str, str]:
    """Say what the sites of an adapter lack because its writer took it from the base."""
    lacks = {n: c.lacks(placed.adapter.sites[n]) for n, c in placed.configs.items()}
    return {name: what for name, what in lacks.items() if what is not None}


def refuse_lacking(placed: Placed) -> None:
    """Refuse an adapter that cannot be applied without what its writer took from the base.

    Raises
    ------
    ConfigError
        Naming it, and the ways out.
    """
    ordered = getattr(placed.adapter.config, "ordered", False)
    for name, what in lacking(placed).items():
        if ordered:
            raise ConfigError(
                f"{name}: the adapter lacks {what}, which follow from the order of the model's "
                "layers: give rederive=True if the base's tensors are in that order, as those of a "
                "state_dict are and those of a safetensors file are not, or save it in Hugging "
                "Face PEFT with save_indices=True"
            )
        raise ConfigError(
            f"{name}: the adapter lacks {what}: give rederive=True (--rederive) with the very "
            "base it was made for, or convert the adapter where it was made "
            "(path_initial_model_for_weight_conversion)"
        )


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
    rounded: Array = astype(total, dtype_name(base))
    return rounded
