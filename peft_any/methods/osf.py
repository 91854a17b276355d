"""OSF: orthogonal subspace fine-tuning. Nayak et al. 2025, https://arxiv.org/abs/2504.07097."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from peft_any._typing import Array, Params, Shape
from peft_any.backend import detach, namespace, to_numpy
from peft_any.errors import ConfigError, ShapeError
from peft_any.layer import Dense, Kind, Layer, Site, linear, widen
from peft_any.method import Tuner
from peft_any.patterns import expression
from peft_any.rng import Fresh


@dataclass(frozen=True, kw_only=True)
class OSFConfig(Tuner, peft_type="OSF", prefix="osf_"):
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
        k = min(site.n_out, site.n_in) - int(self.effective_rank or 0)
        if k < 1:
            raise ShapeError(
                f"{site.name}: effective_rank={self.effective_rank} leaves no direction to train"
            )
        of = {"U": (site.n_out, k), "S": (k,), "V": (k, site.n_in)}
        return {f"osf_svd_params.{name}_low": shape for name, shape in of.items()}

    def init(self, site: Site, new: Fresh) -> Params:
        """The smallest singular values of W and their vectors."""
        shapes = self.shapes(site)
        if self.init_weights is False:
            return {name: new.normal(shape) for name, shape in shapes.items()}
        (_,), base = widen([{}], new.base_for(site.name, "osf_svd_params"))
        low = self._split(to_numpy(base.weight))[1]  # on the host: signs are each library's own
        return {name: new.array(a) for name, a in zip(shapes, low, strict=True)}

    def prepare(self, p: Params, base: Layer) -> Params:
        """Decompose W once."""
        return {**p, "split": self._split(base.original)}

    def product(self, p: Params, base: Layer) -> tuple[Array, Array]:
        """[U·diag(S), −L's] and [V; L's]."""
        (u_high, _, v_high), (u0, s0, v0) = p.get("split") or self._split(base.original)
        u, s, v = (p[f"osf_svd_params.{name}_low"] for name in "USV")
        xp, flip = namespace(u), namespace(u).matrix_transpose
        u = _apart(u, u_high @ (flip(u_high) @ u))
        v = _apart(v, (v @ flip(v_high)) @ v_high)
        return xp.concat([u * s, -(u0 * s0)], axis=1), xp.concat([v, v0], axis=0)

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + U·diag(S)·V − L."""
        left, right = self.product(p, base)
        return base.replace(weight=base.weight + left @ right)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x), and the products one after the other."""
        left, right = self.product(p, base)
        y: Array = base(x) + linear(linear(x, right), left)
        return y

    def _split(self, weight: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Decompose W: the h largest singular values with their vectors, and the rest."""
        u, s, v = namespace(weight).linalg.svd(detach(weight), full_matrices=False)
        h = int(self.effective_rank or 0)
        return (u[:, :h], s[:h], v[:h, :]), (u[:, h:], s[h:], v[h:, :])


def _apart(a: Array, kept: Array) -> Array:
    """Give `a`, whose gradient has no part along what is kept."""
    same: Array = detach(kept) + (a - kept)
    return same
