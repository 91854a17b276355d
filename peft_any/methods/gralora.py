"""GraLoRA: granular low-rank adaptation. Jung et al. 2025, https://arxiv.org/abs/2505.20355."""

from math import prod
from typing import Annotated, Any, ClassVar, Self

from peft_any.backend import namespace
from peft_any.checks import check_divides, refuse
from peft_any.contract import Additive, Array, Fresh, Kind, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Count, FanInFanOut, Rate, within
from peft_any.layer import linear


class GraloraConfig(Additive, Biases, ByLayer, FanInFanOut, peft_type="GRALORA"):
    """ΔW is k × k blocks, block (j, i) = s·(Aᵢ[:, part j]·Bⱼ[part i, :])ᵀ, with s = α/(r + h).

    `gralora_A` (k, n_in/k, r) holds the Aᵢ and `gralora_B` (k, r, n_out/k) the Bⱼ; their r
    columns and rows are k equal parts. With `hybrid_r` h, a plain LoRA joins: A of
    `gralora_A_general.weight` (h, n_in), B of `gralora_B_general.weight` (n_out, h), ΔW += s·B·A.

    gralora_k: k, a divisor of r, n_in and n_out.
    init_weights: true (A uniform, B = 0) or false (all uniform).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})
    thins: ClassVar[str] = "gralora_dropout"

    r: Count = 32
    hybrid_r: Annotated[int, within(0)] = 0
    alpha: float = 64
    gralora_dropout: Rate = 0.0
    gralora_k: Count = 2
    init_weights: bool = True

    def check(self) -> None:
        """The blocks share the rank."""
        refuse(self, gralora_k=(self.r % self.gralora_k == 0, f"a divisor of r={self.r}"))

    @property
    def scaling(self) -> float:
        """α/(r + h)."""
        return self.alpha / (self.r + self.hybrid_r)

    def per_site(self, site: Site) -> Self:
        """Check that the blocks fit."""
        check_divides("gralora_k", self.gralora_k, site)
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The stacks, and the plain pair."""
        k, h = self.gralora_k, self.hybrid_r
        shapes: dict[str, Shape] = {
            "gralora_A": (k, site.n_in // k, self.r),
            "gralora_B": (k, self.r, site.n_out // k),
        }
        if h:
            shapes["gralora_A_general.weight"] = (h, site.n_in)
            shapes["gralora_B_general.weight"] = (site.n_out, h)
        return shapes

    def init(self, site: Site, new: Fresh) -> Params:
        """A uniform and B zero."""

        def draw(name: str, shape: Shape) -> Any:
            if self.init_weights and "_B" in name:
                return new.zeros(shape)
            if name.endswith("weight"):
                return new.kaiming(shape)
            k, rows, columns = shape  # each drawn as the transposed matrix
            drawn = new.kaiming((k * columns, rows))
            xp = namespace(drawn)
            return xp.matrix_transpose(xp.reshape(drawn, (k, columns, rows)))

        return {name: draw(name, shape) for name, shape in self.shapes(site).items()}

    def _general(self, p: Params) -> tuple[Array, Array] | None:
        names = "gralora_B_general.weight", "gralora_A_general.weight"
        return (p[names[0]], p[names[1]]) if self.hybrid_r else None

    def delta(self, p: Params, site: Site) -> Array:
        """All blocks, and s·B·A."""
        a, b, k = p["gralora_A"], p["gralora_B"], self.gralora_k
        xp, part, m, n = namespace(a), self.r // k, site.n_out, site.n_in
        left = xp.permute_dims(xp.reshape(a, (k, n // k, k, part)), (0, 2, 1, 3))
        right = xp.permute_dims(xp.reshape(b, (k, k, part, m // k)), (1, 0, 2, 3))
        blocks = left @ right  # (i, j, n/k, m/k)
        total: Array = xp.reshape(xp.permute_dims(blocks, (1, 3, 0, 2)), (m, n))
        pair = self._general(p)
        return self.scaling * (total if pair is None else total + pair[0] @ pair[1])

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """Through A by blocks of inputs, an exchange of parts, and B by blocks of outputs."""
        a, b, k = p["gralora_A"], p["gralora_B"], self.gralora_k
        xp, lead, part = namespace(x, a), tuple(x.shape[:-1]), self.r // k
        rows = prod(lead)
        z = xp.permute_dims(xp.reshape(x, (rows, k, site.n_in // k)), (1, 0, 2)) @ a
        z = xp.permute_dims(xp.reshape(z, (k, rows, k, part)), (2, 1, 0, 3))
        z = (self.scaling * xp.reshape(z, (k, rows, self.r))) @ b
        y = xp.reshape(xp.permute_dims(z, (1, 0, 2)), (*lead, site.n_out))
        pair = self._general(p)
        if pair is None:
            return y
        return linear(self.scaling * linear(x, pair[1]), pair[0], None, y)
