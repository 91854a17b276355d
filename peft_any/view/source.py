"""What the stand-ins of an adapted weight share: the layer without its bias, the merged weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_any import parts as several
from peft_any._jaxpr import recipe_of, symbol
from peft_any._libraries import library_of
from peft_any._typing import Array
from peft_any.backend import (
    astype,
    creation_device,
    dtype_name,
    is_array,
    is_traced,
    lasting,
    namespace,
)
from peft_any.bound import BoundLayer
from peft_any.dropout import Noise, drops
from peft_any.errors import ConfigError
from peft_any.layer import Dense, Site
from peft_any.method import Tuner
from peft_any.parts import Part

HOLDING = {"strict": "_array"}
"""Libraries whose arrays hold NumPy's, which their functions give to NumPy's own; and where."""


@dataclass(frozen=True)
class Opened:
    """What a source is beside its arrays: equal ones do the same, so that JAX traces them once."""

    parts: list[tuple[Tuner, float, Noise | None]]
    stacked: bool
    site: Site

    @classmethod
    def of(cls, bound: BoundLayer, site: Site) -> Opened:
        """Leave the arrays out."""
        return cls([(q.config, q.weight, q.noise) for q in bound.parts], bound.stacked, site)

    def __hash__(self) -> int:
        return hash((self.stacked, self.site, len(self.parts)))

    def __call__(self, nest: Any) -> Source:
        """Make the source of other arrays."""
        weight, bias, *before, params = nest
        own = [Part(c, p, w, n) for (c, w, n), p in zip(self.parts, params, strict=True)]
        base = Dense(weight, bias, self.site, *before)
        source = Source(lambda: BoundLayer(base, own, self.stacked), self.site)
        source._outlives = False  # noqa: SLF001 - of this module
        return source


class Source:
    """What the stand-ins of one weight share: the layer without bias, and its merged weight."""

    def __init__(self, whole: Callable[[], BoundLayer], site: Site) -> None:
        self._whole, self.site = whole, site
        self._kept: dict[str, Any] = {}
        self._outlives = True
        bound = whole()
        self.base, self.stored = bound.base, bound.base.stored()
        self.arrays = (self.base.weight, *_params(bound))
        for part in bound.parts:
            shift = getattr(part.config, "bias_delta", None)
            if shift and self.base.bias is None and shift(part.params, site) is not None:
                raise ConfigError(
                    f"{site.name}: a bias correction cannot be among the weights: the base has no "
                    "bias; call .layers instead"
                )
        self._shifts = any(part.config.changes_bias(site) for part in bound.parts)

    def _keep(self, key: str, make: Callable[[], Any]) -> Any:
        if key in self._kept:
            return self._kept[key]
        with lasting(self.base.weight):
            made = make()
        # what a JAX transformation traces must not outlive it, and it joins equal computations
        traced = made[0].traced if isinstance(made, tuple) else is_traced(made)
        if not (self._outlives and traced):
            self._kept[key] = made
        return made

    @property
    def merged(self) -> Array:
        """The merged weight in the checkpoint's layout."""

        def make() -> Any:
            bound = self._whole()
            refuse_dropout(bound.parts, self.site)
            w: Any = several.rounded(bound.parts, bound.base, stacked=bound.stacked).stored()
            if hasattr(w, "flags") and hasattr(w.flags, "writeable"):
                w = w.view()
                w.flags.writeable = False
            return w

        merged: Array = self._keep("merged", make)
        return merged

    def opened(self) -> tuple[Callable[[Any], Source], Any]:
        """Give how it is made of a nest of arrays, and the nest."""
        if "opened" not in self._kept:
            bound = self._whole()
            base, params = bound.base, [part.params for part in bound.parts]
            nest = base.weight, base.bias, base.unadapted, base.unadapted_bias, params
            self._kept["opened"] = Opened.of(bound, self.site), nest
        made: tuple[Callable[[Any], Source], Any] = self._kept["opened"]
        return made

    def symbol(self, stand_in: Callable[[Source], Any]) -> Array:
        """Give the weight as an operation of the function that JAX traces."""
        if "symbol" not in self._kept:
            make, nest = self.opened()
            made = recipe_of(lambda arrays: stand_in(make(arrays)), nest, self.stored)
            self._kept["symbol"] = made
        array: Array = symbol(*self._kept["symbol"])
        return array

    def layer(self, x: Array) -> Array:
        """Apply the weight alone."""

        def make() -> tuple[BoundLayer, Array | None]:
            bound = self._whole()
            if not self._shifts:
                alone = BoundLayer(self.base.replace(bias=None), bound.parts, bound.stacked)
                return alone, None
            zero = namespace(self.base.weight).zeros_like(self.base.weight[:, 0])
            alone = BoundLayer(self.base.replace(bias=zero), bound.parts, bound.stacked)
            return alone, at_zero(alone)

        alone, shift = self._keep("layer", make)
        y: Array = alone(x)
        return y if shift is None else y - astype(shift, dtype_name(y))


class Held:
    """A source as NumPy's functions see it, for a library whose arrays hold NumPy's."""

    def __init__(self, source: Source) -> None:
        self._source, self.site = source, source.site
        self.stored = self._inside(source.stored)
        self.arrays = tuple(map(self._inside, source.arrays))

    def _inside(self, x: Any) -> Any:
        return getattr(x, HOLDING[library_of(self._source.stored).name])

    @property
    def merged(self) -> Any:
        """The NumPy array in the merged weight."""
        return self._inside(self._source.merged)

    def layer(self, x: Any) -> Any:
        """Apply the weight alone."""
        stored = self._source.stored
        held = namespace(stored).asarray(x, device=creation_device(stored))
        return self._inside(self._source.layer(held))


def refuse_dropout(parts: Sequence[Part], site: Site) -> None:
    """Refuse to merge what drops inputs: the merged weight would leave the dropout out, unsaid.

    Raises
    ------
    ConfigError
    """
    for part in parts:
        if part.noise is not None and drops(part.config):
            raise ConfigError(
                f"{site.weight}: its merged array cannot drop inputs, as "
                f"{part.config.peft_type} does in training: multiply by the weight, train with a "
                "dropout of 0, leave the layer out, or look at a model bound without rng"
            )


def _params(bound: BoundLayer) -> list[Array]:
    return [p for part in bound.parts for p in part.params.values() if is_array(p)]


def at_zero(layer: BoundLayer) -> Array:
    """Give the bias of an adapted layer: what it makes of zeros."""
    base = layer.base.weight
    xp = namespace(base, *_params(layer))
    zeros = xp.zeros((1, layer.base.site.reads), dtype=base.dtype, device=creation_device(base))
    y: Array = layer(zeros)[0, :]
    return y
