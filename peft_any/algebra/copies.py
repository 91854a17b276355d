"""Full copies of tensors and rows of embeddings, when adapters that carry them are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_any._typing import Array, Params
from peft_any.algebra.written import Update
from peft_any.backend import (
    Backend,
    astype,
    dtype_name,
    from_numpy_like,
    move,
    namespace,
    to_numpy,
    widest,
)
from peft_any.errors import ShapeError, TargetError
from peft_any.extras import is_trained, within
from peft_any.layer import Dense
from peft_any.selection import saved_whole
from peft_any.surgery.measure import equal_bytes
from peft_any.surgery.sources import Given
from peft_any.tokens import token_indices, with_rows


@dataclass(frozen=True)
class Copies:
    """What a combination carries beside its method.

    Attributes
    ----------
    extra, tokens : dict of str to array
        As an `Adapter` has them.
    fields : dict
        Configuration fields that go with them.
    owners : dict of str to tuple of str
        The adapters that each comes from.
    """

    extra: Params = field(default_factory=dict)
    tokens: Params = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)


def combined_copies(
    given: Sequence[Given], view: Mapping[str, Any] | None, backend: Backend
) -> Copies:
    """Combine what adapters carry beside their method.

    A copy is a new value v and no change, so its share in a weighted sum is w·(v − base). With
    the base this is computed. Without it, what one adapter alone carries is taken over if its
    weight is 1 and anything else is refused. Tensors that were saved along without being
    trained are taken over if all adapters have the same.

    Parameters
    ----------
    given : sequence of Given
    view : mapping of str to array, optional
        The base.
    backend : Backend
        Where the result goes.

    Raises
    ------
    TargetError
        Listing what cannot be combined without the base.
    ShapeError
        If copies do not have the base's shape.
    """
    owners: dict[str, list[Given]] = {}
    for one in given:
        rows = (f"{module}.weight" for module in one.adapter.tokens)
        for name in dict.fromkeys((*one.adapter.extra, *rows)):
            owners.setdefault(name, []).append(one)
    extra: Params = {}
    tokens: Params = {}
    indices: dict[str, list[int]] = {}
    faults = []
    for name, having in owners.items():
        module = name.removesuffix(".weight")
        rows_only = all(name not in one.adapter.extra for one in having)
        if len(having) == 1 and having[0].weight == 1.0:
            adapter = having[0].adapter
            if name in adapter.extra:
                extra[name] = move(adapter.extra[name], backend)
            if module in adapter.tokens:
                indices[module] = token_indices(adapter.config, module)
                tokens[module] = move(adapter.tokens[module], backend)
        elif _along(name, having):
            extra[name] = move(having[0].adapter.extra[name], backend)
        elif view is None:
            faults.append(f"{name}: {_why(having)}")
        elif name not in view or name in getattr(view, "grown", ()):
            raise ShapeError(
                f"{name}: {' and '.join(one.label for one in having)}: new values of it cannot be "
                "weighted or summed: the base has no tensor of this size"
            )
        elif rows_only:
            indices[module], tokens[module] = _rows(module, having, view[name], backend)
        else:
            extra[name] = _full(name, having, view[name], backend)
    if faults:
        raise TargetError(
            "\n".join(faults) + "\ngive base= (--base), with which the sum of the changes is known"
        )
    by = {name: tuple(one.label for one in having) for name, having in owners.items()}
    return Copies(extra, tokens, _fields(given, extra, indices), by)


def folded(
    copies: Copies, given: Sequence[Given], updates: Sequence[Update]
) -> tuple[Copies, list[Update]]:
    """Add changes of layers that an adapter carries whole to the copies: no file holds both.

    Raises
    ------
    TargetError
        If one adapter changes all rows of an embedding, and another some.
    """
    extra, rest = dict(copies.extra), []
    if both := [u.site.name for u in updates if u.site.name in copies.tokens]:
        raise TargetError(
            f"{', '.join(both)}: one adapter adapts it and another brings new rows of it, which no "
            "file can hold at once: merge them into the base together (merge_checkpoint)"
        )
    for update in updates:
        site, name = update.site, update.site.weight
        if name not in extra or not any(_whole(one, name) for one in given):
            rest.append(update)
            continue
        layer = Dense.of(widest(extra[name]), extra.get(site.bias_name), site)
        u, v = map(widest, update.factors)
        new = layer.replace(weight=layer.weight + update.scale * (u @ v)).stored()
        extra[name] = astype(new, dtype_name(extra[name]))
        if update.bias is not None:
            bias = layer.sure_bias
            extra[site.bias_name] = astype(widest(bias) + update.bias, dtype_name(bias))
    return replace(copies, extra=extra), rest


def _whole(given: Given, name: str) -> bool:
    adapter = given.adapter
    return name in adapter.extra and within(name, saved_whole(adapter.config))


def _along(name: str, having: Sequence[Given]) -> bool:
    """Whether a tensor was saved along by all, untrained and the same."""
    copies = [one.adapter.extra.get(name) for one in having]
    trained = (is_trained(o.adapter.config, name) for o in having)
    rows = (name.removesuffix(".weight") in one.adapter.tokens for one in having)
    if any(c is None for c in copies) or any(trained) or any(rows):
        return False
    first, *others = (to_numpy(c) for c in copies)
    return all(equal_bytes(first, other) for other in others)


def _why(having: Sequence[Given]) -> str:
    labels = " and ".join(one.label for one in having)
    if len(having) > 1:
        return f"{labels} carry new values of it, which cannot be summed without the base"
    return f"{labels} carries a new value of it, which cannot be weighted by {having[0].weight:g}"


def _full(name: str, having: Sequence[Given], base: Array, backend: Backend) -> Array:
    """base + Σ w·(v − base), in the first copy's dtype."""
    base = widest(move(base, backend))
    total, dtype = base, "float32"
    for one in having:
        copy = one.adapter.extra.get(name)
        new: Any = base
        if copy is not None:
            dtype = dtype_name(copy)
            new = widest(move(copy, backend))
            if tuple(new.shape) != tuple(base.shape):
                raise ShapeError(
                    f"{name}: {one.label}'s copy of shape {tuple(new.shape)} cannot be summed with "
                    f"the base's {tuple(base.shape)}"
                )
        module = name.removesuffix(".weight")
        if module in one.adapter.tokens:
            rows = move(one.adapter.tokens[module], backend)
            new = with_rows(new, rows, token_indices(one.adapter.config, module))
        total = total + one.weight * (new - base)
    summed: Array = astype(total, dtype)
    return summed


