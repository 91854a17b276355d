"""RandLoRA: full rank from random bases. Albert et al. 2025, https://arxiv.org/abs/2502.00987."""

from collections.abc import Sequence
from math import sqrt
from typing import ClassVar

from peft_any.backend import namespace
from peft_any.contract import Additive, Array, Dense, Fresh, Kind, Layer, Params, Shape, Site
from peft_any.errors import ConfigError
from peft_any.fields import Biases, ByLayer, Count, FanInFanOut, Rate
from peft_any.initial import full, normal, zeros
from peft_any.layer import linear, merged_for_calls
from peft_any.linalg import khatri_rao
from peft_any.projections import largest, random_bases


class RandLoraConfig(Additive, Biases, ByLayer, FanInFanOut, peft_type="RANDLORA"):
    """ΔW = s·B̂·Û, or its transpose where n_out < n_in, with s = α/r.

    Let d and D be the smaller and the larger of n_in and n_out, and q = ⌈d/r⌉. Û (q·r, d) has the
    rows λ[k, j]·A[k, 0, :d] ⊙ γ[j], in the order k·q + j, and B̂ (D, q·r) is B[:D, :q], flat, in
    the order j·r + k: Hugging Face PEFT does not pair them as the paper does. Trained are
    `randlora_lambda` λ (r, q) and `randlora_gamma` γ (q, d).

    All sites share the frozen A (r, 1, largest d) and B (largest D, largest q, r), which a file
    also holds once more for every site.

    projection_prng_key: seed of A and B, each divided by its standard deviation.
    save_projection: whether the file holds A and B; else they are drawn again. Hugging Face PEFT
        draws B in bfloat16 or, on machines without it, float16: bfloat16 is taken here.
    sparse, very_sparse: A and B of −1, 0 and 1, a sixth, or 1/(2·√d), of them of either sign.
    randlora_alpha: α.
    init_weights: true (λ = 0, γ = 1/max(q, d)) or false (λ normal, γ = 1/D).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    frozen: ClassVar[frozenset[str]] = frozenset({"randlora_A", "randlora_B"})
    copied: ClassVar[frozenset[str]] = frozen
    thins: ClassVar[str] = "randlora_dropout"

    r: Count = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Rate = 0.0
    randlora_alpha: float = 640
    init_weights: bool = True

    def _sizes(self, n: int, m: int) -> tuple[int, int, int]:
        """The smaller and the larger size, and how many bases the smaller needs."""
        return min(n, m), max(n, m), -(-min(n, m) // self.r)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """λ, zero, and γ, constant."""
        d, most, q = self._sizes(site.n_in, site.n_out)
        if not self.init_weights:
            return {"randlora_lambda": normal(self.r, q), "randlora_gamma": full(1 / most, q, d)}
        return {"randlora_lambda": zeros(self.r, q), "randlora_gamma": full(1 / max(q, d), q, d)}

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, Shape]:
        """A and B, as large as the largest of the sites needs."""
        d, most, q = self._sizes(*largest(sites))
        return {"randlora_A": (self.r, 1, d), "randlora_B": (most, q, self.r)}

    def init_shared(self, sites: Sequence[Site], new: Fresh) -> Params:
        """Draw A, then B, as HF PEFT does."""
        of_a, of_b = self.shared_shapes(sites).values()
        among = sqrt(of_a[2]) if self.very_sparse else 3.0 if self.sparse else None
        a, b = random_bases(of_a, of_b, self.projection_prng_key, among, new)
        return {"randlora_A": a, "randlora_B": b}

    def delta(self, p: Params, site: Site) -> Array:
        """s·B̂·Û, or its transpose."""
        b, scale, u = self._terms(p, site)
        xp = namespace(u)
        product = b @ (xp.reshape(scale, (-1, 1)) * u)
        return product if site.n_in == u.shape[1] else xp.matrix_transpose(product)

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Two products with the batch, by the terms or their transposes."""
        b, scale, u = self._terms(p, site)
        if site.n_in != u.shape[1]:
            flip = namespace(u).matrix_transpose
            b, u = flip(u), flip(b)
        return linear(linear(x, u) * scale, b)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Merge, for calls."""
        return merged_for_calls(self, p, base)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """Apply what `prepare` has merged, or the terms."""
        merged: Dense | None = p.get("merged")
        return super().forward(p, x, base) if merged is None else merged(x)

    def _terms(self, p: Params, site: Site) -> tuple[Array, Array, Array]:
        """B̂, s·λ by the rows of Û, and these without it: ΔW is their product, or its transpose."""
        a, b, (d, most, q) = p["randlora_A"], p["randlora_B"], self._sizes(site.n_in, site.n_out)
        if a.shape[2] < d or b.shape[0] < most or b.shape[1] < q or a.shape[0] != self.r:
            raise ConfigError(
                f"{site.name}: bases A {tuple(a.shape)} and B {tuple(b.shape)} cannot adapt it: "
                f"A is ({self.r}, 1, {d} or more), B ({most} or more, {q} or more, {self.r})"
            )
        xp = namespace(a, p["randlora_gamma"])
        scale = (self.randlora_alpha / self.r) * xp.reshape(p["randlora_lambda"], (-1,))
        rows = xp.reshape(b[:most, :q, :], (most, q * self.r))
        return rows, scale, khatri_rao(a[:, 0, :d], p["randlora_gamma"])
