"""C3A: circular convolution adaptation. Chen et al. 2024, https://arxiv.org/abs/2407.19342."""

from dataclasses import field, replace
from functools import partial
from math import prod, sqrt
from typing import ClassVar, Literal, Self

from peft_any.backend import namespace
from peft_any.checks import check_divides
from peft_any.contract import Additive, Array, Kind, Params, Shape, Site
from peft_any.fields import Biases, ByLayer, Count
from peft_any.initial import normal, uniform, zeros
from peft_any.patterns import matching_end


class C3AConfig(Additive, Biases, ByLayer, peft_type="C3A"):
    """ΔW is blocks (b, b), block (i, j)[κ, τ] = w[i, j, (τ − κ) mod b]/n_in: circulant matrices.

    `c3a_kernel` w is (n_out/b, n_in/b, b).

    block_size: b, a divisor of n_in and n_out. block_size_pattern: b by site.
    init_weights: "xavier_uniform" or false (uniform within √(6/(n_in + n_out))), "gaussian"
        (standard normal), "kaiming_uniform" (within 1/√n_in), true (zero).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"Linear"})

    block_size: Count = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    def per_site(self, site: Site) -> Self:
        """Resolve the pattern, and check that the blocks fit."""
        b = matching_end(self.block_size_pattern, site.name, self.block_size)
        check_divides("block_size", b, site)
        return replace(self, block_size=b)

    def shapes(self, site: Site) -> dict[str, Shape]:
        """The first rows of all blocks, random unless `init_weights` is true."""
        b, init, total = self.block_size, self.init_weights, site.n_in + site.n_out
        bound = 1 / sqrt(site.n_in) if init == "kaiming_uniform" else sqrt(6.0 / total)
        known = {True: zeros, "gaussian": normal}
        start = known.get(init, partial(uniform, bound))
        return {"c3a_kernel": start(site.n_out // b, site.n_in // b, b)}

    def delta(self, p: Params, site: Site) -> Array:
        """The blocks, row by row: each is a piece of the kernel set twice."""
        w, b = p["c3a_kernel"] / site.n_in, self.block_size
        xp = namespace(w)
        twice = xp.concat([w, w], axis=2)
        rows = [twice[:, :, (b - i) % b : (b - i) % b + b] for i in range(b)]
        return xp.reshape(xp.stack(rows, axis=1), (site.n_out, site.n_in))

    def residual(self, p: Params, x: Array, site: Site) -> Array:
        """By Fourier transforms of length b, where the library has them: a product for each."""
        w, b = p["c3a_kernel"], self.block_size
        xp, lead = namespace(x, w), tuple(x.shape[:-1])
        if not hasattr(xp, "fft") or 0 in lead:  # MKL transforms nothing less than one row
            return super().residual(p, x, site)
        z = xp.fft.rfft(xp.reshape(x, (prod(lead), site.n_in // b, b)))
        f = xp.conj(xp.fft.rfft(w))  # a correlation, not a convolution
        stacked = xp.permute_dims(z, (2, 0, 1)) @ xp.permute_dims(f, (2, 1, 0))
        y = xp.fft.irfft(xp.permute_dims(stacked, (1, 2, 0)), n=b)
        return xp.reshape(y, (*lead, site.n_out)) / site.n_in