def _rows(
    module: str, having: Sequence[Given], base: Array, backend: Backend
) -> tuple[list[int], Array]:
    """Give the rows that any of the adapters has, summed as changes of the base's rows."""
    of = {one.label: token_indices(one.adapter.config, module) for one in having}
    every = sorted({i for listed in of.values() for i in listed})
    table = move(base, backend)
    if every and every[-1] >= table.shape[0]:
        raise ShapeError(f"{module}: row {every[-1]} cannot be in a table of {table.shape[0]}")
    xp = namespace(table)
    old = widest(xp.take(table, from_numpy_like(every, table), axis=0))
    total, dtype = old, "float32"
    for one in having:
        rows = move(one.adapter.tokens[module], backend)
        dtype = dtype_name(rows)
        places = [every.index(i) for i in of[one.label]]
        total = total + one.weight * (with_rows(old, widest(rows), places) - old)
    return every, astype(total, dtype)


def _fields(
    given: Sequence[Given], extra: Params, indices: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Say in the configuration what the file holds."""
    configs: list[Any] = [one.adapter.config for one in given]
    saved = [m for c in configs for m in c.modules_to_save or ()]
    biases = {getattr(c, "bias", "none") for c in configs} - {"none"}
    fields: dict[str, Any] = {}
    if saved and extra:
        fields["modules_to_save"] = list(dict.fromkeys(saved))
    if biases and any(name.endswith("bias") for name in extra):
        fields["bias"] = "all" if "all" in biases else "lora_only"
    if indices:
        fields["trainable_token_indices"] = dict(indices)
    return fields
