"""One batch, each of its rows with an adapter of its own, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np

from peft_any import parts as several
from peft_any._typing import Array
from peft_any.adapter import Adapter
from peft_any.backend import (
    astype,
    creation_device,
    dtype_name,
    from_numpy_like,
    is_floating,
    namespace,
)
from peft_any.bound import BoundLayer, Layers
from peft_any.errors import ConfigError, ShapeError, nearest
from peft_any.layer import EXPERTS, Dense, Site, check_input
from peft_any.layout import layout
from peft_any.method import Additive, Tuner
from peft_any.parts import Once

BASE = "__base__"
"""Hugging Face PEFT's name for a row without an adapter; None says the same."""
SMALL = 1 << 20
"""How many numbers the factors of all rows may be for the stacked path to be quicker."""


def factored(config: Tuner, site: Site) -> bool:
    """Whether a method adds a product of small factors, and applies it as that."""
    return (
        isinstance(config, Additive)
        and type(config).factors is not Additive.factors
        and type(config).forward is Additive.forward
        and site.kind not in EXPERTS
    )


def factors_of(layer: BoundLayer) -> dict[str, Array] | None:
    """Give a layer's factors a (k, width) and b (n_out, k), its gain and shift (n_out,), if any.

    Returns
    -------
    dict or None
        Empty for a layer without adapters; None where it has no such form.
    """
    ready, base = layer.ready
    if not ready:
        return {}
    part = ready[0]
    if len(ready) > 1 or part.weight != 1.0 or part.noise is not None:
        return None
    if not isinstance(part.config, Additive) or not factored(part.config, base.site):
        return None
    b, a = part.config.factors(part.params, base.site)
    more = {
        "gain": part.config.gain(part.params, base),
        "shift": part.config.bias_delta(part.params, base.site),
    }
    return {"a": a, "b": b} | {name: array for name, array in more.items() if array is not None}


def alike(found: Sequence[Mapping[str, Array]], base: Dense, rank: int) -> list[dict[str, Array]]:
    """Pad factors to one rank with zeros, and give those without a gain or shift one of no effect.

    Parameters
    ----------
    found : sequence of mappings
        As `factors_of` gives them.
    base : Dense
        In the compute dtype.
    rank : int
    """
    w = base.weight
    xp = namespace(w, *(array for f in found for array in f.values()))
    n_out, width = w.shape
    kinds = {name for f in found for name in f}

    def zeros(*shape: int) -> Array:
        return xp.zeros(shape, dtype=w.dtype, device=creation_device(w))  # type: ignore[no-any-return]

    made = []
    for f in found:
        have = int(f["a"].shape[0]) if f else 0
        a, b = ([f["a"]], [f["b"]]) if f else ([], [])
        if have < rank or not f:
            a, b = [*a, zeros(rank - have, width)], [*b, zeros(n_out, rank - have)]
        row = {"a": xp.concat(a, axis=0), "b": xp.concat(b, axis=1)}
        if "gain" in kinds:
            row["gain"] = f["gain"] if "gain" in f else zeros(n_out) + 1.0
        if "shift" in kinds:
            row["shift"] = f["shift"] if "shift" in f else zeros(n_out)
        made.append(row)
    return made


