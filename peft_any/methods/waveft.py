"""WaveFT: wavelet fine-tuning. Bilican et al. 2025, https://arxiv.org/abs/2505.12532."""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any, ClassVar, Self

from peft_any.checks import refuse
from peft_any.contract import Additive, Array, Kind, Params, Shape, Site, Tuner
from peft_any.errors import ShapeError
from peft_any.fields import Biases, ByLayer, Count, Excludes, FanInFanOut
from peft_any.initial import normal
from peft_any.patterns import matching
from peft_any.spectra import added_at, random_places
from peft_any.wavelets import FILTERS, entries, synthesised


class WaveFTConfig(Additive, Biases, ByLayer, Excludes, FanInFanOut, peft_type="WAVEFT"):
    """ΔW = s·D(C), a step of wavelet synthesis of C (n_out, n_in), which is zero but at K places.

    `waveft_spectrum` (K,) holds C's values there; the places are the first K of torch's random
    permutation of all n_out·n_in with the seed `random_loc_seed`, and are in no file. C is padded
    by what D takes away, and ΔW is D's middle.

    n_frequency: K. n_frequency_pattern: K by site. scaling: s.
    proportional_parameters: K by the sites' sizes, n_frequency on average.
    wavelet_family: db1 … db10, sym2 … sym10 or coif1 … coif5.
    use_idwt: false: ΔW = s·C.
    init_weights: true (zero) or false (normal, σ = 0.01).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})

    n_frequency: Count = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def check(self) -> None:
        """A synthesis needs its filters."""
        known = not self.use_idwt or self.wavelet_family in FILTERS
        refuse(self, wavelet_family=(known, f"one of {', '.join(FILTERS)}"))

    def among(self, sites: Sequence[Site]) -> Self:
        """Share the places out, with `proportional_parameters`."""
        if not self.proportional_parameters:
            return self
        sizes = {site.name: site.n_in * site.n_out for site in sites}
        each = self.n_frequency * len(sizes) / sum(sizes.values())
        shares = {name: max(1, round(size * each)) for name, size in sizes.items()}
        return replace(self, n_frequency_pattern=shares)

    def per_site(self, site: Site) -> Self:
        """Resolve the pattern, and check that there are as many places."""
        count = matching(self.n_frequency_pattern, site.name, self.n_frequency)
        if count > site.n_in * site.n_out:
            raise ShapeError(
                f"{site.name}: n_frequency={count} cannot be placed in {site.n_in * site.n_out} "
                "entries"
            )
        return replace(self, n_frequency=count)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The values of C: zero, unless `init_weights` is false."""
        return {"waveft_spectrum": normal(self.n_frequency, std=0.01 * (not self.init_weights))}

    def delta(self, p: Params, site: Site) -> Array:
        """Place the values, and synthesise."""
        return synthesised(*self._given(p, site))

    def onto(self, p: Params, weight: Array, site: Site, *, minus: bool = False) -> Array:
        """Add ΔW's entries, or take them away, where they are few."""
        few = entries(*self._given(p, site))
        if few is None:
            return super().onto(p, weight, site, minus=minus)
        return added_at(weight, *few, minus=minus)

    def _given(self, p: Params, site: Site) -> Any:
        """C's values, their places, C's shape, and the filter."""
        places = random_places(self.random_loc_seed, site.n_out * site.n_in, self.n_frequency)
        lo = FILTERS[self.wavelet_family] if self.use_idwt else None
        return self.scaling * p["waveft_spectrum"], places, (site.n_out, site.n_in), lo

    # One product with the merged weight costs less than two.
    forward = Tuner.forward
