"""RoAd: 2D rotary adaptation. Liao & Monz 2024, https://arxiv.org/abs/2409.00119."""

from typing import Annotated, ClassVar, Literal, Self

from peft_any.backend import namespace, summed
from peft_any.checks import check_divides
from peft_any.contract import Array, Dense, Kind, Layer, Params, Shape, Site, Tuner
from peft_any.fields import Count, Rule
from peft_any.initial import normal

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""Angles for each output."""


class RoadConfig(Tuner, peft_type="ROAD"):
    """y′ = R·y: each pair of outputs (u, v) becomes α·(u·cos θ − v·sin θ, v·cos θ + u·sin θ).

    y is the base's output, bias included. Outputs form groups of `group_size` g; a group's first
    half pairs with its second. `road_theta` θ and `road_alpha` α hold one number

    variant: for each pair ("road_1"), each output ("road_2"), or each term of each output
        ("road_4": within a group first those of the cosines, then those of the sines).
    group_size: g, even, a divisor of n_out.
    init_weights: true (θ = 0, α = 1) or false (off by a standard deviation of 0.5).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[Count, Rule(lambda g: g % 2 == 0, "even")] = 64
    init_weights: bool = True

    def per_site(self, site: Site) -> Self:
        """Check that the groups fit."""
        check_divides("group_size", self.group_size, site, inputs=False)
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """Angles and scales: no rotation, no scale."""
        size, std = int(site.n_out * _SIZES[self.variant]), 0.0 if self.init_weights else 0.5
        return {"road_theta": normal(size, std=std), "road_alpha": normal(size, std=std, mean=1.0)}

    def changes_bias(self, site: Site) -> bool:
        """It turns with the outputs."""
        return True

    def terms(self, p: Params) -> tuple[Array, Array]:
        """α·cos θ and ∓α·sin θ, each (groups, 2, g/2): R·(u, v) = (u, v) ⊙ one + (v, u) ⊙ other."""
        if "own" in p:
            return p["own"], p["other"]
        xp, half = namespace(p["road_theta"]), self.group_size // 2
        each = {"road_1": 1, "road_2": 2, "road_4": 4}[self.variant]
        theta, alpha = (xp.reshape(p[k], (-1, each, half)) for k in ("road_theta", "road_alpha"))
        last = 2 if each == 4 else 0  # of four, the last two are the sines'
        first = each - last
        cos = alpha[:, :first, :] * xp.cos(theta[:, :first, :])
        sin = alpha[:, last:, :] * xp.sin(theta[:, last:, :])
        own = xp.concat([cos[:, :1, :], cos[:, -1:, :]], axis=1)
        return own, xp.concat([-sin[:, :1, :], sin[:, -1:, :]], axis=1)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Compute the terms once."""
        own, other = self.terms(p)
        return {**p, "own": own, "other": other}

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """R·base(x)."""
        y, (own, other) = base(x), self.terms(p)
        xp = namespace(y, own)
        pairs = xp.reshape(y, (*y.shape[:-1], *own.shape))
        return xp.reshape(pairs * own + xp.flip(pairs, axis=-2) * other, y.shape)

    def merge(self, p: Params, base: Dense) -> Dense:
        """R·W and R·b."""
        return _turned(base, *self.terms(p))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """R⁻¹·W′ and R⁻¹·b′, by the inverse of each pair's 2 × 2 matrix; NaN where it has none."""
        own, other = self.terms(p)
        flip = namespace(own).flip
        det = own[:, :1, :] * own[:, 1:, :] - other[:, :1, :] * other[:, 1:, :]
        return _turned(merged, flip(own, axis=1) / det, -other / det)


def _turned(layer: Dense, own: Array, other: Array) -> Dense:
    """Turn the rows of the weight, and the bias."""
    xp = namespace(layer.weight, own)

    def turn(a: Array) -> Array:
        pairs, one, two = (xp.reshape(t, (*own.shape, -1)) for t in (a, own, other))
        return xp.reshape(summed(pairs * one, xp.flip(pairs, axis=1) * two, ()), a.shape)

    bias = None if layer.bias is None else turn(layer.bias)
    return layer.replace(weight=turn(layer.weight), bias=bias)
