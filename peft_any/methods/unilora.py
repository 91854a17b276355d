"""Uni-LoRA: one vector for all factors. Li et al. 2025, https://arxiv.org/abs/2506.00799."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar, Self

from peft_any.backend import astype, dtype_name, namespace
from peft_any.contract import Additive, Array, Fresh, Kind, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Count, FanInFanOut, Positive, Rate
from peft_any.initial import normal, uniform
from peft_any.projections import even_places


class UniLoraConfig(Additive, Biases, ByLayer, FanInFanOut, peft_type="UNILORA"):
    """ΔW = B·A, each entry of A (r, n_in) and B (n_out, r) being θ[i]/√cᵢ.

    All sites share the trained `unilora_theta_d` θ (d,), d = `theta_d_length`. The places i fill
    all A and B, in the order of the model's layers, and use each entry of θ as often as any other,
    or once more: cᵢ times. They are shuffled by NumPy's generator with the seed `proj_seed`.

    save_indices: true: sites hold the places, `unilora_indices_A` (r, n_in) and
        `unilora_indices_B` (n_out, r), and 1/√cᵢ, `unilora_scales_A` and `unilora_scales_B`; else
        they follow from the order of the layers, which files of weights do not keep.
    init_theta_d_bound: of the uniform θ. init_weights: false: θ standard normal.
    """

    thins: ClassVar[str] = "unilora_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    frozen: ClassVar[frozenset[str]] = frozenset(
        f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB"
    )
    ordered: ClassVar[bool] = True

    r: Count = 4
    proj_seed: int = 42
    theta_d_length: Count = 256
    unilora_dropout: Rate = 0.0
    init_theta_d_bound: Positive = 0.02
    init_weights: bool = True
    save_indices: bool = False

    @property
    def certain(self) -> bool:
        """With the places in the file."""
        return self.save_indices

    def _factors(self, site: Site) -> dict[str, Shape]:
        return {"A": (self.r, site.n_in), "B": (site.n_out, self.r)}

    def shapes(self, site: Site) -> dict[str, Shape]:
        """Places and scales, with `save_indices`."""
        if not self.save_indices:
            return {}
        sides = self._factors(site).items()
        return {f"unilora_{w}_{s}": shape for s, shape in sides for w in ("indices", "scales")}

    def init(self, site: Site, new: Fresh) -> Params:
        """Find the places, among those of all sites."""
        sites = new.sites or (site,)
        counts = [sum(map(prod, self._factors(s).values())) for s in sites]
        at = sum(counts[: [s.name for s in sites].index(site.name)])
        places, scales = even_places(sum(counts), self.theta_d_length, self.proj_seed)
        if new.base is not None:  # HF rounds them to the weight's dtype
            scales = astype(scales, dtype_name(new.base.weight))
        found: Params = {}
        for side, shape in self._factors(site).items():
            here = places[at : at + prod(shape)]
            found[f"unilora_indices_{side}"] = new.array(here.reshape(shape))
            found[f"unilora_scales_{side}"] = new.array(scales[here].reshape(shape))
            at += prod(shape)
        return found

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """θ, uniform."""
        d, bound = self.theta_d_length, self.init_theta_d_bound
        return {"unilora_theta_d": uniform(bound, d) if self.init_weights else normal(d)}

    def lacks(self, p: Params) -> str | None:
        """The places, without `save_indices`."""
        return None if "unilora_indices_A" in p else "the places (save_indices=false)"

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Add places and scales."""
        return {**p, **self.init(site, new)}

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Leave out what the file does not hold."""
        return self, {name: dict(p) if self.save_indices else {} for name, p in sites.items()}

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """B (n_out, r) and A (r, n_in)."""
        b, a = (self._filled(p, side) for side in "BA")
        return b, a

    @staticmethod
    def _filled(p: Params, side: str) -> Array:
        places, theta = p[f"unilora_indices_{side}"], p["unilora_theta_d"]
        xp = namespace(theta, places)
        filled = xp.reshape(xp.take(theta, xp.reshape(places, (-1,)), axis=0), places.shape)
        return filled * p[f"unilora_scales_{side}"]
