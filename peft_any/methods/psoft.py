"""PSOFT: orthogonal fine-tuning in the principal subspace. Wu et al. 2025, https://arxiv.org/abs/2505.11235."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from peft_any.backend import namespace
from peft_any.blocks import cayley, cayley_neumann, drawn_back, skew
from peft_any.contract import Additive, Array, Fresh, Kind, Layer, Params, Shape, Site
from peft_any.decompositions import host_weight, leading_svd, seeded_svd
from peft_any.errors import ShapeError
from peft_any.fields import (
    ByLayer,
    Count,
    Excludes,
    FanInFanOut,
    Inside,
    Positive,
    Rate,
    within,
)


class PsoftConfig(Additive, ByLayer, Excludes, FanInFanOut, peft_type="PSOFT"):
    """ΔW = s·B·(R − I)·A, where R = diag(b)·Q·diag(a) turns r principal directions, s = α/r.

    `psoft_A` A (r, n_in) and `psoft_B` B (n_out, r) are of the base's r largest singular values,
    W ≈ s·B·A, and frozen. Trained are `psoft_R.weight`, the upper triangle, row by row, of the
    skew-symmetric matrix (r, r) of which Q is Cayley's rotation, and `psoft_R.vector_a` a (r,) and
    `psoft_R.vector_b` b (r,). Hugging Face PEFT's files lack A and B, whose signs are the writer's.

    psoft_alpha: α.
    ab_svd_init: "psoft_init": A = Vᵀ, B = U·S/s; "pissa_init": √(S/s) goes to both; "peft_any", in
        our files alone: A and B are in the file.
    psoft_svd: "full", or "lowrank", by `psoft_svd_lowrank_niter` power iterations on a sketch that
        torch's generator draws with `random_seed`.
    psoft_orth: false: `psoft_R.weight` is Q itself (r, r), free.
    psoft_mag_a: false: no a.
    psoft_mag_b: false: no b.
    use_cayley_neumann: Q is the series of (I + q)·(I − q)⁻¹, cut at `num_cayley_neumann_terms`.
    cayley_neumann_eps: with that, q is drawn back to this norm.
    init_weights: true (R = I), or false (Q random).
    """

    thins: ClassVar[str] = "psoft_dropout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    inner: ClassVar[str] = "(weight|vector_a|vector_b)?"
    frozen: ClassVar[frozenset[str]] = frozenset({"psoft_A", "psoft_B"})
    marks: ClassVar[Mapping[str, str]] = {
        "ab_svd_init": "its file lacks A and B, which depend on the signs of the writer's singular "
        "vectors: convert it with Hugging Face PEFT (convert_to_lora), on the machine that wrote it"
    }

    r: Count = 32
    psoft_alpha: Positive = 32
    psoft_dropout: Rate = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init", "peft_any"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, within(0)] = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Annotated[int, within(1, 1000)] = 5
    cayley_neumann_eps: Inside | None = None
    init_weights: bool = True

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override] # depends on the flags
        """Only the exact rotation inverts a matrix."""
        return ("linalg",) if self.psoft_orth and not self.use_cayley_neumann else ()

    def per_site(self, site: Site) -> Self:
        """Check that there are r directions."""
        if self.r > (side := min(site.n_in, site.n_out)):
            raise ShapeError(f"{site.name}: r={self.r} directions cannot be taken of {side}")
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A and B, and what makes R."""
        r = self.r
        found: dict[str, Shape] = {"psoft_A": (r, site.n_in), "psoft_B": (site.n_out, r)}
        found["psoft_R.weight"] = (r * (r - 1) // 2,) if self.psoft_orth else (r, r)
        if self.psoft_mag_a:
            found["psoft_R.vector_a"] = (r,)
        return found | {"psoft_R.vector_b": (r,)} if self.psoft_mag_b else found

    def init(self, site: Site, new: Fresh) -> Params:
        """Decompose the base, on the host; R = I, or near it."""
        w = host_weight(new, site, "ab_svd_init")
        if self.psoft_svd == "lowrank":
            u, s, v = seeded_svd(w, self.r, self.psoft_svd_lowrank_niter, self.random_seed, new)
        else:
            u, s, v = leading_svd(w, self.r)
        s = s * self.r / self.psoft_alpha
        left, right = (s, s**0) if self.ab_svd_init == "psoft_init" else (s**0.5, s**0.5)
        p = {"psoft_A": new.array(right[:, None] * v), "psoft_B": new.array(u * left)}
        std, own = 0.0 if self.init_weights else 0.1, self.shapes(site)
        start = std * new.host.standard_normal(own["psoft_R.weight"])
        if not self.psoft_orth:
            start = start + namespace(w).eye(self.r)
        ones = {name: new.ones(shape) for name, shape in own.items()}
        return {**ones, "psoft_R.weight": new.array(start), **p}

    def turn(self, p: Params) -> Array:
        """R (r, r)."""
        r: Array = p["psoft_R.weight"]
        if self.psoft_orth:
            r = self._rotation(r[None, :])[0, ...]
        if self.psoft_mag_a:
            r = r * p["psoft_R.vector_a"]
        return p["psoft_R.vector_b"][:, None] * r if self.psoft_mag_b else r

    def _rotation(self, v: Array) -> Array:
        """Q (1, r, r), of the upper triangle of q; exact, it turns the other way than OFT's."""
        if not self.use_cayley_neumann:
            return cayley(skew(-v, self.r))
        if self.cayley_neumann_eps is not None:  # ‖q‖ is √2 times the norm of its upper triangle
            v = drawn_back(v, self.cayley_neumann_eps / 2**0.5, constant=False)
        return cayley_neumann(skew(v, self.r), self.num_cayley_neumann_terms)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Turn B once."""
        return {**p, "turned": self.factors(p, base.site)[0]}

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """s·B·(R − I) and A."""
        a, b, known = p["psoft_A"], p["psoft_B"], p.get("turned")
        scale = self.psoft_alpha / self.r
        return scale * (b @ self.turn(p) - b) if known is None else known, a
