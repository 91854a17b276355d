"""Adapters under other module names: the numbers that a configuration gives by name stay."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from peft_any.errors import UsageError
from peft_any.extras import within
from peft_any.layer import Site
from peft_any.method import Tuner
from peft_any.patterns import expression, is_parameter, matching
from peft_any.selection import out_projection, saved_whole
from peft_any.tokens import token_indices

A = TypeVar("A")
"""An `Adapter`."""
_ALPHA = ("lora_alpha", "alpha")


def modules(adapter: Any) -> list[str]:
    """List the modules that an adapter has anything for.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> modules(SimpleNamespace(sites={"q": {}}, extra={"head.bias": 0}, tokens={}))
    ['q', 'head']
    """
    found = [*adapter.sites, *(_module(name) for name in adapter.extra), *adapter.tokens]
    return [*dict.fromkeys(found)]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def renamed(adapter: A, rename: Callable[[str], str]) -> A:
    """Copy an adapter with other module names: `Adapter.renamed`.

    Raises
    ------
    UsageError
        If two modules, tensors or embeddings get the same name.
    """
    given: Any = adapter
    new = {name: rename(name) for name in modules(given)}
    config = given.config
    sites = _moved(given.sites, new)
    if isinstance(config, Tuner) and sites:
        config = with_numbers(config, {new[n]: Numbers(config, n) for n in given.sites})
    shared = _regrouped(given, new) if isinstance(config, Tuner) else given.shared
    tensors = {n: f"{new[_module(n)]}.{n.rpartition('.')[2]}".lstrip(".") for n in given.extra}
    changed = given.replace(
        config=config,
        sites=sites,
        shared=shared,
        extra=_moved(given.extra, tensors),
        tokens=_moved(given.tokens, {name: new[name] for name in given.tokens}),
        spare={},
    )
    done: A = changed.replace(config=_with_copies(given, changed, rename))
    return done


def _regrouped(adapter: Any, new: Mapping[str, str]) -> dict[str, Any]:
    """Name what groups of sites share after the sites' new names, where it is told by these."""
    config, shared = adapter.config, adapter.shared
    moved: dict[str, Any] = {}
    left = dict(shared)
    for name in adapter.sites if config.grouped else ():
        here, there = (config.shared_shapes([Site(n, 1, 1)]) for n in (name, new[name]))
        for old, key in zip(here, there, strict=True):
            left.pop(old, None)
            if old in shared and moved.setdefault(key, shared[old]) is not shared[old]:
                raise UsageError(
                    f"renamed: {new[name]}: would share {key} with sites that have another: names "
                    f"tell who shares it in {config.peft_type}, and {name} had {old}"
                )
    return {**left, **moved}


def _moved(values: Mapping[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
    counts = Counter(new[name] for name in values)
    twice = [name for name, n in counts.items() if n > 1]
    if twice:
        said = [
            f"{' and '.join(old for old in values if new[old] == name)} would both be {name!r}"
            for name in twice
        ]
        raise UsageError(
            "\n".join(f"renamed: {line}: two modules cannot get the same name" for line in said)
        )
    return {new[name]: value for name, value in values.items()}


class Numbers:
    """What a configuration says of one site by its name."""

    def __init__(self, config: Tuner, name: str) -> None:
        self.values: dict[str, Any] = {}
        self.mask: list[bool] | None = None
        self.feeds = False
        own: Any = config
        if hasattr(own, "kept"):
            self.mask = own.kept(name)
        elif hasattr(own, "rank_pattern"):
            alpha = next(field for field in _ALPHA if hasattr(own, field))
            weight = f"{name}.weight"
            apart = is_parameter(weight, getattr(own, "target_parameters", None) or ())
            key = weight if apart else name
            self.values = {
                "r": matching(own.rank_pattern, key, own.r),
                alpha: matching(own.alpha_pattern, key, getattr(own, alpha)),
            }
        feeds = getattr(own, "feedforward_modules", None)
        if isinstance(feeds, str):
            self.feeds = expression(feeds, "feedforward_modules").fullmatch(name) is not None
        elif feeds is not None:
            self.feeds = name.endswith(tuple(feeds))

    @classmethod
    def of(cls, config: Tuner, name: str, resolved: Any) -> Numbers:
        """Take rank and scale of a configuration that was resolved for the site."""
        numbers = cls(config, name)
        numbers.values = {field: getattr(resolved, field) for field in numbers.values}
        return numbers


def with_numbers(config: Tuner, numbers: Mapping[str, Numbers]) -> Tuner:
    """Give a configuration that targets exactly these sites, with these numbers at each."""
    names = list(numbers)
    changes: dict[str, Any] = {
        "target_modules": [n for n in names if n not in map(out_projection, names)]
    }
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            changes[field] = None
    if parameters := getattr(config, "target_parameters", None):
        stacks = [entry for entry in parameters if not entry.endswith(".weight")]
        changes["target_parameters"] = stacks or None  # matrices are named as modules
    for field, pattern in (("r", "rank_pattern"), *((a, "alpha_pattern") for a in _ALPHA)):
        found = {name: own.values[field] for name, own in numbers.items() if field in own.values}
        if found:
            common = Counter(found.values()).most_common(1)[0][0]
            changes |= {field: common, pattern: _patterns(found, common)}
    if getattr(config, "rank_pattern", None) and not isinstance(changes.get("r"), int):
        changes["rank_pattern"] = {f"{name}.lora_E": own.mask for name, own in numbers.items()}
    if getattr(config, "feedforward_modules", None) is not None:
        feeds = [name for name, own in numbers.items() if own.feeds]
        sure = not any(n.endswith(tuple(feeds)) for n in names if n not in feeds)
        changes["feedforward_modules"] = feeds if sure else "|".join(map(re.escape, feeds))
    return replace(config, **changes)


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    r"""Say by name what differs from the default: by the last part of names where that is enough.

    Examples
    --------
    >>> _patterns({"0.qkv": 24, "1.qkv": 24, "0.o": 8, "1.o": 4}, 8)
    {'qkv': 24, '^1\\.o': 4}
    """
    lasts: dict[str, set[Any]] = {}
    for name, value in values.items():
        lasts.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != default:
            found[re.escape(last) if len(lasts[last]) == 1 else f"^{re.escape(name)}"] = value
    return found


def _with_copies(before: Any, after: Any, rename: Callable[[str], str]) -> Any:
    """Give the configuration that lists copies and rows of embeddings by their new names."""
    old, config = before.config, after.config
    changes: dict[str, Any] = {}
    entries = saved_whole(old)
    kept = [e for e in old.modules_to_save or [] if not any(within(n, [e]) for n in before.extra)]
    listed = [_entry(name, entries, rename) for name in before.extra if within(name, entries)]
    implied = saved_whole(replace(config, modules_to_save=None))
    if old.modules_to_save or not {*listed} <= {*implied}:
        changes["modules_to_save"] = [*dict.fromkeys([*listed, *kept])]
    rows = getattr(old, "trainable_token_indices", None)
    if isinstance(rows, Mapping) and before.tokens:
        changes["trainable_token_indices"] = {
            rename(module): token_indices(old, module) for module in before.tokens
        }
    return replace(config, **changes) if changes else config


def _entry(tensor: str, entries: list[str], rename: Callable[[str], str]) -> str:
    """Say how `modules_to_save` lists the module of a copy under its new name."""
    entry = next(e for e in entries if within(tensor, [e]))
    parts = tensor.split(".")[:-1]
    above = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    top = rename(next(module for module in above if module.endswith(entry)))
    return entry if top.endswith(entry) else top
