"""Several adapters on one layer: weighted sums of their effects, or one upon another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from peft_any._typing import Array, Params
from peft_any.backend import is_array, namespace
from peft_any.dropout import Noise
from peft_any.errors import ConfigError
from peft_any.layer import Dense, Layer, Site, narrow, widen
from peft_any.method import Additive, Tuner


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter's share in a layer.

    Attributes
    ----------
    config : Tuner
        Resolved for the site.
    params : dict of arrays
        The site's parameters and the adapter's shared ones, joined.
    weight : float
        Factor of the adapter's effect.
    noise : Noise, optional
        What training drops.
    """

    config: Tuner
    params: Params
    weight: float = 1.0
    noise: Noise | None = None

    def forward(self, x: Array, base: Layer) -> Array:
        """Apply base and adapter."""
        if self.noise is None:
            return self.config.forward(self.params, x, base)
        return self.config.dropped(self.params, x, base, self.noise)


def ready(parts: Sequence[Part], base: Dense, *, stacked: bool = False) -> tuple[list[Part], Dense]:
    """Widen adapters and base together, and compute what all calls have in common.

    Stacked, each on the layer that the ones before it made.

    A base below traced parameters goes to the tape that records them: its library may refuse to
    meet a tape's arrays.
    """
    params, base = widen([part.params for part in parts], base)
    arrays = [a for p in params for a in p.values() if is_array(a)]
    xp = namespace(base.weight, *arrays)
    if hasattr(xp, "lift"):
        base = base.replace(weight=xp.lift(base.weight), bias=xp.lift(base.bias))
    made: list[Part] = []
    layer: Layer = base
    for part, p in zip(parts, params, strict=True):
        made.append(replace(part, params=part.config.prepare(p, layer)))
        layer = Adapted(made[-1], layer) if stacked else base
    return made, base


def rounded(parts: Sequence[Part], base: Dense, *, stacked: bool = False) -> Dense:
    """Merge adapters into a layer, in the compute dtype, and round to the base's dtypes."""
    return narrow(merge(*ready(parts, base, stacked=stacked), stacked=stacked), base)


def cut(part: Part, site: Site, rows: slice) -> Part | None:
    """Restrict an adapter to some rows of the flat weight: it merges these as it merges all.

    Parameters
    ----------
    part : Part
    site : Site
        Of the whole layer.
    rows : slice
        From a row to a row.

    Returns
    -------
    Part or None
        None where the method's rows need one another, or the layer's flat weight has other rows
        than the stored one.
    """
    config = part.config
    if not config.separable or site.groups > 1 or site.kind in ("Conv1D", "Embedding"):
        return None
    params = dict(part.params)
    if config.frozen & params.keys():
        return None
    fewer = config.shapes(replace(site, n_out=rows.stop - rows.start))
    for name, whole in config.shapes(site).items():
        for axis, (size, less) in enumerate(zip(whole, fewer[name], strict=True)):
            if size != less:
                params[name] = params[name][(slice(None),) * axis + (rows,)]
    return replace(part, params=params)


def effect(parts: Sequence[Part], base: Dense) -> tuple[Array, Array | None]:
    """Sum the weighted effects of several adapters, each against the same base.

    Parameters
    ----------
    parts : sequence of Part, at least one
        Widened, as `base`.
    base : Dense

    Returns
    -------
    weight : array (n_out, width)
    bias : array (n_out,) or None
    """
    total: Array | None = None
    shift: Array | None = None
    for part in parts:
        dw, db = part.config.effect(part.params, base)
        if part.weight != 1.0:
            dw, db = part.weight * dw, None if db is None else part.weight * db
        total = dw if total is None else total + dw
        shift = db if shift is None or db is None else shift + db
    if total is None:
        raise ConfigError(f"{base.site.name}: no adapter to take the effect of")
    return total, shift


def merge(parts: Sequence[Part], base: Dense, *, stacked: bool = False) -> Dense:
    """Merge several adapters into a layer.

    Parameters
    ----------
    parts : sequence of Part
        Widened, as `base`; their order matters when stacked.
    base : Dense
    stacked : bool
        One upon another, each adapting what the ones before it made, as Hugging Face PEFT does
        with several active adapters; weights must be 1. Otherwise W + Σ wᵢ·(mergeᵢ(W) − W).

    Returns
    -------
    Dense
        In the compute dtype: round it with `narrow`.
    """
    if stacked or (len(parts) == 1 and parts[0].weight == 1.0):
        layer = base
        for part in parts:
            _refuse_weight(part, base.site)
            layer = _merged(part, layer).replace(
                unadapted=base.original, unadapted_bias=base.original_bias
            )
        return layer
    if not parts:
        return base
    return _plus(base, *effect(parts, base))


