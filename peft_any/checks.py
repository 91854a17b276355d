"""Checks of configuration fields that many methods share."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any, Final

from peft_any._typing import Shape
from peft_any.errors import ConfigError

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
