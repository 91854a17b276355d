"""Repeating the layers of a base: the deeper model that a LoRA's `layer_replication` asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from peft_any._typing import Array
from peft_any.arguments import checked
from peft_any.backend import is_lazy, is_traced, to_numpy
from peft_any.errors import BackendError, ConfigError, TargetError, nearest

Layers: TypeAlias = Sequence[Sequence[int]]
"""Runs of layers [start, end), end excluded: ``[[0, 4], [2, 5]]``."""

_KNOWN = re.compile(
    r"((?:model\.)*layers|(?:model\.)*(?:bert\.)?encoder\.layer|(?:(?:model|transformer)\.)*h)"
    r"\.(\d+)\."
)
"""Where Hugging Face PEFT looks for the layers: of Llama, BERT and Falcon, and the like."""
_ANY = re.compile(r"(.*?)\.(\d+)\.")


class Replicated(Mapping[str, Array]):
    """A base with layers repeated: a view, in which copies are the same arrays.

    Attributes
    ----------
    weights : mapping of str to array
        The base.
    origins : dict of str to str
        The deeper model's tensors, in its order, and the base's behind them.
    """

    def __init__(self, weights: Mapping[str, Array], origins: Mapping[str, str]) -> None:
        self.weights, self.origins = weights, dict(origins)

    def __getitem__(self, name: str) -> Array:
        return self.weights[self.origins[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)


@checked
def replicate_layers(
    weights: Mapping[str, Array], layer_replication: Layers, *, stack: str | None = None
) -> Replicated:
    """Build the deeper model that `layer_replication` means, without copying an array.

    Parameters
    ----------
    weights : mapping of str to array
        The base; nothing of it is read.
    layer_replication : sequence of (start, end)
        Runs of the base's layers, `end` excluded, one after the other.
    stack : str, optional
        What the layers are in: ``"model.language_model.layers"``. By default ``layers``, below
        any number of ``model``, ``encoder.layer`` or ``h``, where Hugging Face PEFT finds them.

    Returns
    -------
    Mapping of str to array
        In the order of a `state_dict`: the layers from the first to the last.

    Raises
    ------
    ConfigError
        If a run is not one of the base's layers.
    TargetError
        If the base has no such stack, or not all layers of it.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {f"model.layers.{i}.fc.weight": np.full(2, i) for i in range(3)}
    >>> repeated = replicate_layers(weights | {"norm": np.full(2, 9)}, [[0, 2], [1, 3]])
    >>> [int(w[0]) for w in repeated.values()]
    [0, 1, 1, 2, 9]
    """
    return Replicated(weights, origins(weights, layer_replication, stack))


def origins(names: Iterable[str], runs: Layers, stack: str | None = None) -> dict[str, str]:
    """Tell for every tensor of the deeper model which one of the base it is.

    Raises
    ------
    ConfigError, TargetError
        As `replicate_layers`.

    Examples
    --------
    >>> origins(["h.0.w", "h.1.w"], [[1, 2], [0, 2]])
    {'h.0.w': 'h.1.w', 'h.1.w': 'h.0.w', 'h.2.w': 'h.1.w'}
    """
    names = [*names]
    place, layers = stack_of(names, stack)
    order = _order(runs, len(layers), f"layer_replication={_plain(runs)}", place)
    found: dict[str, str] = {}
    begun = False
    for name in names:
        if _layer(name, place) is None:
            found[name] = name
        elif not begun:
            begun = True
            for new, old in enumerate(order):
                for one in layers[old]:
                    found[f"{place}.{new}.{one[len(f'{place}.{old}.') :]}"] = one
    return found


def stack_of(names: Sequence[str], stack: str | None = None) -> tuple[str, list[list[str]]]:
    """Find the stack of layers among tensors' names.

    Returns
    -------
    (str, list of list of str)
        What the layers are in, and the tensors of each.

    Raises
    ------
    TargetError
        If there is none, several, or layers are missing.

    Examples
    --------
    >>> stack_of(["model.layers.0.w", "model.layers.1.w", "model.norm.weight"])
    ('model.layers', [['model.layers.0.w'], ['model.layers.1.w']])
    """
    known, every = _stacks(names)
    if stack is None and len(known) != 1:
        found = ", ".join(known or every) or "none"
        raise TargetError(
            f"stack: the base's layers cannot be found: they are looked for in layers, "
            f"encoder.layer and h, and the base has {found}: say which it is: "
            'stack="model.language_model.layers" (--stack)'
        )
    place = next(iter(known)) if stack is None else stack
    layers: dict[int, list[str]] = {}
    for name in names:
        if (index := _layer(name, place)) is not None:
            layers.setdefault(index, []).append(name)
    if not layers:
        raise TargetError(f"{place}: the base has no such layers{nearest(place, every)}")
    lost = sorted(set(range(max(layers) + 1)) - layers.keys())
    if lost:
        raise TargetError(
            f"{place}: the base lacks the layers {lost} of {max(layers) + 1}: give all its shards"
        )
    return place, [layers[i] for i in range(len(layers))]


def refuse_unrepeated(config: Any, weights: Mapping[str, Any]) -> None:
    """Refuse a base whose layers are not repeated as an adapter's configuration asks for.

    Raises
    ------
    ConfigError
        With the command that makes the deeper base.
    """
    runs = getattr(config, "layer_replication", None)
    if not runs:
        return
    what = f"{config.where}: layer_replication={_plain(runs):.200}"
    length = _length(runs, None, what, "")
    known, every = _stacks([*weights])
    found = {place: stack_of([*weights], place)[1] for place in known or every}
    place, layers = max(
        found.items(), key=lambda item: len(item[1]) == length, default=("the base", [])
    )
    spans = ",".join(f"{start}:{end}" for start, end in runs) if len(runs) <= 64 else "START:END,…"
    way = (
        f"repeat its layers first: peft-any replicate --base BASE --layers {spans} --out DEEPER "
        "(replicate_layers in Python)"
    )
    if len(layers) != length:
        raise ConfigError(
            f"{what} acts on a base of {length} layers, and {place} has {len(layers)}: {way}"
        )
    order = _order(runs, None, what, "")
    for new, old in enumerate(order):
        first = order.index(old)
        if first != new and _differ(weights, layers[first], layers[new]):
            raise ConfigError(
                f"{what} repeats layer {old} as {first} and {new}, and these differ in {place}: "
                f"the base has {len(layers)} layers of its own: {way}"
            )


def _stacks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """List what layers may be in: the places that Hugging Face PEFT knows, and all."""
    known = dict.fromkeys(hit[1] for name in names if (hit := _KNOWN.match(name)))
    every = dict.fromkeys(hit[1] for name in names if (hit := _ANY.match(name)))
    return [*known], [*every]


def _differ(weights: Mapping[str, Any], one: list[str], two: list[str]) -> bool:
    """Compare the first row of the first matrix of two layers, where that takes no computing."""
    for a, b in zip(one, two, strict=False):
        x, y = weights[a], weights[b]
        if len(x.shape) < 2:
            continue
        if x is y or is_lazy(x) or is_traced(x) or is_lazy(y) or is_traced(y):
            return False
        try:
            return bool((to_numpy(x[0, ...]) != to_numpy(y[0, ...])).any())
        except (BackendError, RuntimeError, TypeError):  # no values
            return False
    return False


def _length(runs: Layers, count: int | None, what: str, place: str) -> int:
    """Count the deeper model's layers, which may be more than any memory could list."""
    length = 0
    for run in runs:
        start, end = run if len(run) == 2 else (0, 0)
        if not 0 <= start < end or (count is not None and end > count):
            last = "" if count is None else f", of which {place} has {count}"
            raise ConfigError(
                f"{what}: {_plain([run])[1:-1]} is no run of layers{last}: give [start, end], end "
                "excluded"
            )
        length += end - start
    if not length:
        raise ConfigError(f"{what}: holds no layer: give runs of layers [[start, end], …]")
    return length


def _order(runs: Layers, count: int | None, what: str, place: str) -> list[int]:
    """Give the base's layers in the deeper model's order."""
    _length(runs, count, what, place)
    return [old for start, end in runs for old in range(start, end)]


def _layer(name: str, place: str) -> int | None:
    number, dot, _ = name.removeprefix(f"{place}.").partition(".")
    inside = name.startswith(f"{place}.") and dot and number.isdigit()
    return int(number) if inside else None


def _plain(runs: Layers) -> str:
    return str([[*run] for run in runs])
