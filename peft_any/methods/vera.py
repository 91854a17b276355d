"""VeRA: vector-based random matrix adaptation. Kopiczko et al. 2024, https://arxiv.org/abs/2310.11454."""

from collections.abc import Sequence
from operator import mul
from typing import ClassVar

from peft_any.backend import namespace
from peft_any.contract import Additive, Array, Fresh, Kind, Layer, Params, Shape, Site
from peft_any.factors import paired
from peft_any.fields import Biases, ByLayer, Count, FanInFanOut, Rate
from peft_any.initial import full, normal, ones, zeros
from peft_any.layer import linear
from peft_any.outputs import scaled, spread
from peft_any.projections import drawn, largest, own_part


class VeraConfig(Additive, Biases, ByLayer, FanInFanOut, peft_type="VERA", prefix="vera_lambda_"):
    """ΔW = diag(b)·B·diag(d)·A, with the trained vectors b (n_out,) and d (r,).

    All sites share the frozen A (r, widest n_in) and B (widest n_out, r), each reading its first
    columns of A and rows of B.

    projection_prng_key: seed of A and B, uniform, drawn by torch's CPU generator.
    save_projection: whether the file holds A and B; else they are drawn again, bit for bit.
    d_initial: d's initial value; b = 0.
    init_weights: false: d standard normal, b = 1.
    """

    thins: ClassVar[str] = "vera_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    frozen: ClassVar[frozenset[str]] = frozenset({"vera_A", "vera_B"})

    r: Count = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Rate = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def shapes(self, site: Site) -> dict[str, Shape]:
        """d, constant, and b, zero."""
        if not self.init_weights:
            return {"vera_lambda_d": normal(self.r), "vera_lambda_b": ones(site.n_out)}
        d = full(self.d_initial, self.r)
        return {"vera_lambda_d": d, "vera_lambda_b": zeros(site.n_out)}

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """A and B, as large as the largest of the sites needs."""
        widest, tallest = largest(sites)
        return {"vera_A": (self.r, widest), "vera_B": (tallest, self.r)}

    def init_shared(self, sites: Sequence[Site], new: Fresh) -> Params:
        """Draw A, then B, as HF PEFT does."""
        return drawn(self.shared_shapes(sites), self.projection_prng_key, new)

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give diag(b)·B·diag(d) and A."""
        a, b = self._own(p, site)
        gain = namespace(b).reshape(p["vera_lambda_b"], (site.n_out, 1))
        return scaled(spread(mul, b, gain), p["vera_lambda_d"]), a

    def prepare(self, p: Params, base: Layer) -> Params:
        """Form the factors once, for calls."""
        return paired(self, p, base.site)

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """b ⊙ B·(d ⊙ A·x)."""
        if "u" in p:
            return super().residual(p, x, site)
        a, b = self._own(p, site)
        return linear(linear(x, a) * p["vera_lambda_d"], b) * p["vera_lambda_b"]

    def _own(self, p: Params, site: Site) -> tuple[Array, Array]:
        """The site's part of A (r, n_in) and B (n_out, r)."""
        return own_part(p["vera_A"], p["vera_B"], site, self.r, self.r)
