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
    namespace,
)
from peft_any.bank.factors import (
    alike,
    applied,
    factored,
    factors_of,
    few,
    finite,
    joined,
    small,
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
        How: all rows with the factors of all adapters, of which each row keeps its own's, or each
        with its own, or the rows of each adapter together; by default by size.
    """

    layers: Sequence[BoundLayer]
    rows: Sequence[int]
    path: str | None = None

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
        site = self.base.site
        if site.is_conv:
            return self.layers[0](x)  # which says why not
        check_rows(x, site, len(self.rows))
        floating = is_floating(x)
        if len(self.layers) == 1:
            return self.layers[0](x)
        ready = self._at_once(x) if floating else None
        if ready is None and self.path in ("joined", "stacked"):
            raise ConfigError(
                f"{site.name}: these adapters cannot be {self.path}: each must add one product of "
                "factors to the same base; take the grouped path"
            )
        if ready is None:
            return self._grouped(x)
        base, rows = ready
        y: Array = astype(applied(astype(x, dtype_name(base.weight)), base, rows), dtype_name(x))
        return y

    @cached_property
    def _shared(self) -> Dense | None:
        return shared_base(self.layers)

    def _at_once(self, x: Array) -> tuple[Dense, dict[str, Array]] | None:
        """The base and the factors of all rows, where that is possible and, by itself, quicker."""
        if self.path == "joined":
            return self._joined
        if self.path is None and few(self._total, self.base.site, prod(x.shape[:-1])):
            ready = self._joined
            # A slope by one adapter's factors reads all rows: an infinity times 0 is none.
            if ready is not None and not (is_differentiated(ready[1]["a"]) and not finite(x)):
                return ready
        return None if self.path == "grouped" else self._stacked

    @cached_property
    def _total(self) -> int:
        return total_rank(self.layers)

    @cached_property
    def _factors(self) -> tuple[Dense, list[dict[str, Array]]] | None:
        """The factors of every adapter, where each has some over the same base."""
        parts = [part for layer in self.layers for part in layer.ready[0]]
        if not all(factored(part.config, self.base.site) for part in parts):
            return None
        base, found = self._shared, [factors_of(layer) for layer in self.layers]
        known = [f for f in found if f is not None]
        return None if base is None or len(known) < len(found) else (base, known)

    @cached_property
    def _joined(self) -> tuple[Dense, dict[str, Array]] | None:
        """The factors of all adapters side by side; unless asked for, where none is infinite."""
        if self._factors is None:
            return None
        base, known = self._factors
        if not any(known) or (
            self.path is None and not finite(*(a for f in known for a in f.values()))
        ):
            return None
        return base, joined(known, base, self.rows)

    @cached_property
    def _stacked(self) -> tuple[Dense, dict[str, Array]] | None:
        """The factors of every row, where that is possible and, unless asked for, small."""
        if self.path is None and not small(self.layers, len(self.rows)):
            return None
        if self._factors is None:
            return None
        base, known = self._factors
        each = alike(known, base)
        xp = namespace(base.weight, *(array for f in each for array in f.values()))
        return base, {n: xp.stack([each[i][n] for i in self.rows], axis=0) for n in each[0]}

    @cached_property
    def _order(self) -> tuple[list[list[int]], list[int]]:
        """Rows by adapter, and where each row then is."""
        groups = [[i for i, k in enumerate(self.rows) if k == n] for n in range(len(self.layers))]
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
            some = taken(x, group)
            if floating:
                some = astype(some, dtype_name(base.weight))
            below: Any = base
            if whole is not None and additive:
                below = Once(base, (some, taken(whole, group)))
            y = several.forward(own, some, below, stacked=layer.stacked)
            pieces.append(astype(y, out))
        xp = namespace(*pieces)
        if hasattr(xp, "lift"):
            pieces = [xp.lift(piece) for piece in pieces]
        return taken(xp.concat(pieces, axis=0), where)


def routed(part: Part, rows: Sequence[int], of: int) -> Part:
    """Give an adapter, of what a batch of `of` rows is routed by, what some rows have."""
    own = dict(part.params)
    for name in part.config.takes & own.keys():
        given = own[name]
        if isinstance(given, list | tuple) and len(given) == of:
            own[name] = [given[i] for i in rows]
        elif is_array(given) and given.ndim and given.shape[0] == of:
            own[name] = taken(given, rows)
    return replace(part, params=own)


def taken(x: Array, rows: Sequence[int]) -> Array:
    """Take rows of an array; those that follow one another without a copy."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows), ...]
    xp = namespace(x)
    y: Array = xp.take(x, from_numpy_like(np.asarray(rows, dtype=np.int64), x), axis=0)
    return y
