"""LoKr: low-rank Kronecker product (LyCORIS). Yeh et al. 2023, https://arxiv.org/abs/2309.14859."""

from dataclasses import field, replace
from math import prod
from typing import ClassVar, Literal, Self

from peft_any.backend import namespace, summed
from peft_any.contract import Additive, Array, Dense, Fresh, Kind, Params, Shape, Site
from peft_any.fields import ByLayer, Count, Excludes, Rate
from peft_any.layer import flat
from peft_any.linalg import factored, factorize, kron_factors, linear_kron, tucker
from peft_any.patterns import matching


class LoKrConfig(Additive, ByLayer, Excludes, peft_type="LOKR"):
    """ΔW = s·w1 ⊗ w2, with w1 (l, p), w2 (k, q·kernel), n_out = l·k, n_in/groups = p·q, s = α/r.

    w2 = w2_a·w2_b, (k, r) and (r, q·kernel), where r < max(k, q)/2; s is α/r even where it is not.

    decompose_both: w1 = w1_a·w1_b, (l, r) and (r, p), where r < max(l, p)/2.
    decompose_factor: l and p, or their upper bound; -1: the most equal factors.
    use_effective_conv2d: a low-rank w2 of a convolution whose kernel has more than one position
        is Σ t2[i, j, κ]·w2_a[i, k]·w2_b[j, q], w2_a (r, k), w2_b (r, q), t2 (r, r, kernel).
    rank_pattern, alpha_pattern: r and α of the sites whose names match.
    init_weights: true (w1 or w1_a zero, all others uniform), "lycoris" (w2 or w2_b zero), or
        false (all uniform).
    rank_dropout, rank_dropout_scale, module_dropout: in training only.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1d", "Conv2d"})

    order: ClassVar[int] = 0
    r: Count = 8
    alpha: float = 8
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    init_weights: bool | Literal["lycoris"] = True

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.r

    def per_site(self, site: Site) -> Self:
        """Resolve the patterns."""
        rank = matching(self.rank_pattern, site.name, self.r)
        alpha = matching(self.alpha_pattern, site.name, self.alpha)
        return replace(self, r=rank, alpha=alpha)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """w1 and w2, whole or as factors."""
        r, kernel = self.r, site.kernel
        rows, k = factorize(site.n_out, self.decompose_factor)
        p, q = factorize(site.n_in // site.groups, self.decompose_factor)
        shapes: dict[str, Shape] = {"lokr_w1": (rows, p)}
        if self.decompose_both and r < max(rows, p) / 2:
            shapes = {"lokr_w1_a": (rows, r), "lokr_w1_b": (r, p)}
        if r >= max(k, q) / 2:
            return shapes | {"lokr_w2": (k, q, *kernel)}
        if self.use_effective_conv2d and prod(kernel) > 1:
            # HF gives a Conv1d's core a second spatial axis, of size 1.
            core = (r, r, *(*kernel, 1)[:2])
            return shapes | {"lokr_t2": core, "lokr_w2_a": (r, k), "lokr_w2_b": (r, q)}
        return shapes | {"lokr_w2_a": (k, r), "lokr_w2_b": (r, q * prod(kernel))}

    def init(self, site: Site, new: Fresh) -> Params:
        """All uniform but one factor, which is zero."""
        zeros = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b")}
        zero, shapes = zeros.get(self.init_weights, ()), self.shapes(site)
        return {k: (new.zeros if k in zero else new.kaiming)(s) for k, s in shapes.items()}

    def _pair(self, p: Params) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """s·w1 and w2, each as one flat matrix or two whose product it is."""
        w1 = (p["lokr_w1"],) if "lokr_w1" in p else factored(p["lokr_w1_a"], p["lokr_w1_b"])
        left = (self.scaling * w1[0], *w1[1:])
        if "lokr_w2" in p:
            return left, (flat(p["lokr_w2"]),)
        a, b = p["lokr_w2_a"], p["lokr_w2_b"]
        if "lokr_t2" in p:
            a, b = namespace(a).matrix_transpose(a), tucker(p["lokr_t2"], b)
        return left, factored(a, b)

    def delta(self, p: Params, site: Site) -> Array:
        """s·w1 ⊗ w2."""
        w1, w2 = self._spread(p, site)
        return namespace(w1, w2).reshape(w1 * w2, (site.n_out, site.width))

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + ΔW."""
        return self._plus(base, p, 1.0)

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """W′ − ΔW: exact but for one rounding of each sum."""
        return self._plus(merged, p, -1.0)

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give u₁ ⊗ u₂ and v₁ ⊗ v₂, where s·w1 = u₁·v₁ and w2 = u₂·v₂."""
        return kron_factors(*self._pair(p)) if self._is_kron(p, site) else super().factors(p, site)

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """w1·X·w2ᵀ for every x as a matrix X (p, q)."""
        whole = not self._is_kron(p, site)
        return super().residual(p, x, site) if whole else linear_kron(x, *self._pair(p))

    def _plus(self, base: Dense, p: Params, sign: float) -> Dense:
        w1, w2 = self._spread(p, base.site)
        xp, blocks = namespace(base.weight), tuple(map(max, w1.shape, w2.shape))
        weight = summed(xp.reshape(base.weight, blocks), (sign * w1) * w2, ())
        return base.replace(weight=xp.reshape(weight, tuple(base.weight.shape)))

    def _spread(self, p: Params, site: Site) -> tuple[Array, Array]:
        """s·w1 and w2, their axes apart so that w1 * w2 is ΔW in blocks."""
        w1, w2 = (f[0] if len(f) == 1 else f[0] @ f[1] for f in self._pair(p))
        xp = namespace(w1, w2)
        left: Shape = (w1.shape[0], 1, w1.shape[1], 1)
        right: Shape = (1, w2.shape[0], 1, w2.shape[1])
        if not self._is_kron(p, site):
            k, q, taps = p["lokr_w2"].shape
            left, right = (1, *left), (k, 1, q, 1, taps)
        return xp.reshape(w1, left), xp.reshape(w2, right)

    def _is_kron(self, p: Params, site: Site) -> bool:
        """Whether ΔW is a Kronecker product of matrices."""
        # HF takes the product of w1 with a Conv1d's whole, 3-D w2, then reads it in W's shape.
        return site.kind != "Conv1d" or "lokr_w2" not in p
