"""Methods whose addition depends on the input: they are applied, and cannot be merged."""

from __future__ import annotations

import abc
from typing import ClassVar

from peft_any._typing import Array, Params
from peft_any.dropout import Noise
from peft_any.errors import ConfigError
from peft_any.layer import Dense, Layer, Site
from peft_any.method import Tuner


class Routed(Tuner):
    """y = W·x + b + r(x), where no matrix holds r: it is applied, and never merged.

    What a call needs beside x (the tasks of its rows, say) is named by `takes`; `residual` finds
    it among the parameters, where `PeftModel.bind(routing=…)` puts it.
    """

    why: ClassVar[str]
    """Why no weight holds what the method adds."""
    instead: ClassVar[str] = "apply it without merging: model.bind().layers[…](x)"
    """The way out of a refused merge."""

    @property
    def refusal(self) -> str:
        """What a refused merge says."""
        return f"{self.peft_type} cannot be merged: {self.why}: {self.instead}"

    @abc.abstractmethod
    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Compute r(x) (…, n_out)."""

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x) + r(x)."""
        return base(x) + self.residual(p, x, base.site)

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:  # noqa: ARG002
        """Apply the layer in training; mostly nothing is random there."""
        return self.forward(p, x, base)

    def merge(self, p: Params, base: Dense) -> Dense:  # noqa: ARG002
        """Refuse.

        Raises
        ------
        ConfigError
            Always: with the reason and the way out.
        """
        raise ConfigError(f"{base.site.name}: {self.refusal}")
