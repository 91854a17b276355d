"""DEFT: decompositional efficient fine-tuning, with PaRa as its case without injection.

Kumar et al. 2025, https://openreview.net/forum?id=WjWQAJdFeR;
PaRa: Chen et al. 2024, https://arxiv.org/abs/2406.05641.
"""

from dataclasses import replace
from typing import ClassVar, Literal, Self

from peft_any.backend import astype, is_differentiated, namespace
from peft_any.contract import Array, Dense, Fresh, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.fields import Biases, ByLayer, Count, Excludes, FanInFanOut, Rate
from peft_any.layer import linear, widen
from peft_any.outputs import added


class DeftConfig(Tuner, Biases, ByLayer, Excludes, FanInFanOut, peft_type="DEFT"):
    """W′ = W − Q·ρᵀ·W + s·Q·R, with `deft_P` P (n_out, r) and `deft_R` R (r, n_in).

    decomposition_method: "relu": Q = P and ρ = max(P, 0); "qr": Q = ρ, the Q of P's QR factors.
    alpha: s = α/r; none: s = 1. r counts as n_out at most.
    para: without R: a subspace is removed, and nothing put in its place.
    init_scale: R's standard deviation, × 0.02, with `init_weights` false.
    init_weights: true (R = ρᵀ·W/s, so that nothing changes) or false (R normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv1D"})

    r: Count = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    deft_dropout: Rate = 0.0
    init_weights: bool = True

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override] # depends on the method
        """Only the QR factors."""
        return ("linalg",) if self.decomposition_method == "qr" else ()

    @property
    def scaling(self) -> float:
        """α/r, or 1."""
        return self.alpha / self.r if self.alpha else 1.0

    def per_site(self, site: Site) -> Self:
        """Bound r by the outputs."""
        return replace(self, r=min(self.r, site.n_out))

    def shapes(self, site: Site) -> dict[str, Shape]:
        """P, and R unless `para`."""
        shapes: dict[str, Shape] = {"deft_P": (site.n_out, self.r)}
        return shapes if self.para else shapes | {"deft_R": (self.r, site.n_in)}

    def init(self, site: Site, new: Fresh) -> Params:
        """P normal, and R what P takes out of the base."""
        p: Params = {"deft_P": new.normal((site.n_out, self.r), 0.02)}
        if self.para:
            return p
        if not self.init_weights:
            return p | {"deft_R": new.normal((self.r, site.n_in), 0.02 * self.init_scale)}
        (wide,), base = widen([p], new.base_for(site.name, "deft_R"))
        _, across = self.directions(wide)
        taken = namespace(across).matrix_transpose(across) @ base.weight / self.scaling
        return p | {"deft_R": astype(taken, new.dtype)}

    def directions(self, p: Params) -> tuple[Array, Array]:
        """Q and ρ (n_out, r)."""
        known: tuple[Array, Array] | None = p.get("directions")
        if known is not None:
            return known
        a = p["deft_P"]
        xp = namespace(a)
        if self.decomposition_method == "relu":
            return a, xp.where(a > 0, a, xp.zeros_like(a))
        q, _ = xp.linalg.qr(a)
        return q, q

    def prepare(self, p: Params, base: Layer) -> Params:
        """Decompose once, and project the base once, if for more than one step of training."""
        q, across = self.directions(p)
        known = {**p, "directions": (q, across)}
        if any(map(is_differentiated, p.values())):
            return known
        return {**known, "change": self._change(p, across, base)}

    def _change(self, p: Params, across: Array, base: Layer) -> Array:
        """s·R − ρᵀ·W."""
        taken = namespace(across).matrix_transpose(across) @ base.original
        return -taken if self.para else self.scaling * p["deft_R"] - taken

    def product(self, p: Params, base: Dense) -> tuple[Array, Array]:
        """Q and s·R − ρᵀ·W."""
        q, across = self.directions(p)
        return q, self._change(p, across, base)

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + Q·(s·R − ρᵀ·W)."""
        left, change = self.product(p, base)
        return base.replace(weight=base.weight + left @ change)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x) + Q·((s·R − ρᵀ·W)·x)."""
        change = p.get("change")
        if change is None:
            return self._applied(p, x, x, base)
        return added(base, x, linear(linear(x, change), self.directions(p)[0]))

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Thin the input of R alone."""
        return self._applied(p, x, noise.at("input").thinned(x, self.deft_dropout), base)

    def _applied(self, p: Params, x: Array, thin: Array, base: Layer) -> Array:
        """Take ρᵀ·W·x from the base's output, where that is W·x + b."""
        (q, across), y = self.directions(p), base(x)
        down = namespace(across).matrix_transpose(across)
        if base.adapted:
            more = -linear(x, down @ base.original)
        else:
            more = -linear(y, down) if base.bias is None else down @ base.bias - linear(y, down)
        if not self.para:
            more = more + self.scaling * linear(thin, p["deft_R"])
        return linear(more, q, None, y)
