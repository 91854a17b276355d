"""New values of one touched tensor by blocks of its rows, in double precision, rounded once."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from math import prod
from threading import local
from typing import Any, TypeAlias

import numpy as np

from peft_any import parts as several
from peft_any.backend import is_floating, to_numpy
from peft_any.errors import VerifyError
from peft_any.factors import expert_factors
from peft_any.layer import Dense, Site, flat
from peft_any.parts import Part
from peft_any.receipt import Host
from peft_any.surgery.measure import Moments, all_finite, measure
from peft_any.surgery.passes import rounded
from peft_any.surgery.rounding import nearest
from peft_any.surgery.start import Start
from peft_any.surgery.structure import cast, is_scaled_product, prepared, product
from peft_any.surgery.sums import Sums

_BLOCK, _QUICK = 1 << 17, 1 << 20
"""Elements of a block, in double precision and where single precision mostly does."""
_own = local()
Merged: TypeAlias = dict[str, tuple[Host, Host | None]]
"""Tensors before rounding, and Δ where it is known better than W′ − W."""
_RANGE = ("float32", "float64", "bfloat16")
_WIDER = "give a dtype with a larger range (--dtype float32 or bfloat16)"


class Patch(abc.ABC):
    """One touched tensor's new values, by blocks of rows."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def prepare(self) -> Any:
        """Compute what all blocks have in common."""
        return None

    @property
    def ready(self) -> Any:
        """What `prepare` gave; every thread keeps that of its latest patch of each class alone."""
        kept: dict[type, tuple[Patch, Any]] = _own.__dict__.setdefault("kept", {})
        if kept.get(type(self), (None,))[0] is not self:
            kept.pop(type(self), None)  # one at a time
            kept[type(self)] = self, self.prepare()
        return kept[type(self)][1]

    @property
    def step(self) -> int:
        """Rows of a block."""
        return max(_BLOCK // self.width, 1)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return max(prod(self.start.shape[1:]), 1)

    @property
    def blocks(self) -> Iterator[slice]:
        """The blocks, which depend on the tensor alone."""
        rows = self.start.shape[0] if self.start.shape else 1
        for start in range(0, max(rows, 1), self.step):
            yield slice(start, min(start + self.step, rows))

    @abc.abstractmethod
    def exact(self, rows: slice) -> tuple[Host, Host | None]:
        """Give the new values in double precision, and Δ where it is known better than W′ − W."""

    def made(self, rows: slice) -> tuple[Host, Moments]:
        """Give the new values, rounded, and what became of the change.

        Raises
        ------
        FormatError
            If the base has NaN or infinities there.
        VerifyError
            If the result has some: it does not fit the dtype.
        """
        exact, delta = self.exact(rows)
        quick = self._at_once(exact, delta, rows)
        if quick is not None and quick[1].finite:
            return quick
        return self.checked(exact, delta, nearest(exact, self.start.dtype), rows)

    def _at_once(self, exact: Host, delta: Host | None, rows: slice) -> tuple[Host, Moments] | None:
        """Round and measure in one pass, where there is one for these dtypes."""
        stored = self.start.stored
        if not stored.dtype.name == self.start.dtype == "bfloat16" or stored.ndim == 0:
            return None
        base = stored[rows]
        return rounded(base, exact, delta) if base.shape == exact.shape else None

    def checked(
        self, exact: Host, delta: Host | None, realised: Host, rows: slice
    ) -> tuple[Host, Moments]:
        """Refuse values that do not fit the dtype, and measure the rest."""
        name = self.start.dtype
        if is_floating(name) and not all_finite(realised):
            raise VerifyError(
                f"{self.start.name}: the merged values cannot be stored: they overflow {name}; "
                + ("the adapter's effect is too large" if name in _RANGE else _WIDER)
            )
        return realised, self.moments(exact, delta, realised, rows)

    def moments(self, exact: Host, delta: Host | None, realised: Host, rows: slice) -> Moments:
        """Measure anybody's values of some rows."""
        base = self.start.stored[rows] if self.start.shape else self.start.stored
        return measure(base, realised, exact=None if delta is not None else exact, delta=delta)


class Copied(Patch):
    """A tensor that gets full copies or new rows alone."""

    def exact(self, rows: slice) -> tuple[Host, Host | None]:
        """W′ of the adapters."""
        return self.start.rows(rows.start, rows.stop), None


class Product(Patch):
    """W + u·v, in the layout of the checkpoint, with factors that are small."""

    def __init__(self, start: Start, factors: Callable[[], tuple[Host, Host]]) -> None:
        super().__init__(start)
        self.factors = factors

    def prepare(self) -> tuple[Host, Host, Sums | None]:
        """Give u, v, and how to sum in single precision, if that is possible."""
        pair = self.factors()
        return *pair, self.start.added(*pair)

    @property
    def step(self) -> int:
        """Rows of a block."""
        return max((_QUICK if self.start.plain else _BLOCK) // self.width, 1)

    def exact(self, rows: slice) -> tuple[Host, Host | None]:
        """W + u·v."""
        u, v, _ = self.ready
        base = self.start.rows(rows.start, rows.stop)
        delta = (u[rows] @ v).reshape(base.shape)
        return base + delta, None if self.start.replaced else delta

    def made(self, rows: slice) -> tuple[Host, Moments]:
        """As any patch's, but in single precision where that gives the same."""
        *_, sums = self.ready
        quick = None if sums is None else self.start.summed(sums, rows)
        return super().made(rows) if quick is None else quick


class Experts(Patch):
    """A stack of matrices, each W + u·v with small factors of its own."""

    def __init__(self, start: Start, site: Site, parts: list[Part]) -> None:
        super().__init__(start)
        self.site, self.parts = site, parts

    @property
    def step(self) -> int:
        """One expert."""
        return 1

    def prepare(self) -> tuple[Host, Host]:
        """Give u (experts, rows, k) and v (experts, k, columns), in double precision."""
        pairs = []
        for part in self.parts:
            config: Any = part.config
            u, v = map(to_numpy, expert_factors(cast(part.params, "float64"), self.site))
            pairs.append((part.weight * config.scaling * u, v))
        u, v = (np.concatenate(some, axis=2 - i) for i, some in enumerate(zip(*pairs, strict=True)))
        turned = self.site.kind == "TransposedExperts"
        return (np.swapaxes(v, 1, 2), np.swapaxes(u, 1, 2)) if turned else (u, v)

    def exact(self, rows: slice) -> tuple[Host, Host | None]:
        """W + u·v."""
        u, v = self.ready
        base = self.start.rows(rows.start, rows.stop)
        delta = u[rows] @ v[rows]
        return base + delta, None if self.start.replaced else delta

    def made(self, rows: slice) -> tuple[Host, Moments]:
        """As any patch's, part by part: an expert may be large."""
        u, v = (a[rows.start] for a in self.ready)
        stored = self.start.stored[rows.start]
        small = replace(self.start, stored=stored, shape=stored.shape)
        product = Product(small, lambda: (u, v))
        made = [product.made(part) for part in product.blocks]
        values = np.concatenate([block for block, _ in made])
        return values[None], sum((moments for _, moments in made), Moments())


class Cut(Patch):
    """A layer whose rows are merged block by block: every adapter is cut to them."""

    def __init__(
        self, start: Start, site: Site, parts: list[Part], layer: tuple[Start, ...]
    ) -> None:
        super().__init__(start)
        self.site, self.parts, self.layer = site, parts, layer

    @property
    def step(self) -> int:
        """Rows of a block of the weight, for its bias too."""
        return max((2 * _BLOCK if self._scaled else _BLOCK) // self.site.width, 1)

    @cached_property
    def _scaled(self) -> bool:
        """Whether single precision may do."""
        here = self.start.name == self.layer[0].name and self.start.plain
        return here and is_scaled_product(self.parts, self.site)

    def prepare(self) -> tuple[list[Part], Sums | None]:
        """Give the adapters in double precision, and how to sum in single, if that is possible."""
        wide = [replace(p, params=cast(p.params, "float64")) for p in self.parts]
        parts = [replace(part, params=prepared(part, self.site)) for part in wide]
        return parts, self.start.added(*product(parts, self.site)) if self._scaled else None

    def made(self, rows: slice) -> tuple[Host, Moments]:
        """As any patch's, but in single precision where that gives the same."""
        _, sums = self.ready
        if sums is not None:
            (part,), layer = self._cut(rows)
            config: Any = part.config
            quick = self.start.summed(sums, rows, to_numpy(config.gain(part.params, layer)))
            if quick is not None:
                return quick
        return super().made(rows)

    def _cut(self, rows: slice) -> tuple[list[Part], Dense]:
        """Restrict the adapters and the layer to some rows."""
        parts, _ = self.ready
        cut = [several.cut(part, self.site, rows) for part in parts]
        site = replace(self.site, n_out=rows.stop - rows.start)
        weight, *bias = (start.rows(rows.start, rows.stop) for start in self.layer)
        layer = Dense(flat(weight), bias[0] if bias else None, site)
        return [part for part in cut if part is not None], layer

    def exact(self, rows: slice) -> tuple[Host, Host | None]:
        """These rows of the merged layer."""
        merged, dw, db = several.realise(*self._cut(rows))
        exact: Any = merged.stored()
        delta: Any = merged.replace(weight=dw).stored()
        if self.start.name != self.layer[0].name:
            exact, delta = merged.bias, db
        return to_numpy(exact), None if self.start.replaced else to_numpy(delta)


class Turned(Patch):
    """g ⊙ (W·diag(t)): large blocks where single precision does, those of a `Cut` elsewhere."""

    def __init__(self, exactly: Cut) -> None:
        super().__init__(exactly.start)
        self.exactly = exactly

    @property
    def step(self) -> int:
        """Rows of a block."""
        return max(_QUICK // self.width, 1)

    def prepare(self) -> tuple[Sums | None, Host | None]:
        """Give how to multiply in single precision, if that is possible, and g."""
        (part,), _ = self.exactly.ready
        found = part.config.blockwise(part.params, self.exactly.site)
        if found is None:
            return None, None
        blocks, gain = found
        return self.start.turned(to_numpy(blocks)), None if gain is None else to_numpy(gain)

    def exact(self, rows: slice) -> tuple[Host, Host | None]:
        """These rows of the merged layer."""
        return self.exactly.exact(rows)

    def made(self, rows: slice) -> tuple[Host, Moments]:
        """As any patch's, but in single precision where that gives the same."""
        sums, gain = self.ready
        if sums is not None:
            quick = self.start.summed(sums, rows, None if gain is None else gain[rows])
            if quick is not None:
                return quick
        step = self.exactly.step
        starts = range(rows.start, rows.stop, step)
        made = [self.exactly.made(slice(i, min(i + step, rows.stop))) for i in starts]
        values = np.concatenate([block for block, _ in made])
        return values, sum((moments for _, moments in made), Moments())


class Whole(Patch):
    """A tensor whose rows need each other, or are merged by another library."""

    def __init__(self, start: Start, compute: Callable[[], Merged]) -> None:
        super().__init__(start)
        self.compute = compute

    @property
    def step(self) -> int:
        """All rows."""
        return max(self.start.shape[0], 1) if self.start.shape else 1

    def exact(self, rows: slice) -> tuple[Host, Host | None]:  # noqa: ARG002 - they are all
        """The merged tensor."""
        return self.compute()[self.start.name]
