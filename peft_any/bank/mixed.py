"""A layer whose batch has an adapter of its own in each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from peft_any import parts as several
from peft_any._typing import Array
from peft_any.backend import (
    astype,
    dtype_name,
    from_numpy_like,
    is_array,
    is_differentiated,
    is_floating,
    is_lazy,
    lasting,
    namespace,
    taken,
)
from peft_any.bank.factors import (
    TOGETHER,
    applied,
    even,
    factored,
    factors_of,
    few,
    finite,
    groups_of,
    joined,
    planned,
    stacked,
    total_rank,
)
from peft_any.bound import BoundLayer
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Dense, Site, check_input
from peft_any.method import Additive
from peft_any.parts import Once, Part


def check_rows(x: Array, site: Site, rows: int) -> None:
    """Refuse an input that is no batch of so many rows.

    Raises
    ------
    ShapeError
        Saying what it is.
    """
    check_input(x, site)
    least = 2 if is_floating(x) else 1
    if x.ndim < least or x.shape[0] != rows:
        raise ShapeError(
            f"{site.name}: an input of shape {tuple(x.shape)} cannot be a batch of "
            f"{rows} rows: its first axis has one entry for each of rows=[…]"
        )


def shared_base(layers: Sequence[BoundLayer]) -> Dense | None:
    """Give the widened base, if it is the same below all adapters."""
    first, wide = layers[0].base, [layer.ready[1] for layer in layers]
    same = all(
        layer.base.weight is first.weight
        and layer.base.bias is first.bias
        and dtype_name(base.weight) == dtype_name(wide[0].weight)
        for layer, base in zip(layers, wide, strict=True)
    )
    lifted = [base for base in wide if hasattr(namespace(base.weight), "lift")]
    return (lifted or wide)[0] if same else None


@dataclass(frozen=True, eq=False)
class MixedLayer:
    """A layer whose batch has an adapter of its own in each row.

    Attributes
    ----------
    layers : sequence of BoundLayer
        One for each adapter that some row has.
    rows : sequence of int
        Which of them each row of the batch takes.
    path : {"joined", "stacked", "grouped"} or None
        How: all rows with the factors of all adapters, of which each row keeps its own's, or the
        rows of each adapter with its factors in one batched product, or with its `forward` one
        adapter after the other; by default by size.
    """

    layers: Sequence[BoundLayer]
    rows: Sequence[int]
    path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_made", {})
        object.__setattr__(self, "_last", (None, None, None, None))

    @property
    def traced(self) -> bool:
        """Whether its arrays only stand for some, inside a transformation such as jit."""
        return any(layer.traced for layer in self.layers)

    @property
    def base(self) -> Dense:
        """The layer below the adapters."""
        return self.layers[0].base

    def __call__(self, x: Array) -> Array:
        """Apply the layer to x (rows, …, n_in), or to token numbers (rows, …) of an embedding.

        Raises
        ------
        ConfigError, ShapeError
            If it is a convolution, or `x` has another number of rows, or other columns.
        """
        kind, shape, dtype, call = self._last  # type: ignore[attr-defined]
        if type(x) is kind and x.shape == shape and x.dtype == dtype:
            return call(x)
        site, alone = self.base.site, len(self.layers) == 1
        if site.is_conv:
            return self.layers[0](x)  # which says why not
        check_rows(x, site, len(self.rows))
        ready = self._at_once(x) if is_floating(x) else None
        if ready is not None and not self._trained and dtype_name(x) == dtype_name(ready[0].weight):
            call = planned(x, *ready)
            if call is not None:
                object.__setattr__(self, "_last", (type(x), x.shape, x.dtype, call))
                return call(x)
        if alone:
            return self.layers[0](x)
        if ready is None and self.path in ("joined", "stacked"):
            raise ConfigError(
                f"{site.name}: these adapters cannot be {self.path}: each must add one product of "
                "factors to the same base; take the grouped path"
            )
        if ready is None:
            return self._grouped(x)
        base, rows = ready
        y: Array = applied(astype(x, dtype_name(base.weight)), base, rows)
        return astype(y, dtype_name(x))

    @cached_property
    def _shared(self) -> Dense | None:
        return shared_base(self.layers)

    def _at_once(self, x: Array) -> tuple[Dense, dict[str, Array]] | None:
        """The base and the factors of all rows, where that is possible and, by itself, quicker."""
        if self.path is not None:
            return None if self.path == "grouped" else self._ready(self.path)
        if len(self.layers) == 1 or (self._total <= TOGETHER and self._joins(x)):
            return self._ready("joined")
        if self._even and (ready := self._ready("stacked")) is not None:
            return ready
        few_enough = few(self._total, self.base.site, prod(x.shape[:-1]))
        return self._ready("joined") if few_enough and self._joins(x) else None

    def _joins(self, x: Array) -> bool:
        """Whether rows do not harm each other where all meet the factors of all adapters."""
        ready = self._ready("joined")
        # A slope by one adapter's factors reads all rows: an infinity times 0 is none.
        return ready is not None and not (is_differentiated(ready[1]["a"]) and not finite(x))

    @cached_property
    def _trained(self) -> bool:
        return any(layer.trained for layer in self.layers)

    @cached_property
    def _total(self) -> int:
        return total_rank(self.layers)

    @cached_property
    def _even(self) -> bool:
        return even(self.layers, self.rows)

    def _ready(self, path: str) -> tuple[Dense, dict[str, Array]] | None:
        """What a path needs: kept for all calls, but not what was made of trained arrays."""
        if path not in self._made:  # type: ignore[attr-defined]
            with lasting(self.base.weight):
                found = self._joined() if path == "joined" else self._stacked()
            if self._trained:
                return found
            self._made[path] = found  # type: ignore[attr-defined]
        return self._made[path]  # type: ignore[attr-defined]

    def _factors(self) -> tuple[Dense, list[dict[str, Array]]] | None:
        """The factors of every adapter, where each has some over the same base."""
        parts = [part for layer in self.layers for part in layer.ready[0]]
        if not all(factored(part.config, self.base.site) for part in parts):
            return None
        base, found = self._shared, [factors_of(layer) for layer in self.layers]
        known = [f for f in found if f is not None]
        return None if base is None or len(known) < len(found) else (base, known)

    def _joined(self) -> tuple[Dense, dict[str, Array]] | None:
        """The factors of all adapters side by side; unless asked for, where none is infinite."""
        ready = self._factors()
        if ready is None or not any(ready[1]):
            return None
        base, known = ready
        harmless = len(known) == 1 or finite(*(a for f in known for a in f.values()))
        return (base, joined(known, base, self.rows)) if self.path or harmless else None

    def _stacked(self) -> tuple[Dense, dict[str, Array]] | None:
        """The factors of all adapters, and where the rows of each go."""
        ready = None if is_lazy(self.base.weight) else self._factors()
        return None if ready is None else (ready[0], stacked(ready[1], ready[0], self.rows))

    @cached_property
    def _order(self) -> tuple[list[list[int]], list[int]]:
        """Rows by adapter, and where each row then is."""
        groups = groups_of(self.rows, len(self.layers))
        where = [0] * len(self.rows)
        for place, i in enumerate(i for group in groups for i in group):
            where[i] = place
        return groups, where

    def _grouped(self, x: Array) -> Array:
        groups, where = self._order
        floating, shared = is_floating(x), self._shared
        out = dtype_name(x if floating else self.base.weight)
        adds = [all(isinstance(p.config, Additive) for p in r.ready[0]) for r in self.layers]
        whole = None
        if shared is not None and any(adds):  # one product with the base for all that add to it
            wide = astype(x, dtype_name(shared.weight)) if floating else x
            whole = shared(wide)
        pieces = []
        for layer, group, additive in zip(self.layers, groups, adds, strict=True):
            own, base = layer.ready
            own = [routed(part, group, len(self.rows)) for part in own]
            some = some_of(x, group)
            if floating:
                some = astype(some, dtype_name(base.weight))
            below: Any = base
            if whole is not None and additive:
                below = Once(base, (some, some_of(whole, group)))
            y = several.forward(own, some, below, stacked=layer.stacked)
            pieces.append(astype(y, out))
        xp = namespace(*pieces)
        if hasattr(xp, "lift"):
            pieces = [xp.lift(piece) for piece in pieces]
        return some_of(xp.concat(pieces, axis=0), where)


def routed(part: Part, rows: Sequence[int], of: int) -> Part:
    """Give an adapter, of what a batch of `of` rows is routed by, what some rows have."""
    own = dict(part.params)
    for name in part.config.takes & own.keys():
        given = own[name]
        if isinstance(given, list | tuple) and len(given) == of:
            own[name] = [given[i] for i in rows]
        elif is_array(given) and given.ndim and given.shape[0] == of:
            own[name] = some_of(given, rows)
    return replace(part, params=own)


def some_of(x: Array, rows: Sequence[int]) -> Array:
    """Take rows of an array; those that follow one another without a copy."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows), ...]
    return taken(x, from_numpy_like(np.asarray(rows, dtype=np.int64), x))