def realise(parts: Sequence[Part], base: Dense) -> tuple[Dense, Array, Array | None]:
    """Merge the weighted sum, and say what was to be added to the weight and to the bias.

    Returns
    -------
    merged : Dense
    weight : array (n_out, width)
        ΔW: of the factors where methods add, or else what merging made of the weight.
    bias : array (n_out,) or None
    """
    alone = len(parts) == 1 and parts[0].weight == 1.0
    config, adds = parts[0].config, False
    if isinstance(config, Additive):
        params = config.prepare(parts[0].params, base)
        parts = [replace(parts[0], params=params), *parts[1:]]
        adds = config.gain(params, base) is None
    if alone and not adds:
        merged = merge(parts, base)
        shift = None
        if merged.bias is not None and base.bias is not None:
            shift = merged.bias - base.bias
        return merged, merged.weight - base.weight, shift
    weight, shift = effect(parts, base)
    return _plus(base, weight, shift), weight, shift


def _merged(part: Part, layer: Dense) -> Dense:
    merged = part.config.merge(part.params, layer)
    if merged.bias is layer.bias:
        return merged
    if layer.bias is None:
        raise ConfigError(
            f"{layer.site.name}: a bias correction cannot be merged: the base has no bias"
        )
    if merged.bias is None or not part.config.changes_bias(layer.site):
        raise ConfigError(
            f"{layer.site.name}: {part.config.where} cannot change the bias in merge alone: its "
            "changes_bias must say so, and merge must give one"
        )
    return merged


def _plus(base: Dense, weight: Array, shift: Array | None) -> Dense:
    bias = base.bias
    if shift is not None:
        if bias is None:
            raise ConfigError(
                f"{base.site.name}: a bias correction cannot be merged: the base has no bias"
            )
        bias = bias + shift
    return base.replace(weight=base.weight + weight, bias=bias)


def forward(parts: Sequence[Part], x: Array, base: Layer, *, stacked: bool = False) -> Array:
    """Apply a layer with several adapters, weighted or stacked as in `merge`."""
    if len(parts) == 1 and parts[0].weight == 1.0:
        return parts[0].forward(x, base)
    if stacked:
        layer = base
        for part in parts:
            _refuse_weight(part, base.site)
            layer = Adapted(part, layer)
        return layer(x)
    once = Once(base)
    y = out = once(x)
    for part in parts:
        out = out + part.weight * (part.forward(x, once) - y)
    return out


def _refuse_weight(part: Part, site: Site) -> None:
    if part.weight != 1.0:
        raise ConfigError(
            f"{site.name}: a stacked adapter cannot have weight {part.weight}: give a mapping of "
            "names to weights for their weighted sum"
        )


@dataclass(frozen=True, eq=False)
class Adapted:
    """A layer that carries one adapter, for the next one to adapt."""

    part: Part
    base: Layer
    _merged: list[Dense] = field(default_factory=list, repr=False, compare=False)

    @property
    def site(self) -> Site:
        """The base layer's."""
        return self.base.site

    @property
    def adapted(self) -> bool:
        """It does."""
        return True

    @property
    def original(self) -> Array:
        """The weight below all adapters."""
        return self.base.original

    @property
    def original_bias(self) -> Array | None:
        """The bias below all adapters."""
        return self.base.original_bias

    @property
    def weight(self) -> Array:
        """The merged weight, formed on first use."""
        return self._dense().weight

    @property
    def bias(self) -> Array | None:
        """The merged bias."""
        return self._dense().bias if self.part.config.changes_bias(self.site) else self.base.bias

    def __call__(self, x: Array) -> Array:
        """Apply base and adapter."""
        return self.part.forward(x, self.base)

    def _dense(self) -> Dense:
        if not self._merged:
            self._merged.append(self.part.config.merge(self.part.params, Dense.formed(self.base)))
        return self._merged[0]


class Once:
    """A layer that does not compute twice for the very same input, or one whose output is known."""

    def __init__(self, base: Layer, known: tuple[Array, Array] | None = None) -> None:
        self._base = base
        self._last = known
        self.site, self.weight, self.bias = base.site, base.weight, base.bias
        self.original, self.original_bias = base.original, base.original_bias
        self.adapted = base.adapted

    def __call__(self, x: Array) -> Array:
        """Apply the layer, or remember what it gave for this `x`."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, self._base(x))
        return self._last[1]
