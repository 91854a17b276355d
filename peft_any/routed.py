"""Methods whose addition depends on the input: they are applied, and cannot be merged."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from peft_any._typing import Array, Params
from peft_any.dropout import Noise
from peft_any.errors import ConfigError, nearest
from peft_any.layer import Dense, Layer, Site
from peft_any.method import Tuner
from peft_any.outputs import added


class Routed(Tuner):
    """y = W·x + b + r(x), where no matrix holds r: it is applied, and never merged.

    What a call needs beside x (the tasks of its rows, say) is named by `takes`; `residual` finds
    it among the parameters, where `PeftModel.routed` puts it.
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
        return added(base, x, self.residual(p, x, base.site))

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


def taken(routing: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Check that what a call is given beside its input is something that an adapter takes.

    Raises
    ------
    ConfigError
    """
    takes = {n for placed in adapters.values() for c in placed.configs.values() for n in c.takes}
    for name in routing:
        if name not in takes:
            raise ConfigError(f"{name}: no adapter takes it{nearest(name, takes)}")
    return dict(routing)
