"""HiRA: Hadamard high-rank adaptation.

Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS.
"""

from dataclasses import field
from typing import ClassVar, Literal

from peft_any.contract import Array, Dense, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.fields import ByLayer, Count, Excludes, FanInFanOut, Rate
from peft_any.initial import kaiming, normal, zeros
from peft_any.layer import flat, linear
from peft_any.outputs import added


class HiraConfig(Tuner, ByLayer, Excludes, FanInFanOut, peft_type="HIRA"):
    """W′ = W + W ⊙ (B·A), with A (r, n_in), for convolutions (r, n_in, kernel), B (n_out, r).

    rank_pattern: no effect, as in Hugging Face PEFT when it loads an adapter.
    init_weights: true (A uniform, B = 0), "gaussian" (A normal, σ = 1/r), false (both normal).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset(
        {"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"}
    )
    kernels = "ungrouped"
    thins: ClassVar[str] = "hira_dropout"

    r: Count = 32
    hira_dropout: Rate = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian"] | None = True

    def shapes(self, site: Site) -> dict[str, Shape]:
        """A and B in the layouts of torch's own layers; one is zero: B, or an embedding's A."""
        word = "embedding_" if site.kind == "Embedding" else ""
        a, b = (self.r, site.n_in, *site.kernel), (site.n_out, self.r, *(1,) * len(site.kernel))
        of_a, of_b = normal(*a), normal(*b)
        if self.init_weights and word:
            of_a = zeros(*a)
        elif self.init_weights:
            of_a = normal(*a, std=1 / self.r) if self.init_weights == "gaussian" else kaiming(*a)
            of_b = zeros(*b)
        return {f"hira_{word}A": of_a, f"hira_{word}B": of_b}

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
        return added(base, x, linear(thin, base.original * self.gains(p)))
