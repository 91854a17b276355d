"""A layer whose rows' adapters are numbers in an array, which a traced function may be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft_any._typing import Array
from peft_any.backend import astype, dtype_name, is_floating, lasting, namespace
from peft_any.bank.factors import alike, applied, factors_of
from peft_any.bank.mixed import check_rows, shared_base
from peft_any.bound import BoundLayer
from peft_any.layer import Dense


@dataclass(frozen=True, eq=False)
class StackedLayer:
    """A layer with all adapters of a bank: whoever calls it says which row takes which.

    Those that add a product of factors stand stacked, of one rank, for two batched products with
    the rows' own. Any other computes all rows, of which its own are taken.

    Attributes
    ----------
    layers : sequence of BoundLayer
        That of no adapter, and one for each adapter of the bank.
    """

    layers: Sequence[BoundLayer]

    @property
    def traced(self) -> bool:
        """Whether its arrays only stand for some, inside a transformation such as jit."""
        return any(layer.traced for layer in self.layers)

    @property
    def base(self) -> Dense:
        """The layer below the adapters."""
        return self.layers[0].base

    @cached_property
    def _shared(self) -> list[Dense | None]:
        return [shared_base([self.layers[0], layer]) for layer in self.layers]

    @property
    def _stack(self) -> tuple[Dense, dict[str, Array], list[int]]:
        """The widened base, the stacked factors, and the adapters that have none.

        Kept for all calls, but not what was made of trained arrays.
        """
        return self._made() if any(layer.trained for layer in self.layers) else self._kept

    @cached_property
    def _kept(self) -> tuple[Dense, dict[str, Array], list[int]]:
        with lasting(self.base.weight):
            return self._made()

    def _made(self) -> tuple[Dense, dict[str, Array], list[int]]:
        found = [factors_of(layer) for layer in self.layers]
        if is_embedding := self.base.site.kind == "Embedding":
            found = [{} if f is not None and not f else None for f in found]
        wide = [dtype_name(b.weight) for b in self._shared if b is not None]
        alone = [
            k
            for k, (f, b) in enumerate(zip(found, self._shared, strict=True))
            if f is None or b is None or dtype_name(b.weight) != wide[0]
        ]
        stacked = [{} if k in alone or f is None else f for k, f in enumerate(found)]
        lifted = [b for b in self._shared if b and hasattr(namespace(b.weight), "lift")]
        base = lifted[0] if lifted else self.layers[0].ready[1]
        if is_embedding or not any(stacked):
            return base, {}, alone
        each = alike(stacked, base)
        xp = namespace(base.weight, *(array for f in each for array in f.values()))
        return base, {n: xp.stack([f[n] for f in each], axis=0) for n in each[0]}, alone

    def __call__(self, x: Array, rows: Any) -> Array:
        """Apply the layer to x (rows, …, n_in), or to token numbers (rows, …) of an embedding.

        Parameters
        ----------
        x : array
        rows : integer array (rows,)
            The number of each row's adapter; a negative one for none. Where a number has no
            adapter the row comes out as NaN.

        Raises
        ------
        ConfigError, ShapeError
            If it is a convolution, or `x` has another number of rows, or other columns.
        """
        site = self.base.site
        if site.is_conv:
            return self.layers[0](x)  # which says why not
        check_rows(x, site, rows.shape[0])
        base, stack, alone = self._stack
        xp = namespace(x, rows, base.weight, *stack.values())
        count = len(self.layers) - 1
        if stack and is_floating(x):
            known = (rows >= 0) & (rows < count)
            which = xp.where(known, rows + 1, xp.zeros_like(rows))
            own = {name: xp.take(array, which, axis=0) for name, array in stack.items()}
            y = astype(applied(astype(x, dtype_name(base.weight)), base, own), dtype_name(x))
        else:
            y = self.layers[0](x)
        wide = xp.reshape(rows, (rows.shape[0], *(1,) * (y.ndim - 1)))
        own = xp.reshape(rows, (rows.shape[0], *(1,) * (x.ndim - 1)))
        for k in alone:
            # What no number of a row may harm, gradients included, sees no other row's.
            some = xp.where(own == k - 1, x, xp.zeros_like(x)) if k else x
            y = xp.where(wide == k - 1, self.layers[k](some), y)
        return xp.where(wide >= count, xp.full_like(y, float("nan")), y)


@dataclass(frozen=True, eq=False)
class DataLayer:
    """A stacked layer with the rows of one batch.

    Attributes
    ----------
    stacked : StackedLayer
    rows : integer array (rows,)
    """

    stacked: StackedLayer
    rows: Array

    @property
    def traced(self) -> bool:
        """Whether its arrays only stand for some, inside a transformation such as jit."""
        return True

    @property
    def base(self) -> Dense:
        """The layer below the adapters."""
        return self.stacked.base

    def __call__(self, x: Array) -> Array:
        """Apply the layer, as `StackedLayer` does."""
        return self.stacked(x, self.rows)
