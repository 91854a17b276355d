"""HiRA: Hadamard high-rank adaptation.

Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS.
"""

from dataclasses import field
from typing import ClassVar, Literal, Self

from peft_any.contract import Array, Dense, Fresh, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.errors import ShapeError
from peft_any.fields import ByLayer, Count, Excludes, FanInFanOut, Rate
from peft_any.layer import flat, linear


class HiraConfig(Tuner, ByLayer, Excludes, FanInFanOut, peft_type="HIRA"):
    """W′ = W + W ⊙ (B·A), with A (r, n_in), for convolutions (r, n_in, kernel), B (n_out, r).

    rank_pattern: no effect, as in Hugging Face PEFT when it loads an adapter.
    init_weights: true (A uniform, B = 0), "gaussian" (A normal, σ = 1/r), false (both normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset(
        {"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"}
    )
    thins: ClassVar[str] = "hira_dropout"

    r: Count = 32
    hira_dropout: Rate = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian"] | None = True

    def per_site(self, site: Site) -> Self:
        """Refuse grouped convolutions."""
        if site.groups > 1:
            raise ShapeError(
                f"{site.name}: HIRA cannot adapt a convolution of {site.groups} groups: its A "
                "reads all channels; name it in exclude_modules"
            )
        return self

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A and B in the layouts of torch's own layers."""
        word = "embedding_" if site.kind == "Embedding" else ""
        return {
            f"hira_{word}A": (self.r, site.n_in, *site.kernel),
            f"hira_{word}B": (site.n_out, self.r, *(1,) * len(site.kernel)),
        }

    def init(self, site: Site, new: Fresh) -> Params:
        """One factor zero: B, or an embedding's A."""
        (of_a, a), (of_b, b) = self.shapes(site).items()
        if not self.init_weights:
            return {of_a: new.normal(a), of_b: new.normal(b)}
        if site.kind == "Embedding":
            return {of_a: new.zeros(a), of_b: new.normal(b)}
        gaussian = self.init_weights == "gaussian"
        return {of_a: new.normal(a, 1 / self.r) if gaussian else new.kaiming(a), of_b: new.zeros(b)}

    def gains(self, p: Params) -> Array:
        """B·A (n_out, width)."""
        a, b = (
            flat(p[n] if n in p else p[f"hira_embedding_{n[-1]}"]) for n in ("hira_A", "hira_B")
        )
        return b @ a

    def merge(self, p: Params, base: Dense) -> Dense:
        """W + W ⊙ (B·A)."""
        return base.replace(weight=base.weight + base.original * self.gains(p))

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """One product with the merged weight, formed once where parameters are bound."""
        merged: Array | None = p.get("merged")
        if merged is None:
            merged = base.weight + base.original * self.gains(p)
        return linear(x, merged, base.bias)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Merge once."""
        return {**p, "merged": base.weight + base.original * self.gains(p)}

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """Thin the input of W ⊙ (B·A), not of W; token numbers are not thinned."""
        thin = noise.at("input").thinned(x, self.hira_dropout)
        return base(x) + linear(thin, base.original * self.gains(p))
