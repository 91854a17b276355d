"""BEFT: bias-efficient fine-tuning. Lv et al. 2025, https://arxiv.org/abs/2509.15974."""

from typing import ClassVar

from peft_any.backend import creation_device, namespace
from peft_any.contract import Additive, Array, Dense, Kind, Layer, Params, Shape, Site
from peft_any.initial import normal, zeros
from peft_any.outputs import added


class BeftConfig(Additive, peft_type="BEFT"):
    """b′ = b + β, with `beft_bias` β (1, n_out); merging needs a base with a bias.

    init_weights: true (β = 0) or false (standard normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})

    init_weights: bool = True

    def shapes(self, site: Site) -> dict[str, Shape]:
        """β, as a row: zero."""
        return {"beft_bias": (zeros if self.init_weights else normal)(1, site.n_out)}

    def changes_bias(self, site: Site) -> bool:
        """Nothing but the bias."""
        return True

    def delta(self, p: Params, site: Site) -> Array:
        """Zero."""
        xp, shift = namespace(p["beft_bias"]), p["beft_bias"]
        shape = (site.n_out, site.width)
        return xp.zeros(shape, dtype=shift.dtype, device=creation_device(shift))

    def bias_delta(self, p: Params, site: Site) -> Array:
        """β."""
        return namespace(p["beft_bias"]).reshape(p["beft_bias"], (site.n_out,))

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """β, for every input."""
        shape = (*x.shape[:-1], site.n_out)
        return namespace(x).broadcast_to(self.bias_delta(p, site), shape)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x) + β."""
        return added(base, x, shift=self.bias_delta(p, base.site))

    def merge(self, p: Params, base: Dense) -> Dense:
        """W as it is, and b + β."""
        return base.replace(bias=base.sure_bias + self.bias_delta(p, base.site))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """W′ as it is, and b′ − β: exact but for one rounding."""
        return merged.replace(bias=merged.sure_bias - self.bias_delta(p, merged.site))
