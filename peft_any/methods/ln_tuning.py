"""LN tuning: norms trained as they are. Zhao et al. 2023, https://arxiv.org/abs/2312.11420."""

from typing import ClassVar

from peft_any.backend import astype
from peft_any.contract import Dense, Fresh, Kind, Params, Shape, Site, Tuner
from peft_any.fields import Excludes
from peft_any.layer import KINDS


class LNTuningConfig(Tuner, Excludes, peft_type="LN_TUNING"):
    """W′ = V, of the weight's shape, and b′ = c (n_out,): they start as W and b.

    Meant for norms, w ⊙ x̂ + b with w (n_out,), and able to train any layer whole.
    """

    kinds: ClassVar[frozenset[Kind]] = KINDS - {"MultiheadAttention"}

    def shapes(self, site: Site) -> dict[str, Shape]:
        """V and c, in the checkpoint's own layout."""
        shapes = {"ln_tuning_layers.weight": site.stored_shape}
        return {**shapes, "ln_tuning_layers.bias": (site.n_out,)} if site.bias else shapes

    def init(self, site: Site, new: Fresh) -> Params:
        """Copy the layer."""
        base = new.base_for(site.name, self.peft_type)
        p = {"ln_tuning_layers.weight": astype(base.stored(), new.dtype)}
        if site.bias:
            none = base.bias is None
            bias = new.zeros((site.n_out,)) if none else astype(base.bias, new.dtype)
            p["ln_tuning_layers.bias"] = bias
        return p

    def changes_bias(self, site: Site) -> bool:
        """Where there is one."""
        return site.bias

    def merge(self, p: Params, base: Dense) -> Dense:
        """Put the copies in place."""
        bias = p.get("ln_tuning_layers.bias", base.bias)
        merged = Dense.of(p["ln_tuning_layers.weight"], bias, base.site)
        return merged.replace(unadapted=base.unadapted, unadapted_bias=base.unadapted_bias)
