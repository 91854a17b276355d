"""PEANuT: weight-aware neural tweakers. Zhong et al. 2024, https://arxiv.org/abs/2410.01870."""

from typing import Annotated, ClassVar

from peft_any.activations import ACTIVATIONS, activation
from peft_any.backend import namespace
from peft_any.contract import Array, Dense, Kind, Params, Shape, Site, Tuner
from peft_any.fields import ByLayer, Count, Excludes, among, within
from peft_any.initial import kaiming, zeros
from peft_any.layer import linear


class PeanutConfig(Tuner, ByLayer, Excludes, peft_type="PEANUT"):
    """W′ = W + s·(h(Wᵀ)·Bᵀ)ᵀ, where a small net h maps every column of the weight to r numbers.

    H = f(Wᵀ·Aᵀ) (n_in, r), then `depth` encoders H = f(H·Eᵢᵀ), then as many decoders
    H = f(H·Dᵢᵀ) + what the mirrored encoder got. `peanut_A.weight` A (r, n_out),
    `peanut_B.weight` B (n_out, r), the Eᵢ and Dᵢ (r, r).

    act_fn: f, by transformers' names. scaling: s.
    init_weights: true (B = 0) or false (all uniform).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    inner: ClassVar[str] = r"(\d+\.)?weight"

    r: Count = 32
    depth: Annotated[int, within(0, 1000)] = 0
    act_fn: Annotated[str, among(ACTIVATIONS)] = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A, B, and the nets between them: uniform, and B zero."""
        r, m, blank = self.r, site.n_out, zeros if self.init_weights else kaiming
        nets = [
            f"peanut_{net}.{i}.weight"
            for net in ("encoders", "decoders")
            for i in range(self.depth)
        ]
        ends = {"peanut_A.weight": kaiming(r, m), "peanut_B.weight": blank(m, r)}
        return {**ends, **dict.fromkeys(nets, kaiming(r, r))}

    def product(self, p: Params, base: Dense) -> tuple[Array, Array]:
        """s·B and h(W)ᵀ."""
        f, xp = activation(self.act_fn), namespace(base.weight)
        h = f(linear(xp.matrix_transpose(base.original), p["peanut_A.weight"]))
        seen = []
        for i in range(self.depth):
            seen.append(h)
            h = f(linear(h, p[f"peanut_encoders.{i}.weight"]))
        for i in range(self.depth):
            h = f(linear(h, p[f"peanut_decoders.{i}.weight"])) + seen.pop()
        return self.scaling * p["peanut_B.weight"], xp.matrix_transpose(h)

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + s·B·h(W)ᵀ."""
        left, right = self.product(p, base)
        return base.replace(weight=base.weight + left @ right)
