"""BOFT: orthogonal fine-tuning by butterfly factors.

Liu et al. 2023, https://arxiv.org/abs/2311.06243.
"""

from dataclasses import replace
from typing import ClassVar, Self

from peft_any.backend import creation_device, namespace
from peft_any.blocks import block_matmul, butterfly, cayley
from peft_any.contract import Array, Dense, Kind, Layer, Noise, Params, Shape, Site, Tuner
from peft_any.errors import ConfigError, ShapeError
from peft_any.fields import Biases, ByLayer, Count, Excludes, FanInFanOut, Rate
from peft_any.initial import normal
from peft_any.outputs import gained


class BOFTConfig(Tuner, Biases, ByLayer, Excludes, FanInFanOut, peft_type="BOFT"):
    """W′ = s ⊙ (W·Rᵀ), y = s ⊙ W·(x·R) + b, with R = B_m ⋯ B₁ and s (n_out, 1).

    Factor Bᵢ rotates pairs of runs of b/2 inputs that lie 2^(i−1) runs apart, each by a block
    (I − S)·(I + S)⁻¹ with S = (X − Xᵀ)/2; `boft_R` (m, k, b, b) holds the X, k = n_in/b. A
    convolution's n_in is channels · kernel, and its s (1, n_out).

    boft_block_size: b, a divisor of n_in.
    boft_block_num: k instead of b; exactly one of the two is not zero.
    boft_n_butterfly_factor: m; above 1, b is even and k a multiple of 2^(m−1). HF PEFT without
        its CUDA extension silently takes 1 and cannot load such a file.
    init_weights: true (X = 0, s = 1) or false (both off by a standard deviation of 0.1).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear", "Conv2d"})
    kernels = "square"
    separable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("linalg",)

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: Count = 1
    boft_dropout: Rate = 0.0
    init_weights: bool = True

    def check(self) -> None:
        """The blocks have one size."""
        b, k = self.boft_block_size, self.boft_block_num
        if min(b, k) < 0 or bool(b) == bool(k):
            raise ConfigError(
                f"{self.where}: boft_block_size={b} and boft_block_num={k} cannot size the "
                "blocks: give one of the two, and 0 for the other"
            )

    def per_site(self, site: Site) -> Self:
        """Resolve the block size, and check that blocks and factors fit the layer."""
        n, m = site.width, self.boft_n_butterfly_factor
        given = self.boft_block_size or self.boft_block_num
        b = self.boft_block_size or n // given
        if n % given:
            field = "boft_block_size" if self.boft_block_size else "boft_block_num"
            near = [d for d in range(1, n + 1) if n % d == 0]
            raise ShapeError(
                f"{site.name}: {field}={given} cannot divide {n} inputs; divisors: "
                f"{', '.join(map(str, near))}"
            )
        if m > 1 and (b % 2 or m > n.bit_length() or n // b % 2 ** (m - 1)):
            raise ShapeError(
                f"{site.name}: boft_n_butterfly_factor={m} cannot pair {n // b} blocks of {b}: "
                f"the size must be even and the number a multiple of 2^{m - 1}"
            )
        return replace(self, boft_block_size=b, boft_block_num=0)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The X of all blocks and factors, and the outputs' scale: no rotation, no scale."""
        b, std = self.boft_block_size, 0.0 if self.init_weights else 0.1
        scale = (1, site.n_out) if site.is_conv else (site.n_out, 1)
        blocks = normal(self.boft_n_butterfly_factor, site.width // b, b, b, std=std)
        return {"boft_R": blocks, "boft_s": normal(*scale, std=std, mean=1.0)}

    def factors(self, p: Params) -> list[tuple[Array, int, int]]:
        """Give R as few block-diagonal factors, as `butterfly` does."""
        known: list[tuple[Array, int, int]] | None = p.get("factors")
        return butterfly(self.blocks(p)) if known is None else known

    def blocks(self, p: Params) -> Array:
        """Give the rotations of all blocks (m, k, b, b)."""
        x = p["boft_R"]
        xp, (m, k, b, _) = namespace(x), x.shape
        x = xp.reshape(x, (m * k, b, b))
        return xp.reshape(cayley(0.5 * (x - xp.matrix_transpose(x))), (m, k, b, b))

    def dropped(self, p: Params, x: Array, base: Layer, noise: Noise) -> Array:
        """As `forward`, with some blocks of one factor, chosen anew in each step, held still."""
        r, (m, k, b, _) = self.blocks(p), p["boft_R"].shape
        if int(self.boft_dropout * k):
            mask = noise.chosen_in(m, k, self.boft_dropout, r)
            still = namespace(r).eye(b, dtype=r.dtype, device=creation_device(r))
            r = (1.0 - mask) * r + mask * still
        return self.forward({**p, "factors": butterfly(r)}, x, base)

    def prepare(self, p: Params, base: Layer) -> Params:
        """Compute R's factors once."""
        return {**p, "factors": self.factors(p)}

    def merge(self, p: Params, base: Dense) -> Dense:
        """s ⊙ (W·Rᵀ), R's first factor first."""
        w = base.weight
        xp = namespace(w)
        for r, *lie in self.factors(p):
            w = block_matmul(w, xp.matrix_transpose(r), *lie, rows=True)
        return base.replace(weight=w * xp.reshape(p["boft_s"], (-1, 1)))

    def blockwise(self, p: Params, site: Site) -> tuple[Array, Array] | None:
        """Rᵀ and s, where R is one factor."""
        (r, *_), *more = self.factors(p)
        xp = namespace(r)
        return None if more else (xp.matrix_transpose(r), xp.reshape(p["boft_s"], (-1,)))

    def forward(self, p: Params, x: Array, base: Layer) -> Array:
        """s ⊙ base(x·R), R's last factor first; the bias is not scaled."""
        for r, *lie in reversed(self.factors(p)):
            x = block_matmul(x, r, *lie)
        return gained(base, x, namespace(x).reshape(p["boft_s"], (-1,)))

    def unmerge(self, p: Params, merged: Dense) -> Dense:
        """(W′/s)·R: every output within a few roundings of it, however small s; NaN where s = 0."""
        w = merged.weight
        w = w / namespace(w).reshape(p["boft_s"], (-1, 1))
        for r, *lie in reversed(self.factors(p)):
            w = block_matmul(w, r, *lie, rows=True)
        return merged.replace(weight=w)
