"""PVeRA: probabilistic VeRA. Fillioux et al. 2025, https://arxiv.org/abs/2512.07703."""

from collections.abc import Sequence
from operator import mul
from typing import ClassVar

from peft_any.backend import namespace
from peft_any.contract import Additive, Array, Fresh, Kind, Layer, Noise, Params, Shape, Site
from peft_any.factors import paired
from peft_any.fields import Biases, ByLayer, Count, FanInFanOut, Rate
from peft_any.initial import full, normal, ones, zeros
from peft_any.layer import linear
from peft_any.outputs import added, scaled, spread
from peft_any.projections import drawn, largest, own_part


class PveraConfig(
    Additive, Biases, ByLayer, FanInFanOut, peft_type="PVERA", prefix="pvera_lambda_"
):
    """ΔW = diag(b)·B·diag(d₁)·A₁, the mean of what training draws; trained are b (n_out,), d (2r,).

    All sites share the frozen A (2r, widest n_in) and B (widest n_out, r), each reading its first
    columns of A and rows of B. (μ, log σ²) = d ⊙ A·x, r numbers each; in training
    y = W·x + b ⊙ B·z with z ~ N(μ, σ²), else z = μ.

    projection_prng_key: seed of A and B, uniform, drawn by torch's CPU generator.
    save_projection: whether the file holds A and B; else they are drawn again, bit for bit.
    d_initial: d's initial value; b = 0.
    sample_at_inference, generator_seed: Hugging Face PEFT draws z when it applies the adapter,
        too, never when it merges; here the mean is applied.
    init_weights: false: d standard normal, b = 1.
    """

    draws: ClassVar[bool] = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    frozen: ClassVar[frozenset[str]] = frozenset({"pvera_A", "pvera_B"})

    r: Count = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: Rate = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def shapes(self, site: Site) -> dict[str, Shape]:
        """d, constant, and b, zero."""
        if not self.init_weights:
            return {"pvera_lambda_d": normal(2 * self.r), "pvera_lambda_b": ones(site.n_out)}
        d = full(self.d_initial, 2 * self.r)
        return {"pvera_lambda_d": d, "pvera_lambda_b": zeros(site.n_out)}

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """A and B, as large as the largest of the sites needs."""
        widest, tallest = largest(sites)
        return {"pvera_A": (2 * self.r, widest), "pvera_B": (tallest, self.r)}

    def init_shared(self, sites: Sequence[Site], new: Fresh) -> Params:
        """Draw A, then B, as HF PEFT does."""
        return drawn(self.shared_shapes(sites), self.projection_prng_key, new)

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give diag(b)·B·diag(d₁) (n_out, r) and A₁ (r, n_in)."""
        a, b, r = *self._own(p, site), self.r
        rows = spread(mul, b, namespace(a).reshape(p["pvera_lambda_b"], (-1, 1)))
        return scaled(rows, p["pvera_lambda_d"][:r]), a[:r, :]

    def prepare(self, p: Params, base: Layer) -> Params:
        """Form the factors once, for calls."""
        return paired(self, p, base.site)

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """b ⊙ B·μ."""
        if "u" in p:
            return super().residual(p, x, site)
        a, b, r = *self._own(p, site), self.r
        mean = linear(x, a[:r, :]) * p["pvera_lambda_d"][:r]
        return linear(mean, b) * p["pvera_lambda_b"]

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Draw z, from a thinned input."""
        a, b = self._own(p, base.site)
        thin = noise.at("input").thinned(x, self.pvera_dropout)
        both = linear(thin, a) * p["pvera_lambda_d"]
        mean, spread = both[..., : self.r], namespace(both).exp(0.5 * both[..., self.r :])
        z = mean + spread * noise.at("latent").normal(tuple(mean.shape), mean)
        return added(base, x, linear(z, b) * p["pvera_lambda_b"])

    def _own(self, p: Params, site: Site) -> tuple[Array, Array]:
        """The site's part of A (2r, n_in) and B (n_out, r)."""
        return own_part(p["pvera_A"], p["pvera_B"], site, 2 * self.r, self.r)
