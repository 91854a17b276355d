"""Checks of configuration fields that many methods share."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any, Final

from peft_any._typing import Shape
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Site

OURS: Final = "peft_any"
"""What a field says in a file with arrays that Hugging Face PEFT's lacks: it refuses the value."""


def refuse(config: Any, **rules: tuple[bool, str]) -> None:
    """Refuse fields that break their rules.

    Parameters
    ----------
    config : Config
    **rules : (bool, str)
        For each field, whether its value is fine, and what it must be.

    Raises
    ------
    ConfigError
        Naming the first field that is not fine, its value and its rule.
    """
    for name, (fine, rule) in rules.items():
        if not fine:
            raise ConfigError(f"{config.where}: {name}={getattr(config, name)!r} must be {rule}")


def check_site(config: Any, site: Site) -> None:
    """Refuse a layer of a kind, or a convolution of a kernel, that a method does not support.

    Raises
    ------
    ConfigError, ShapeError
    """
    if site.kind not in config.kinds:
        raise ConfigError(
            f"{site.name}: {config.peft_type} cannot adapt a {site.kind} layer: it supports "
            f"{', '.join(sorted(config.kinds))}; leave it out of target_modules"
        )
    uneven = config.kernels == "square" and len({*site.kernel}) > 1
    if config.kernels != "any" and (site.groups > 1 or uneven):
        raise ShapeError(
            f"{site.name}: {config.peft_type} cannot adapt a convolution with kernel {site.kernel} "
            f"and {site.groups} groups: it needs one group, whose channels all are read"
            f"{', and equal sides' * (config.kernels == 'square')}; leave it out of target_modules"
        )


def check_divides(
    name: str, value: int, site: Site, *, inputs: bool = True, outputs: bool = True
) -> None:
    """Refuse a field's value that does not divide a layer's inputs, outputs or both.

    Raises
    ------
    ShapeError
        Naming the layer, the field and the sizes.
    """
    sizes = {"inputs": site.n_in} if inputs else {}
    sizes |= {"outputs": site.n_out} if outputs else {}
    if any(size % value for size in sizes.values()):
        said = " and ".join(f"{size} {what}" for what, size in sizes.items())
        of = "a divisor of both" if len(sizes) > 1 else "a divisor"
        raise ShapeError(f"{site.name}: {name}={value} cannot divide {said}: give {of}")


def alike(found: Mapping[str, Shape], said: Mapping[str, Shape]) -> bool:
    """Whether arrays have the names and shapes that `Tuner.shapes` says; −1 is any size.

    Examples
    --------
    >>> alike({"a": (3, 4)}, {"a": (-1, 4)}), alike({"a": (3,)}, {"a": (-1, 4)})
    (True, False)
    """
    return found.keys() == said.keys() and all(
        len(shape) == len(said[name])
        and all(b in (a, -1) for a, b in zip(shape, said[name], strict=True))
        for name, shape in found.items()
    )


def finite_number(name: str, weight: Any) -> float:
    """Give an adapter's weight as a number; refuse what is none, and what is not finite."""
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = nan
    if not isfinite(number):
        raise ConfigError(f"adapter {name!r}: {weight!r} cannot be a weight: give a finite number")
    return number


def refuse_restart(config: Any, name: str) -> None:
    """Refuse to start an adapter anew of a file's configuration that has its arrays for a start."""
    for field in filter(None, (*config.marks, config.begun)):
        if (value := getattr(config, field)) == OURS:
            raise ConfigError(
                f"{name}: {field}={value!r} cannot start anew: it says that a file holds the "
                "frozen arrays; give another value"
            )
