"""OFT: orthogonal fine-tuning of inputs by blocks.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280; v2: 2025, https://arxiv.org/abs/2506.19847.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Self

from peft_any.backend import inv, namespace
from peft_any.blocks import block_matmul, cayley, cayley_neumann, drawn_back, skew
from peft_any.checks import refuse
from peft_any.contract import Array, Dense, Kind, Layer, Params, Shape, Site, Tuner
from peft_any.errors import ConfigError
from peft_any.fields import Biases, ByLayer, Excludes, FanInFanOut, Rate, Rule
from peft_any.initial import normal


class OFTConfig(Tuner, Biases, ByLayer, Excludes, FanInFanOut, peft_type="OFT"):
    """W′ = W·Rᵀ, y = W·(x·R) + b, with R = diag(R₁ … R_k) of rotations (b, b), k = n_in/b.

    Each Rᵢ comes from a skew-symmetric Qᵢ (b, b), whose upper triangle, row by row, is row i of
    `oft_R.weight` (k, b·(b − 1)/2). A convolution's n_in is channels · kernel; an embedding's
    rows are rotated, E′ = E·R, by `oft_embedding_R.weight`.

    oft_block_size: b; where it does not divide n_in, the nearest divisor, the smaller of two.
    r: k instead of b, likewise; exactly one of the two is not zero.
    use_cayley_neumann: R = I + 2·(Q + … + Q^(K−2)) + Q^(K−1), K = `num_cayley_neumann_terms`, a
        rotation up to ‖Q‖^(K−1); otherwise Cayley's (I − Q)·(I + Q)⁻¹, which turns the other way.
    block_share: one Q for all blocks: (1, b·(b − 1)/2).
    coft: every block is drawn back to ‖Q‖ ≤ eps/√(rows of the parameter) before use, by a factor
        constant to gradients; training stores it so (`settled`).
    init_weights: true (Q = 0) or false (upper triangles of standard deviation 0.1).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv2d", "Embedding"})
    kernels = "square"
    separable: ClassVar[bool] = True
    ranked: ClassVar[bool] = False

    r: int = 0
    oft_block_size: int = 32
    module_dropout: Rate = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Rule(lambda n: n <= 1000, "at most 1000")] = 5
    init_weights: bool = True

    def check(self) -> None:
        """The blocks have one size, and a bound that is not zero."""
        if min(self.r, self.oft_block_size) < 0 or bool(self.r) == bool(self.oft_block_size):
            raise ConfigError(
                f"{self.where}: r={self.r} and oft_block_size={self.oft_block_size} cannot size "
                "the blocks: give one of the two, and 0 for the other"
            )
        refuse(self, eps=(self.eps > 0 or not self.coft, "above 0, with coft"))

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override] # depends on the flags
        """Only the exact rotation inverts matrices."""
        return () if self.use_cayley_neumann else ("linalg",)

    def per_site(self, site: Site) -> Self:
        """Choose the block size: a divisor of what is rotated."""
        n = site.n_out if site.kind == "Embedding" else site.width
        b = n // nearest_divisor(n, self.r) if self.r else nearest_divisor(n, self.oft_block_size)
        return replace(self, r=0, oft_block_size=b)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The upper triangles of Q₁ … Q_k, zero."""
        table, b = site.kind == "Embedding", self.oft_block_size
        k = 1 if self.block_share else (site.n_out if table else site.width) // b
        start = normal(k, b * (b - 1) // 2, std=0.0 if self.init_weights else 0.1)
        return {"oft_embedding_R.weight" if table else "oft_R.weight": start}

    def rotation(self, p: Params) -> Array:
        """R₁ … R_k (k, b, b), or (1, b, b) under `block_share`."""
        known: Array | None = p.get("rotation")
        if known is not None:
            return known
        (v,), terms = self.settled(p).values(), self.num_cayley_neumann_terms
        q = skew(v, self.oft_block_size)
        return cayley_neumann(q, terms) if self.use_cayley_neumann else cayley(q)

    def settled(self, p: Params) -> Params:
        """Draw the blocks back under `coft`: ‖Q‖ is √2 times the norm of its upper triangle."""
        if not self.coft:
            return p
        return {k: drawn_back(v, self.eps / (2 * v.shape[0]) ** 0.5) for k, v in p.items()}

    def prepare(self, p: Params, base: Layer) -> Params:
        """Compute R once."""
        return {**p, "rotation": self.rotation(p)}

    def merge(self, p: Params, base: Dense) -> Dense:
        """W·Rᵀ; an embedding's flat weight is its table transposed: Rᵀ·W."""
        return self._turn(self.rotation(p), base)

    def blockwise(self, p: Params, site: Site) -> tuple[Array, None] | None:
        """Rᵀ; none for an embedding."""
        r = self.rotation(p)
        return None if site.kind == "Embedding" else (namespace(r).matrix_transpose(r), None)

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """base(x·R); an embedding's output is rotated instead, without its bias."""
        r = self.rotation(p)
        if base.site.kind != "Embedding":
            return base(block_matmul(x, r))
        if base.bias is None:
            return block_matmul(base(x), r)
        return block_matmul(base(x) - base.bias, r) + base.bias

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """W′·R⁻ᵀ: of relative error about ε·κ(R), which is 1 for the exact rotation.

        The truncated one loses |1 − (iσ)^(K−1)| of length in a plane where Q has the singular
        value σ: all of it for σ = 1 and K = 5, where nothing can bring W back.
        """
        r = self.rotation(p)
        xp = namespace(r)
        back = inv(r) if self.use_cayley_neumann else xp.matrix_transpose(r)
        return self._turn(back, merged)

    @staticmethod
    def _turn(r: Array, base: Dense) -> Dense:
        flip = namespace(r, base.weight).matrix_transpose
        if base.site.kind == "Embedding":
            return base.replace(weight=flip(block_matmul(flip(base.weight), r, rows=True)))
        return base.replace(weight=block_matmul(base.weight, flip(r), rows=True))


def nearest_divisor(n: int, wanted: int) -> int:
    """Find the divisor of `n` nearest to a number, the smaller of two equally near."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
