"""An adapter with its sites, and what its file leaves to be found again from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_any._typing import Array, Params
from peft_any.adapter import Adapter
from peft_any.backend import Backend, backend_of
from peft_any.errors import ConfigError, ShapeError, TargetError
from peft_any.layer import Dense, Site
from peft_any.method import Prompt, Tuner
from peft_any.rng import Fresh
from peft_any.traversal import UntoldOrderError, in_model_order


@dataclass(frozen=True, eq=False)
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
    """Take a layer out of a mapping of weights.

    Raises
    ------
    TargetError
        If it has no such layer.
    """
    try:
        bias = weights[site.bias_name] if site.bias else None
        return Dense.of(weights[site.weight], bias, site)
    except KeyError as lost:
        raise TargetError(f"{lost}: the weights given have no such tensor") from None


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


def root_of(
    weights: Mapping[str, Array],
    sites: Mapping[str, Site],
    order: Sequence[str],
    seed: int = 0,
    dtype: str = "float32",
) -> Fresh:
    """Give the draws of all sites, with their base layers at hand."""
    every = tuple(sites[name] for name in order)
    to = library(weights)
    return Fresh(seed, to, dtype=dtype, sites=every, bases=lambda name: dense(weights, sites[name]))


def order_of(
    config: Tuner,
    sites: Mapping[str, Site],
    weights: Mapping[str, Array],
    parts: Sequence[str] = (),
    *,
    vouched: bool = False,
) -> list[str]:
    """Put sites in the order of the model's layers, where the method asks (`Tuner.ordered`).

    Raises
    ------
    UntoldOrderError
        If it is not told (`in_model_order`), and parameters depend on it.
    """
    if not config.ordered or len(sites) == 1:
        return [*sites]
    names = {site.weight.rpartition(".")[0]: name for name, site in sites.items()}
    try:
        return [names[m] for m in in_model_order(names, weights, parts, vouched=vouched)]
    except UntoldOrderError:
        if not config.certain:
            raise
    place = {tensor: i for i, tensor in enumerate(weights)}
    return sorted(sites, key=lambda name: place[sites[name].weight])


def completed(
    placed: Placed,
    weights: Mapping[str, Array],
    parts: Sequence[str] = (),
    *,
    vouched: bool = False,
) -> Placed:
    """Add unasked what follows from the base without doubt (`Tuner.certain`, `Tuner.ordered`).

    Parameters
    ----------
    placed : Placed
    weights : mapping of str to array
    parts, vouched
        As for `in_model_order`.

    Raises
    ------
    UntoldOrderError
        If it follows from an order of layers that is not told.
    """
    config = placed.adapter.config
    if not (isinstance(config, Tuner) and (config.certain or config.ordered) and lacking(placed)):
        return placed
    return rederived(
        placed, weights, order_of(config, placed.sites, weights, parts, vouched=vouched)
    )


def rederived(
    placed: Placed, weights: Mapping[str, Array], order: Sequence[str] | None = None
) -> Placed:
    """Add to an unconverted adapter what its writer took from the base.

    Raises
    ------
    ConfigError
        If it lacks nothing, and never did.
    """
    config = placed.adapter.config
    if not lacking(placed):
        if getattr(config, "ordered", False):  # what was asked for is done
            return placed
        raise ConfigError(
            f"{config.where}: rederive=True has nothing to redo: the adapter lacks nothing"
        )
    root, params = root_of(weights, placed.sites, order or [*placed.sites]), {}
    root.shared = placed.adapter.shared
    for name, site in placed.sites.items():
        own = placed.adapter.sites[name]
        of = placed.configs[name]
        found = of.rederive(own, site, root.at(name)) if of.lacks(own) else own
        if site.weight in placed.adapter.extra:  # a copy that lacks what was taken out of the base
            found = {k: 0 * a if k.startswith("start_") else a for k, a in found.items()}
        params[name] = found
    return replace(placed, adapter=placed.adapter.replace(sites=params))


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
    for name, what in lacking(placed).items():
        raise ConfigError(
            f"{name}: the adapter lacks {what}: give rederive=True (--rederive) with the very "
            "base it was made for, or convert the adapter where it was made "
            "(path_initial_model_for_weight_conversion)"
        )
