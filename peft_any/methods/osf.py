"""OSF: orthogonal subspace fine-tuning. Nayak et al. 2025, https://arxiv.org/abs/2504.07097."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import ClassVar, Self

from peft_any._tree import without
from peft_any.backend import detach, namespace, plus_product, to_numpy
from peft_any.contract import Array, Dense, Fresh, Kind, Layer, Params, Shape, Site, Tuner
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import linear, merged_for_calls, widen
from peft_any.outputs import added
from peft_any.patterns import expression

_KNOWN = ("osf_high_U", "osf_high_V", "osf_low_U", "osf_low_V")
"""What W says for good: the vectors of its h largest singular values, and L as two factors."""


class OSFConfig(Tuner, peft_type="OSF"):
    """W′ = W − L + U·diag(S)·V, where L holds all but the h largest singular values of W.

    Trained are `osf_svd_params.U_low` U (n_out, k), `.S_low` S (k,) and `.V_low` V (k, n_in), k =
    min(n_out, n_in) − h, which start as L's. Their gradients lose what lies in the directions of
    the h largest, so that those stay as they are.

    effective_rank: h; from 0 to 1 a share of the smaller side; null: half of it.
    rank_pattern: h by site: the first regular expression that is found in its name.
    init_weights: true (L's), or false (all standard normal).
    target_svd_config: no effect, as in Hugging Face PEFT.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    needs: ClassVar[tuple[str, ...]] = ("linalg",)
    inner: ClassVar[str] = "U_low|S_low|V_low"
    frozen: ClassVar[frozenset[str]] = frozenset(_KNOWN)
    certain: ClassVar[bool] = True

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    def per_site(self, site: Site) -> Self:
        """Resolve h, as HF reads it: a float up to 1 is a share, anything else a number."""
        side, h = min(site.n_out, site.n_in), self.effective_rank
        for pattern, value in (self.rank_pattern or {}).items():
            if expression(pattern, f"{self.where}: rank_pattern").search(site.name):
                h = value
                break
        if h is None:
            h = side // 2
        elif isinstance(h, float) and 0 < h <= 1:
            h = int(side * h)
        if int(h) < 1:
            raise ConfigError(
                f"{site.name}: effective_rank={h} cannot be kept of {side} directions: give at "
                "least 1, or a share"
            )
        return replace(self, effective_rank=min(int(h), side), rank_pattern=None)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """U, S and V."""
        side = min(site.n_out, site.n_in)
        k = side - int(self.effective_rank or 0)
        if k < 1:
            raise ShapeError(
                f"{site.name}: effective_rank={self.effective_rank} keeps all {side} directions, "
                "and leaves none to train: give less; an adapter so saved changes nothing"
            )
        of = {"U": (site.n_out, k), "S": (k,), "V": (k, site.n_in)}
        return {f"osf_svd_params.{name}_low": shape for name, shape in of.items()}

    def init(self, site: Site, new: Fresh) -> Params:
        """The smallest singular values of W and their vectors, and what W says for good."""
        (_,), base = widen([{}], new.base_for(site.name, "osf_svd_params"))
        parts = self._split(to_numpy(base.weight))  # on the host: signs are each library's own
        p = {k: new.array(a) for k, a in zip(_KNOWN, _known(*parts), strict=True)}
        if self.init_weights is False:
            return {name: new.normal(shape) for name, shape in self.shapes(site).items()} | p
        return {k: new.array(a) for k, a in zip(self.shapes(site), parts[1], strict=True)} | p

    def lacks(self, p: Params) -> str | None:
        """The singular vectors of W."""
        return None if self.frozen <= p.keys() else "the singular vectors of the weight"

    def rederive(self, p: Params, site: Site, new: Fresh) -> Params:
        """Decompose W."""
        _, base = widen([p], new.base_for(site.name, "osf_svd_params"))
        return p | dict(zip(_KNOWN, _known(*self._split(base.weight)), strict=True))

    def portable(self, sites: Mapping[str, Params]) -> tuple[Self, dict[str, Params]]:
        """Leave out what W says."""
        return self, without(sites, self.frozen)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Merge, for calls."""
        return merged_for_calls(self, p, base)

    def product(self, p: Params, base: Layer) -> tuple[Array, Array]:
        """[U·diag(S), −L's] and [V; L's]."""
        (u, v, u0, v0), xp = self._factors(p, base), namespace(p["osf_svd_params.U_low"])
        return xp.concat([u, -u0], axis=1), xp.concat([v, v0], axis=0)

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + U·diag(S)·V − L."""
        u, v, u0, v0 = self._factors(p, base)
        more = plus_product(base.weight, u, v)
        return base.replace(weight=plus_product(more, u0, v0, minus=True, owned=True))

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """Projects the cotangents of few rows, or the parameters' as `product` does."""
        if (merged := p.get("merged")) is not None:
            return merged(x)
        (u_high, v_high, u0, v0), (u, s, v) = self._parts(p, base)
        if prod(x.shape[:-1]) > v.shape[0]:
            left, right = self.product(p, base)
            return added(base, x, linear(linear(x, right), left))
        flip = namespace(u).matrix_transpose
        z = s * (linear(x, v) + linear(linear(x, v_high) @ v_high, detach(v) - v))
        kept = linear(z, detach(u) - u)  # zero, but for its gradient
        y = linear(z, u) + linear(linear(kept, flip(u_high)), u_high)
        return added(base, x, y - linear(linear(x, v0), u0))

    def _factors(self, p: Params, base: Layer) -> tuple[Array, Array, Array, Array]:
        (u_high, v_high, u0, v0), (u, s, v) = self._parts(p, base)
        flip = namespace(u).matrix_transpose
        u = _apart(u, lambda a: u_high @ (flip(u_high) @ a))
        return u * s, _apart(v, lambda a: (a @ flip(v_high)) @ v_high), u0, v0

    def _parts(self, p: Params, base: Layer) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """What W says for good, and U, S and V."""
        held = _known(*self._split(base.original)) if self.lacks(p) else tuple(p[k] for k in _KNOWN)
        return held, tuple(p[f"osf_svd_params.{name}_low"] for name in "USV")

    def _split(self, weight: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Decompose W: the h largest singular values with their vectors, and the rest."""
        u, s, v = namespace(weight).linalg.svd(detach(weight), full_matrices=False)
        h = int(self.effective_rank or 0)
        return (u[:, :h], s[:h], v[:h, :]), (u[:, h:], s[h:], v[h:, :])


def _known(high: tuple[Array, ...], low: tuple[Array, ...]) -> tuple[Array, ...]:
    return high[0], high[2], low[0] * low[1], low[2]


def _apart(a: Array, part: Callable[[Array], Array]) -> Array:
    """Give `a`, whose gradient has no share in the part that a projection keeps of it."""
    fixed = detach(a)
    return a if fixed is a else a - part(a - fixed)
