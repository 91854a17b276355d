"""Super-Tuning: the largest weights, with Supra's low-rank part. https://arxiv.org/abs/2607.09287."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from peft_any._tree import without
from peft_any.backend import astype, namespace, plus_product
from peft_any.checks import refuse
from peft_any.contract import Additive, Array, Fresh, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.errors import ShapeError
from peft_any.fields import Count, Rate
from peft_any.layer import linear
from peft_any.spectra import added_at, extreme_places, scattered


class SupertuningConfig(Additive, peft_type="SUPERTUNING"):
    """ΔW[iₖ] = vₖ at flat places iₖ, elsewhere 0; with `r`, ΔW += s·B·A and s = α/r ("Supra").

    `supertuning_values` v (K,), K = ⌊n_out·n_in·(1 − sparsity)⌋; `supertuning_indices` (K,) are
    the places of the base's K largest entries; `supertuning_lora_A.weight` A (r, n_in),
    `supertuning_lora_B.weight` B (n_out, r).

    select_top: false: the smallest entries.
    lora_alpha: α, 2·r by default.
    save_precomputed_indices: false: the file has no places; they are found again from the base.
    init_weights: true (v = 0, B = 0) or false (v normal, B uniform).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    frozen: ClassVar[frozenset[str]] = frozenset({"supertuning_indices"})
    certain: ClassVar[bool] = True

    sparsity: Rate = 0.99
    select_top: bool = True
    r: Count | None = None
    lora_alpha: float | None = None
    lora_dropout: Rate = 0.0
    save_precomputed_indices: bool = True
    init_weights: bool = True

    def check(self) -> None:
        """α goes with r."""
        alone = self.r is None and self.lora_alpha is not None
        refuse(self, lora_alpha=(not alone, "none without r"))
        if self.r is not None and self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.r)  # HF writes it out

    def count(self, site: Site) -> int:
        """How many entries are tuned."""
        return int(site.n_out * site.n_in * (1 - self.sparsity))

    def per_site(self, site: Site) -> Self:
        """Check that an entry is left."""
        if not self.count(site):
            raise ShapeError(f"{site.name}: sparsity={self.sparsity} leaves no entry: give less")
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """Values, places, and the low-rank pair."""
        k = self.count(site)
        shapes: dict[str, Shape] = {"supertuning_values": (k,)}
        if self.save_precomputed_indices:
            shapes["supertuning_indices"] = (k,)
        if self.r:
            shapes["supertuning_lora_A.weight"] = (self.r, site.n_in)
            shapes["supertuning_lora_B.weight"] = (site.n_out, self.r)
        return shapes

    def init(self, site: Site, new: Fresh) -> Params:
        """All zero but A."""

        def draw(name: str, shape: Shape) -> Any:
            if self.init_weights and not name.endswith("A.weight"):
                return new.zeros(shape)
            return new.kaiming(shape) if len(shape) == 2 else new.normal(shape)

        places = {"supertuning_indices": self._places(site, new)}
        own = self.shapes(site).items()
        return {k: draw(k, shape) for k, shape in own if k not in places} | places

    def _places(self, site: Site, new: Fresh) -> Array:
        """The places of the base's largest, or smallest, entries, in that order."""
        weight = new.base_for(site.name, "supertuning_indices").weight
        return extreme_places(new, weight, self.count(site), largest=self.select_top)

    def lacks(self, p: Params) -> str | None:
        """The places, with `save_precomputed_indices` false."""
        return None if "supertuning_indices" in p else "the places of the tuned entries"

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Find the places again."""
        return {**p, "supertuning_indices": self._places(site, new)}

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Leave the places out, with `save_precomputed_indices` false."""
        return self, without(sites, () if self.save_precomputed_indices else self.frozen)

    def _sparse(self, p: Params, site: Site) -> Array:
        """The values at their places (n_out, n_in)."""
        flat = scattered(p["supertuning_values"], self._flat(p), site.n_out * site.n_in)
        return namespace(flat).reshape(flat, (site.n_out, site.n_in))

    def _flat(self, p: Params) -> Array:
        """The flat places, of a type that indexes on every library."""
        return astype(p["supertuning_indices"], "int64")

    def _pair(self, p: Params) -> tuple[Array, Array] | None:
        """s·B and A, if there are any."""
        if self.r is None or self.lora_alpha is None:
            return None
        scale = self.lora_alpha / self.r
        return scale * p["supertuning_lora_B.weight"], p["supertuning_lora_A.weight"]

    def delta(self, p: Params, site: Site) -> Array:
        """The sparse part, and s·B·A."""
        sparse, pair = self._sparse(p, site), self._pair(p)
        return sparse if pair is None else sparse + pair[0] @ pair[1]

    def onto(self, p: Params, weight: Array, site: Site, *, minus: bool = False) -> Array:
        """Add s·B·A, and the values at their places; or take them away."""
        if (pair := self._pair(p)) is not None:
            weight = plus_product(weight, *pair, minus=minus)
        return added_at(weight, p["supertuning_values"], self._flat(p), minus=minus)

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Thin the input of A alone."""
        y, pair = base(x) + linear(x, self._sparse(p, base.site)), self._pair(p)
        if pair is None:
            return y
        thin = noise.at("input").thinned(x, self.lora_dropout)
        return y + linear(linear(thin, pair[1]), pair[0])

    # One product with the merged weight costs less than two.
    forward = Tuner.forward
