"""DeLoRA: decoupled low-rank adaptation. Bini et al. 2025, https://arxiv.org/abs/2503.18225."""

from dataclasses import field, replace
from typing import ClassVar, Self

from peft_any.backend import astype, namespace
from peft_any.contract import Additive, Array, Fresh, Kind, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Count, Excludes, Rate
from peft_any.layer import widen
from peft_any.linalg import row_norms
from peft_any.patterns import matching

_LEAST = 1e-4
"""Norms below this count as this."""


class DeloraConfig(Additive, Biases, ByLayer, Excludes, peft_type="DELORA"):
    """ΔW = (λ/r)·Σᵢ bᵢ·aᵢ/(‖bᵢ‖·‖aᵢ‖) ⊙ w, with the rows aᵢ of A (r, n_in), the columns bᵢ of B.

    B is (n_out, r), `delora_lambda` λ (1,); `delora_w_norm` w (n_in,) holds the norms of the base
    weight's columns at the start, is saved, and not trained. Norms count as 10⁻⁴ at least.

    delora_lambda: λ's initial value. rank_pattern, lambda_pattern: r and λ by site.
    module_dropout: thins the adapter's input, as an ordinary dropout.
    init_weights: true (A uniform, B = 0) or false (both uniform).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})
    frozen: ClassVar[frozenset[str]] = frozenset({"delora_w_norm"})
    thins: ClassVar[str] = "module_dropout"

    r: Count = 8
    delora_lambda: float = 15
    module_dropout: Rate = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)
    init_weights: bool = True

    def per_site(self, site: Site) -> Self:
        """Resolve the patterns."""
        r = matching(self.rank_pattern, site.name, self.r)
        value = matching(self.lambda_pattern, site.name, self.delora_lambda)
        return replace(self, r=r, delora_lambda=value)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A, B, λ and the norms of the base's columns."""
        return {
            "delora_A": (self.r, site.n_in),
            "delora_B": (site.n_out, self.r),
            "delora_lambda": (1,),
            "delora_w_norm": (site.n_in,),
        }

    def init(self, site: Site, new: Fresh) -> Params:
        """A uniform and B zero; the norms measured."""
        of_a, of_b, of_scale, _ = self.shapes(site).values()
        _, base = widen([], new.base_for(site.name, "delora_w_norm"))
        return {
            "delora_A": new.kaiming(of_a),
            "delora_B": new.zeros(of_b) if self.init_weights else new.kaiming(of_b),
            "delora_lambda": new.full(of_scale, self.delora_lambda),
            "delora_w_norm": astype(
                row_norms(namespace(base.weight).matrix_transpose(base.weight)), new.dtype
            ),
        }

    def factors(self, p: Params, site: Site) -> tuple[Array, Array]:
        """Give two factors, (n_out, r) and (r, n_in), of ΔW."""
        a, b = p["delora_A"], p["delora_B"]
        xp = namespace(a)
        square = xp.sum(a * a, axis=1), xp.sum(b * b, axis=0)
        an, bn = (xp.sqrt(xp.where(s > _LEAST**2, s, _LEAST**2)) for s in square)
        return b * (p["delora_lambda"] / self.r / (an * bn)), a * p["delora_w_norm"]
