"""HRA: Householder reflection adaptation. Yuan et al. 2024, https://arxiv.org/abs/2405.17484."""

from typing import ClassVar

from peft_any.backend import creation_device, namespace
from peft_any.blocks import inverse
from peft_any.contract import Array, Dense, Fresh, Kind, Layer, Params, Shape, Site, Tuner
from peft_any.fields import Biases, ByLayer, Count, Excludes


class HRAConfig(Tuner, Biases, ByLayer, Excludes, peft_type="HRA"):
    """W′ = W·H, y = W·(H·x) + b, with H = (I − 2·u₁u₁ᵀ) ⋯ (I − 2·u_r·u_rᵀ).

    The uᵢ are the columns of `hra_u` (n_in, r), normalised; a convolution's n_in is channels ·
    kernel. H is kept as I − U·T·Uᵀ with T (r, r) triangular (Schreiber & Van Loan 1989,
    https://doi.org/10.1137/0910005), so that it costs two products with U.

    apply_GS: the columns are made orthonormal first, one after the other (Gram–Schmidt).
    init_weights: true (columns equal in pairs, so that H = I for an even r) or false (uniform).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv2d"})
    kernels = "square"
    needs: ClassVar[tuple[str, ...]] = ("linalg",)

    r: Count = 8
    apply_GS: bool = False  # noqa: N815 - Hugging Face PEFT's name
    init_weights: bool = True

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The vectors, as columns."""
        return {"hra_u": (site.width, self.r)}

    def init(self, site: Site, new: Fresh) -> Params:
        """Pairs of equal columns, which cancel; all different where r is odd."""
        if not self.init_weights or self.r % 2:
            return {"hra_u": new.kaiming((site.width, self.r))}
        half = new.kaiming((site.width, self.r // 2))
        return {"hra_u": namespace(half).repeat(half, 2, axis=1)}

    def factors(self, p: Params) -> tuple[Array, Array]:
        """U·T (n, r) and U (n, r): H = I − (U·T)·Uᵀ."""
        if "left" in p:
            return p["left"], p["right"]
        u = p["hra_u"]
        xp = namespace(u)
        if self.apply_GS:
            u = self._orthonormal(u)
            return 2.0 * u, u
        u = u / xp.sqrt(xp.sum(u * u, axis=0))
        eye = xp.eye(self.r, dtype=u.dtype, device=creation_device(u))
        overlaps = xp.triu(xp.matrix_transpose(u) @ u, k=1)
        return u @ inverse((0.5 * eye + overlaps)[None, ...])[0, ...], u

    def _orthonormal(self, u: Array) -> Array:
        """Gram–Schmidt, each column twice ("twice is enough": Giraud et al. 2005)."""
        xp = namespace(u)
        columns: list[Array] = []
        for i in range(self.r):
            v = u[:, i : i + 1]
            for _ in range(2 if columns else 0):
                known = xp.concat(columns, axis=1)
                v = v - known @ (xp.matrix_transpose(known) @ v)
            columns.append(v / xp.sqrt(xp.sum(v * v)))
        return xp.concat(columns, axis=1)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Compute the factors once."""
        left, right = self.factors(p)
        return {**p, "left": left, "right": right}

    def merge(self, p: Params, base: Dense) -> Dense:
        """W·H."""
        left, right = self.factors(p)
        return base.replace(weight=_less(base.weight, left, right))

    def product(self, p: Params, base: Dense) -> tuple[Array, Array]:
        """−W·U·T and Uᵀ."""
        left, right = self.factors(p)
        return -(base.weight @ left), namespace(right).matrix_transpose(right)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x·Hᵀ)."""
        left, right = self.factors(p)
        return base(_less(x, right, left))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """W′·Hᵀ, within a few roundings."""
        left, right = self.factors(p)
        return merged.replace(weight=_less(merged.weight, right, left))


def _less(x: Array, left: Array, right: Array) -> Array:
    """x·(I − left·rightᵀ)."""
    return x - (x @ left) @ namespace(x).matrix_transpose(right)
