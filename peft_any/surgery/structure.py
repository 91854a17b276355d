"""What adapters change at a layer, as far as it is known without reading the base."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_any._typing import Params
from peft_any.backend import astype, is_floating, to_numpy
from peft_any.layer import EXPERTS, Site
from peft_any.method import Additive, Tuner
from peft_any.parts import Part
from peft_any.receipt import Host

_FACTORS = 64
"""The most columns of a product that is formed block by block, not as the method has it."""


class _Read(Exception):  # noqa: N818 - says what happened, and is caught here
    """The base was asked for."""


class _Unread:
    """A layer of which only the site is known."""

    def __init__(self, site: Site) -> None:
        self.site, self.bias, self.original_bias, self.adapted = site, None, None, False

    @property
    def weight(self) -> Host:
        raise _Read

    original = weight

    def __call__(self, x: Any) -> Any:  # noqa: ARG002 - a layer's
        raise _Read


def prepared(part: Part, site: Site) -> Params:
    """Compute once what depends on the parameters alone; what reads the base is left."""
    try:
        return part.config.prepare(part.params, _Unread(site))
    except _Read:
        return part.params


def cast(params: Params, name: str) -> Params:
    """Bring the floating parameters to a dtype."""
    return {k: astype(a, name) if is_floating(a) else a for k, a in params.items()}


def is_product(parts: list[Part], site: Site) -> bool:
    """Whether all that adapters add is a product of small factors."""
    found = 0
    for part in parts:
        config = part.config
        if not isinstance(config, Additive) or scales(part, site) or site.kind in EXPERTS:
            return False
        if type(config).factors is Additive.factors:
            return False
        found += config.factors(part.params, site)[1].shape[0]
        if found > _FACTORS:
            return False
    return True


def is_scaled_product(parts: list[Part], site: Site) -> bool:
    """Whether an adapter adds a product of small factors and then multiplies the rows."""
    config, *others = (part.config for part in parts)
    return (
        not others
        and parts[0].weight == 1
        and isinstance(config, Additive)
        and type(config).factors is not Additive.factors
        and scales(parts[0], site)
        and config.factors(parts[0].params, site)[1].shape[0] <= _FACTORS
    )


def is_turned(parts: list[Part]) -> bool:
    """Whether an adapter may multiply the rows by blocks, and does nothing else."""
    config, *others = (part.config for part in parts)
    return not others and parts[0].weight == 1 and type(config).blockwise is not Tuner.blockwise


def product(parts: list[Part], site: Site) -> tuple[Host, Host]:
    """Give factors of the sum of what adapters add, in float64."""
    pairs: list[tuple[Host, Host]] = []
    for part in parts:
        config: Any = part.config
        u, v = map(to_numpy, config.factors(cast(part.params, "float64"), site))
        pairs.append((u if part.weight == 1 else part.weight * u, v))
    u, v = pairs[0]
    if len(pairs) > 1:
        u, v = (np.concatenate(some, axis=1 - i) for i, some in enumerate(zip(*pairs, strict=True)))
    return (v.T, u.T) if site.kind in ("Conv1D", "Embedding") else (u, v)


def scales(part: Part, site: Site) -> bool:
    """Whether a method multiplies its rows by a gain."""
    config = part.config
    try:
        return (
            not isinstance(config, Additive) or config.gain(part.params, _Unread(site)) is not None
        )
    except _Read:
        return True
