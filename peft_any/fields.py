"""What the fields of many configurations have in common: rules of values, and groups of fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from math import inf, isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from peft_any.arguments import misfit
from peft_any.errors import ConfigError


def default_of(field: Field[Any]) -> Any:
    """Give a field's default."""
    return field.default if field.default_factory is MISSING else field.default_factory()


class Rule(NamedTuple):
    """What a field's values must be: a part of its type, ``Annotated[int, Rule(…)]``."""

    holds: Callable[[Any], bool]
    text: str
    words: bool = False
    """Whether it lists the strings that a field takes."""


def within(low: float, high: float = inf) -> Rule:
    """Ask for numbers from `low` to `high`, both included.

    Examples
    --------
    >>> within(1).text, within(0, 1).text
    ('at least 1', 'from 0 to 1')
    """
    text = f"at least {low}" if high == inf else f"from {low} to {high}"
    return Rule(lambda value: low <= value <= high, text)


def among(names: Collection[str]) -> Rule:
    """Ask for one of `names`, where a table has them; else ``Literal`` says it."""
    return Rule(lambda value: value in names, f"one of {', '.join(names)}", words=True)


Count: TypeAlias = Annotated[int, within(1)]
"""A number of things, of which there is one at least."""
Rate: TypeAlias = Annotated[float, Rule(lambda value: 0 <= value < 1, "in [0, 1)")]
"""A rate of dropout."""
Share: TypeAlias = Annotated[float, Rule(lambda value: 0 <= value <= 1, "in [0, 1]")]
"""A part of a whole."""
Inside: TypeAlias = Annotated[float, Rule(lambda value: 0 < value < 1, "in (0, 1)")]
"""A part that is neither nothing nor all."""
Positive: TypeAlias = Annotated[float, Rule(lambda value: value > 0, "above 0")]


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which of the base's biases the adapter holds too, "none", "all" or those of its layers."""

    bias: str = "none"


@dataclass(frozen=True, kw_only=True)
class ByLayer:
    """Which of the model's layers, by their indices and the name before these, are adapted."""

    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


@dataclass(frozen=True, kw_only=True)
class Excludes:
    """Which modules are left alone, by their last parts or a regular expression."""

    exclude_modules: list[str] | str | None = None


@dataclass(frozen=True, kw_only=True)
class FanInFanOut:
    """Whether the weights are stored (n_in, n_out)."""

    fan_in_fan_out: bool = False


@cache
def rules(cls: type) -> tuple[tuple[str, Rule], ...]:
    """List the rules that the types of a configuration's fields say.

    Examples
    --------
    >>> from peft_any.methods.miss import MissConfig
    >>> [(name, rule.text) for name, rule in rules(MissConfig) if rule.words][1:]
    [('init_weights', 'true, false, "bat" or "mini"'), ('bias', '"none", "all" or "miss_only"')]
    """
    hints = get_type_hints(cls, include_extras=True)
    found = [(name, rule) for name, hint in hints.items() for rule in _rules_of(hint)]
    if issubclass(cls, Biases):
        own = f"{getattr(cls, 'prefix', '').partition('_')[0]}_only"
        said = f'"none", "all" or "{own}"'
        found.append(("bias", Rule(_names_biases, said, words=True)))
    return tuple(found)


def _names_biases(value: Any) -> bool:
    """Hugging Face PEFT takes any "…_only", and documents "fourier_only" and "MiSS_only"."""
    return str(value) in ("none", "all") or str(value).endswith("_only")


def check_words(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse strings of a file that are none of those which their fields take.

    Raises
    ------
    ConfigError
        As `check_rules`, beginning with `where`.
    """
    listed = {name for name, rule in rules(cls) if rule.words}
    try:
        check_rules(cls, {k: v for k, v in values.items() if k in listed and isinstance(v, str)})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_rules(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse values that break the rules of their fields.

    Raises
    ------
    ConfigError
        Naming the first field that is not fine, its value and its rule.

    Examples
    --------
    >>> from peft_any.methods.hra import HRAConfig
    >>> HRAConfig(r=0)
    Traceback (most recent call last):
    peft_any.errors.ConfigError: HRAConfig: r=0 must be at least 1
    """
    for name, rule in rules(cls):
        if name in values and not _holds(rule, values[name]):
            raise ConfigError(f"{cls.__name__}: {name}={values[name]!r} must be {rule.text}")


def check_types(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse values that are none of the types of their fields; where a list may be, any set may.

    Raises
    ------
    ConfigError
        Naming the first field that is not fine, its value and what it may be.

    Examples
    --------
    >>> from peft_any.methods.hra import HRAConfig
    >>> HRAConfig(apply_GS="yes")
    Traceback (most recent call last):
    peft_any.errors.ConfigError: HRAConfig: apply_GS='yes' cannot be taken: give True or False
    """
    for name, (hint, plain) in _types(cls).items():
        value = values.get(name)
        if name not in values or (type(value) in plain and type(value) is not float):
            continue
        if isinstance(value, float) and not isfinite(value):
            raise ConfigError(f"{cls.__name__}: {name}={value} must be a finite number")
        listed = [*value] if isinstance(value, tuple | set | frozenset) else value
        if why := misfit(name, listed, hint):
            raise ConfigError(f"{cls.__name__}: {why}")


@cache
def _types(cls: type) -> dict[str, tuple[Any, frozenset[Any]]]:
    """Give each field's type, and which of its parts are classes: an instance fits as it is."""
    hints = get_type_hints(cls, include_extras=True)
    plain = {
        name: frozenset(get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint])
        for name, hint in get_type_hints(cls).items()
    }
    return {f.name: (hints[f.name], plain[f.name]) for f in fields(cls)}


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except TypeError:  # no number
        return False


def _rules_of(hint: Any) -> list[Rule]:
    """Read the rules of a type; what one part of a union allows, it allows."""
    if get_origin(hint) is Annotated:
        return [rule for rule in get_args(hint)[1:] if isinstance(rule, Rule)]
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    bounds = [rule for part in parts if get_origin(part) is Annotated for rule in _rules_of(part)]
    if not words and not bounds:
        return []
    plain = tuple(part for part in parts if isinstance(part, type))

    def holds(value: Any) -> bool:
        if value in words or isinstance(value, plain):
            return True
        bound = bool(bounds) and not isinstance(value, str | None)
        return bound and all(rule.holds(value) for rule in bounds)

    said = [rule.text for rule in bounds] + ["true", "false"] * (bool in plain)
    said += [*map(json.dumps, words), *["null"] * (NoneType in plain)]
    text = " or ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    return [Rule(holds, text, bool(words))]
