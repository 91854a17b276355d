"""FourierFT: a sparse spectrum of the weight's change. Gao et al. 2024, https://arxiv.org/abs/2405.03003."""

from dataclasses import field, replace
from typing import ClassVar, Self

from peft_any.contract import Additive, Array, Kind, Params, Shape, Site, Tuner
from peft_any.errors import ShapeError
from peft_any.fields import Biases, ByLayer, Count, Excludes, FanInFanOut
from peft_any.initial import normal, zeros
from peft_any.patterns import matching_end
from peft_any.spectra import random_places, real_inverse_transform


class FourierFTConfig(Additive, Biases, ByLayer, Excludes, FanInFanOut, peft_type="FOURIERFT"):
    """ΔW = s·Re(F⁻¹), the inverse Fourier transform of F (n_out, n_in), zero but at K places.

    `fourierft_spectrum` (K,) holds F's values there; the places are the first K of torch's random
    permutation of all n_out·n_in with the seed `random_loc_seed`, and are in no file.

    n_frequency: K. n_frequency_pattern: K by site. scaling: s.
    init_weights: true (zero) or false (standard normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})

    n_frequency: Count = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def per_site(self, site: Site) -> Self:
        """Resolve the pattern, and check that there are as many places."""
        count = matching_end(self.n_frequency_pattern, site.name, self.n_frequency)
        most = site.n_in * site.n_out
        if count > most:
            raise ShapeError(f"{site.name}: n_frequency={count} cannot be placed in {most} entries")
        return replace(self, n_frequency=count)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The spectrum's values: standard normal, unless `init_weights`."""
        return {"fourierft_spectrum": (zeros if self.init_weights else normal)(self.n_frequency)}

    def delta(self, p: Params, site: Site) -> Array:
        """The transform; of real values it needs half of the spectrum."""
        return self._transformed(p, site, self.scaling)

    def onto(self, p: Params, weight: Array, site: Site, *, minus: bool = False) -> Array:
        """Add the transform as it is formed."""
        return self._transformed(p, site, -self.scaling if minus else self.scaling, weight)

    def _transformed(self, p: Params, site: Site, scale: float, onto: Array | None = None) -> Array:
        shape = site.n_out, site.n_in
        places = random_places(self.random_loc_seed, site.n_out * site.n_in, self.n_frequency)
        return real_inverse_transform(scale * p["fourierft_spectrum"], places, shape, onto)

    # One product with the merged weight costs less than two.
    forward = Tuner.forward
