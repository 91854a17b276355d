"""One layer's adapter, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from peft_any._typing import Array, Params
from peft_any.backend import astype, dtype_name, is_floating
from peft_any.errors import ConfigError
from peft_any.layer import Dense, Site, check_input, narrow, widen


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer's adapter: configuration (a `Tuner`), site, parameters and, if given, the base.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.methods.lora import LoraConfig
    >>> layer = LoraConfig(r=4).layer(6, 5, seed=0)
    >>> bool(np.all(layer.residual(np.ones((2, 6), dtype="float32")) == 0))
    True
    """

    config: Any
    site: Site
    params: Params
    base: Dense | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        names = self.config.shapes(self.site)
        return sum(prod(self.params[k].shape) for k in names if k not in self.config.frozen)

    def residual(self, x: Array) -> Array:
        """Compute what an additive adapter adds to the base layer's output (..., n_out)."""
        if not hasattr(self.config, "delta"):
            raise ConfigError(
                f"{self.config.where}: {self.config.peft_type} has no residual: it does not add "
                "to the base's output; give layer() the base weight and call the layer"
            )
        return self.config.residual(self.params, x, self.site)

    def __call__(self, x: Array) -> Array:
        """Apply the adapted layer (the base must have been given)."""
        check_input(x, self.site)
        p, layer = self._ready
        out = dtype_name(x if is_floating(x) else self._base().weight)
        x = astype(x, dtype_name(layer.weight)) if is_floating(x) else x
        return astype(self.config.forward(p, x, layer), out)

    def merge(self) -> Dense:
        """Give the merged layer, rounded once to the base's dtype."""
        base = self._base()
        (p,), layer = widen([self.params], base)
        return narrow(self.config.merge(p, layer), base)

    @cached_property
    def _ready(self) -> tuple[Params, Dense]:
        (p,), layer = widen([self.params], self._base())
        return self.config.prepare(p, layer), layer

    def _base(self) -> Dense:
        if self.base is None:
            raise ConfigError(
                f"{self.site.name}: this needs the base layer: pass weight= (and bias=) to layer()"
            )
        return self.base