def applied(x: Array, base: Dense, rows: Mapping[str, Array]) -> Array:
    """Apply a layer to rows of which each has factors of its own: two batched products.

    Parameters
    ----------
    x : array (rows, …, width)
    base : Dense
    rows : mapping
        a (rows, k, width), b (rows, n_out, k), and perhaps gain and shift (rows, n_out).

    Returns
    -------
    array (rows, …, n_out)
        bᵢ·aᵢ·xᵢ + shiftᵢ beside the base, the whole but for the bias times gainᵢ.
    """
    xp = namespace(x, base.weight, rows["a"])
    n = x.shape[0]
    y = base(x)
    flat = xp.reshape(x, (n, -1, x.shape[-1])) if x.ndim != 3 else x
    low = xp.matmul(flat, xp.matrix_transpose(rows["a"]))
    y = y + xp.reshape(xp.matmul(low, xp.matrix_transpose(rows["b"])), y.shape)
    lead = (n, *(1,) * (x.ndim - 2), base.weight.shape[0])
    if "shift" in rows:
        y = y + xp.reshape(rows["shift"], lead)
    if "gain" in rows:
        gain = xp.reshape(rows["gain"], lead)
        y = y * gain if base.bias is None else (y - base.bias) * gain + base.bias
    return y  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MixedLayer:
    """A layer whose batch has an adapter of its own in each row.

    Attributes
    ----------
    layers : sequence of BoundLayer
        One for each adapter that some row has.
    rows : sequence of int
        Which of them each row of the batch takes.
    path : {"stacked", "grouped"} or None
        How: all rows at once, or the rows of each adapter together; by default by size.
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
        floating = is_floating(x)
        check_input(x, site)
        least = 2 if floating else 1
        if x.ndim < least or x.shape[0] != len(self.rows):
            raise ShapeError(
                f"{site.name}: an input of shape {tuple(x.shape)} cannot be a batch of "
                f"{len(self.rows)} rows: its first axis has one entry for each of rows=[…]"
            )
        if len(self.layers) == 1:
            return self.layers[0](x)
        ready = self._stacked if floating and self.path != "grouped" else None
        if ready is None and self.path == "stacked":
            raise ConfigError(
                f"{site.name}: these adapters cannot be stacked: each must add one product of "
                "factors to the same base; take the grouped path"
            )
        if ready is None:
            return self._grouped(x)
        base, rows = ready
        y: Array = astype(applied(astype(x, dtype_name(base.weight)), base, rows), dtype_name(x))
        return y

    @cached_property
    def _shared(self) -> Dense | None:
        """The widened base, if it is the same below all adapters."""
        first, wide = self.layers[0].base, [layer.ready[1] for layer in self.layers]
        same = all(
            layer.base.weight is first.weight
            and layer.base.bias is first.bias
            and dtype_name(base.weight) == dtype_name(wide[0].weight)
            for layer, base in zip(self.layers, wide, strict=True)
        )
        lifted = [base for base in wide if hasattr(namespace(base.weight), "lift")]
        return (lifted or wide)[0] if same else None

    @cached_property
    def _stacked(self) -> tuple[Dense, dict[str, Array]] | None:
        """The factors of every row, where that is possible and, unless asked for, small."""
        base = self._shared
        parts = [part for layer in self.layers for part in layer.ready[0]]
        if base is None or not all(factored(part.config, base.site) for part in parts):
            return None
        found = [factors_of(layer) for layer in self.layers]
        known = [f for f in found if f is not None]
        rank = max([1, *(int(f["a"].shape[0]) for f in known if f)])
        size = rank * sum(base.weight.shape) * len(self.rows)
        if len(known) < len(found) or (size > SMALL and self.path is None):
            return None
        each = alike(known, base, rank)
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


def taken(x: Array, rows: Sequence[int]) -> Array:
    """Take rows of an array; those that follow one another without a copy."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows), ...]
    xp = namespace(x)
    y: Array = xp.take(x, from_numpy_like(np.asarray(rows, dtype=np.int64), x), axis=0)
    return y


class BoundRows:
    """A model with its parameters fixed, whose batches have an adapter of their own in each row.

    It has no `weights` as `Bound` has: no single weight stands for a batch of several adapters.

    Parameters
    ----------
    model : PeftModel
    rows : sequence of str or None
        The adapter of each row; None or ``"__base__"`` for none.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any import LoraConfig, PeftModel
    >>> model = PeftModel({"fc.weight": np.ones((3, 4), dtype="float32")})
    >>> _ = model.add("fr", LoraConfig(r=2, target_modules=["fc"]))
    >>> bound = model.bind(rows=["fr", None])
    >>> bound.layers["fc"](np.ones((2, 4), dtype="float32")).shape
    (2, 3)
    """

    def __init__(self, model: Any, rows: Sequence[str | None]) -> None:
        if not rows or isinstance(rows, str):
            raise ConfigError(f"rows={rows!r}: give a list with one name, or None, for each row")
        self._rows = [None if name == BASE and BASE not in model else name for name in rows]
        wrong = [name for name in dict.fromkeys(self._rows) if name and name not in model]
        if wrong:
            raise ConfigError(
                f"rows: adapters {wrong} are not here{nearest(wrong[0], model.names)}"
            )
        self._lock = Lock()
        self._now = self._snapshot(model)

    def _snapshot(self, model: Any) -> tuple[Any, Layers]:
        names = [*dict.fromkeys(self._rows)]
        which = [names.index(name) for name in self._rows]
        alone = [model.alone(name) for name in names]
        adapted = {key: site for one in alone for key, site in one.sites().items()}

        def every() -> dict[str, Any]:
            return {**layout(model.weights, model.kinds), **adapted}

        def make(key: str) -> Any:
            site = adapted[key] if key in adapted else every()[key]
            return MixedLayer([one.bound_layer(site) for one in alone], which)

        return model, Layers(adapted, every, make)

    @property
    def layers(self) -> Layers:
        """The layers as they are now: whoever keeps this mapping sees no later `swap`.

        A forward pass that takes it once computes with one state of every adapter.
        """
        return self._now[1]

    @property
    def params(self) -> dict[str, Any]:
        """The trained arrays {adapter: {site: {name: array}}} of the rows' adapters."""
        model = self._now[0]
        return {name: model[name].trainable() for name in dict.fromkeys(self._rows) if name}

    def swap(self, name: str, new: Adapter | Mapping[str, Mapping[str, Array]]) -> None:
        """Put another adapter, or other arrays {site: {name: array}}, in an adapter's place.

        It is checked first, and other threads see either the old or the new one, whole.

        Raises
        ------
        ConfigError, ShapeError, TargetError
            If there is no such adapter, or the new one does not fit; nothing is changed then.
        """
        with self._lock:
            model = self._now[0].alone(None)
            if isinstance(new, Adapter):
                model.exchange(name, new)
            else:
                model.update({name: new})
            self._now = self._snapshot(model)
