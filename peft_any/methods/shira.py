"""SHiRA: sparse high-rank adapters. Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175."""

from typing import ClassVar, Literal, Self

from peft_any.backend import astype, namespace
from peft_any.contract import Additive, Array, Fresh, Kind, Params, Shape, Site, Tuner
from peft_any.errors import ShapeError
from peft_any.fields import Count, FanInFanOut
from peft_any.spectra import added_at, scattered, sorted_places


class ShiraConfig(Additive, FanInFanOut, peft_type="SHIRA"):
    """ΔW[iₖ, jₖ] = vₖ, elsewhere 0, with `shira_weight` v (K,) and K = r·(n_in + n_out).

    `shira_indices` (2, K) holds the rows iₖ and columns jₖ, is saved and not trained.

    mask_type: "random": the first K places of torch's random permutation, drawn with
        `random_seed`, in the order of the weight's rows.
    init_weights: true (v = 0) or false (standard normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    frozen: ClassVar[frozenset[str]] = frozenset({"shira_indices"})
    ranked: ClassVar[bool] = False

    r: Count = 32
    mask_type: Literal["random"] = "random"
    random_seed: int | None = None
    init_weights: bool = True

    def per_site(self, site: Site) -> Self:
        """Check that the weight has as many entries."""
        if self.r * (site.n_in + site.n_out) > site.n_in * site.n_out:
            raise ShapeError(
                f"{site.name}: r={self.r} asks for {self.r * (site.n_in + site.n_out)} of "
                f"{site.n_in * site.n_out} entries: give at most "
                f"{site.n_in * site.n_out // (site.n_in + site.n_out)}"
            )
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The values and their places."""
        count = self.r * (site.n_in + site.n_out)
        return {"shira_weight": (count,), "shira_indices": (2, count)}

    def init(self, site: Site, new: Fresh) -> Params:
        """Zero, at random places."""
        values, (_, count) = self.shapes(site).values()
        shape = site.n_out, site.n_in
        draw = new.zeros if self.init_weights else new.normal
        places = sorted_places(new, shape, count, self.random_seed)
        return {"shira_weight": draw(values), "shira_indices": places}

    def delta(self, p: Params, site: Site) -> Array:
        """The values at their places."""
        flat = scattered(p["shira_weight"], self._places(p, site), site.n_out * site.n_in)
        return namespace(flat).reshape(flat, (site.n_out, site.n_in))

    def onto(self, p: Params, weight: Array, site: Site, *, minus: bool = False) -> Array:
        """Add the values, or take them away."""
        return added_at(weight, p["shira_weight"], self._places(p, site), minus=minus)

    def _places(self, p: Params, site: Site) -> Array:
        """The flat places, of a type that indexes on every library."""
        places = p["shira_indices"]
        if site.n_out * site.n_in > 2**31:  # more than the file's int32 can count
            places = astype(places, "int64")
        return astype(places[0, :] * site.n_in + places[1, :], "int64")

    # One product with the merged weight costs less than two.
    forward = Tuner.forward
