"""LoHa: low-rank Hadamard product (FedPara). Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098."""

from dataclasses import field, replace
from math import prod
from struct import pack, unpack
from typing import ClassVar, Self

from peft_any.backend import namespace
from peft_any.contract import Additive, Array, Kind, Layer, Params, Shape, Site
from peft_any.fields import ByLayer, Count, Excludes, Rate
from peft_any.initial import kaiming, zeros
from peft_any.layer import linear
from peft_any.linalg import khatri_rao, tucker
from peft_any.patterns import matching

PASS = 24
"""What reading, multiplying and writing one entry costs, in multiply-adds of a matrix product."""


class LoHaConfig(Additive, ByLayer, Excludes, peft_type="LOHA", prefix="hada_"):
    """ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b), w·_a (n_out, r), w·_b (r, width), s = α/r.

    use_effective_conv2d: a convolution whose kernel has more than one position takes each factor
        in Tucker form (the paper's Proposition 3), Σ t[i, j, κ]·w_a[i, o]·w_b[j, c], with
        w·_a (r, n_out), w·_b (r, n_in/groups) and t· (r, r, kernel).
    rank_pattern, alpha_pattern: r and α of the sites whose names match.
    init_weights: true (w2_b = 0, all others uniform) or false (all uniform).
    rank_dropout, module_dropout: in training only.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1d", "Conv2d"})
    separable: ClassVar[bool] = True

    order: ClassVar[int] = 2
    r: Count = 8
    alpha: float = 8
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    init_weights: bool = True

    @property
    def scaling(self) -> float:
        """α/r."""
        # HF holds it in single precision, whatever the dtype of the layer.
        return float(unpack("f", pack("f", self.alpha / self.r))[0])

    def per_site(self, site: Site) -> Self:
        """Resolve the patterns."""
        rank = matching(self.rank_pattern, site.name, self.r)
        alpha = matching(self.alpha_pattern, site.name, self.alpha)
        return replace(self, r=rank, alpha=alpha)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """Two pairs of factors, and their cores in Tucker form: uniform, but w2_b zero."""
        r = self.r
        a: Shape = (site.n_out, r)
        b: Shape = (r, site.width)
        cores: dict[str, Shape] = {}
        if self.use_effective_conv2d and prod(site.kernel) > 1:
            a, b = (r, site.n_out), (r, site.n_in // site.groups)
            # HF gives a Conv1d's core a second spatial axis, of size 1.
            core = kaiming(r, r, *(*site.kernel, 1)[:2])
            cores = {"hada_t1": core, "hada_t2": core}
        left, right, blank = kaiming(*a), kaiming(*b), zeros if self.init_weights else kaiming
        pairs = {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": blank(*b)}
        return {**pairs, **cores}

    def _pairs(self, p: Params) -> tuple[Array, Array, Array, Array]:
        """s·w1_aᵀ (r, n_out), w1_b (r, width), w2_aᵀ (r, n_out), w2_b (r, width)."""
        a1, b1, a2, b2 = (p[f"hada_w{k}"] for k in ("1_a", "1_b", "2_a", "2_b"))
        if "hada_t1" in p:
            b1, b2 = tucker(p["hada_t1"], b1), tucker(p["hada_t2"], b2)
        else:
            xp = namespace(a1, a2)
            a1, a2 = xp.matrix_transpose(a1), xp.matrix_transpose(a2)
        return self.scaling * a1, b1, a2, b2

    def delta(self, p: Params, site: Site) -> Array:
        """s·(w1_a·w1_b) ⊙ (w2_a·w2_b)."""
        a1, b1, a2, b2 = self._pairs(p)
        xp = namespace(a1, b1, a2, b2)
        # One expression: NumPy then multiplies into the first product instead of a third array.
        return (xp.matrix_transpose(a1) @ b1) * (xp.matrix_transpose(a2) @ b2)

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give the r² products of rows, where they are fewer than ΔW's."""
        if self.r**2 >= min(site.n_out, site.width):
            return super().factors(p, site)
        into, out = self._with_rows(p)["rows"]
        return namespace(out).matrix_transpose(out), into

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Σᵢⱼ over the r² products of rows i and j, unless forming ΔW is cheaper."""
        m, n, r, tokens = site.n_out, site.width, self.r, prod(x.shape[:-1])
        if "rows" not in p:
            if r * r * (m + n) * (tokens + PASS) >= m * n * (2 * r + tokens + 2 * PASS):
                return super().residual(p, x, site)
            p = self._with_rows(p)
        into, out = p["rows"]
        return linear(x, into) @ out

    def prepare(self, p: Params, base: Layer) -> Params:
        """Form the products of rows once, where they are fewer than ΔW's entries."""
        m, n, r = base.site.n_out, base.site.width, self.r
        return self._with_rows(p) if r * r * (m + n) < m * n else p

    def _with_rows(self, p: Params) -> Params:
        a1, b1, a2, b2 = self._pairs(p)
        return {**p, "rows": (khatri_rao(b1, b2), khatri_rao(a1, a2))}
