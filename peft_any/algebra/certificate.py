r"""A proof that an approximation of low rank is nearly the best of its rank.

Let Q·S·Vᵀ be what a sketch found of Δ, with QᵀΔ = S·Vᵀ; let Y = Δ·V − Q·S and F = Δ·(I − VVᵀ),
whose columns are orthogonal to Q. On the columns of V and their complement, ΔᵀΔ has the blocks
S² + YᵀY, Yᵀ·F and Fᵀ·F. By the additivity of inertia (Haynsworth 1968, Linear Algebra Appl. 1,
73), for any μ > φ² ≥ ‖F‖²

    λᵢ(ΔᵀΔ) ≤ max(μ, λᵢ(S² + YᵀY·μ/(μ − φ²))),

so that the sum of these over i ≤ k bounds the energy of any approximation of rank k, and the
rest of ‖Δ‖² its residual. φ is ‖F‖ (Frobenius), or what powers of FᵀF say: for Gaussian vectors
ω, ‖(FᵀF)ᵗω‖ ≥ ‖F‖²ᵗ·|g| with g ~ N(0, 1), and the largest |g| of 20 is below 0.396 with a
probability of less than 10⁻¹⁰ (after Dixon 1983, SIAM J. Numer. Anal. 20, 812).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from peft_any._typing import Array
from peft_any.algebra.blockwise import like, product
from peft_any.backend import from_numpy_like, namespace, settled, to_numpy
from peft_any.receipt import Host
from peft_any.rng import Fresh

_VECTORS, _SMALLEST = 20, 0.396
"""Of so many |g|, the largest is smaller with probability (0.396·√(2/π))²⁰ < 10⁻¹⁰."""
_POWERS = (1, 3, 6, 10, 16)
_MARGINS = (1.02, 1.05, 1.1, 1.2, 1.4, 1.8, 2.5, 4.0, 8.0, 20.0, 100.0, 1e4)
"""μ/φ²: the best of these is taken."""
_ROUNDING = 1e-14
"""Share of ‖Δ‖² that differences of double-precision sums may be wrong by."""
_NOTHING = 4e-14
"""Share of ‖Δ‖² below which a residual is rounding: (2·10⁻⁷)², as of float32 numbers."""


@dataclass(frozen=True)
class Sketch:
    """The part of a matrix Δ in a subspace: Q·S·Vᵀ with QᵀΔ = S·Vᵀ.

    Attributes
    ----------
    left, right : array (m, l), array (n, l)
        Q and V, orthonormal, in float64.
    values : tuple of float
        S, descending.
    whole : float
        ‖Δ‖².
    """

    left: Array
    right: Array
    values: tuple[float, ...]
    whole: float

    def residual2(self, rank: int) -> float:
        """‖Δ − QₖSₖVₖᵀ‖² = ‖Δ‖² − ‖Sₖ‖²."""
        return max(self.whole - sum(s * s for s in self.values[:rank]), 0.0)


class Certificate:
    """What can be proved of the residuals of a matrix, given a sketch of it.

    Parameters
    ----------
    delta : array (m, n), float32 or float64
    sketch : Sketch
    new : Fresh
        Draws directions that the sketch has not seen.
    """

    def __init__(self, delta: Array, sketch: Sketch, new: Fresh) -> None:
        self.delta, self.sketch, self.new = delta, sketch, new
        values = np.asarray(sketch.values)
        right = product(delta, sketch.right)
        missed = settled(right - sketch.left * from_numpy_like(values, sketch.left))
        self.image = right
        """Δ·V (m, l)."""
        self._values2 = np.diag(values**2)
        self._missed2: Host = to_numpy(namespace(missed).matrix_transpose(missed) @ missed)

    def least(self, rank: int, norm2: float) -> float:
        """Bound the residual of every matrix of a rank from below, given φ²."""
        slack = _ROUNDING * self.sketch.whole
        norm2 = max(norm2, slack)
        energy = min(self._energy(rank, norm2, margin) for margin in _MARGINS)
        return sqrt(max(self.sketch.whole - energy - slack, 0.0))

    def _energy(self, rank: int, norm2: float, margin: float) -> float:
        shifted = self._values2 + self._missed2 * (margin / (margin - 1.0))
        leading = np.linalg.eigvalsh(shifted)[::-1][:rank]
        return float(np.sum(np.maximum(leading, margin * norm2)))

    def proved(self, rank: int, slack: float) -> float | None:
        """Give the bound if it shows the sketch to be within `slack` of the best; else None."""
        found = sqrt(self.sketch.residual2(rank))
        best = 0.0
        for norm2 in self.norms2():
            best = max(best, self.least(rank, norm2))
            if found <= (1.0 + slack) * best or found**2 <= _NOTHING * self.sketch.whole:
                return min(best, found)
        return None

    def norms2(self) -> Iterator[float]:
        """Give bounds of ‖F‖², each more costly than the one before."""
        rest = self.sketch.whole - float(np.trace(self._values2) + np.trace(self._missed2))
        yield max(rest, 0.0)
        delta = self.delta
        xp = namespace(delta)
        q, v = (like(x, delta) for x in (self.sketch.left, self.sketch.right))

        def less(x: Array, basis: Array) -> Array:
            return settled(x - basis @ (xp.matrix_transpose(basis) @ x))

        x = less(self.new.normal((delta.shape[1], _VECTORS)), v)
        lengths = np.zeros(_VECTORS)
        for power in range(1, _POWERS[-1] + 1):
            x = less(xp.matrix_transpose(delta) @ less(delta @ x, q), v)
            norms = np.maximum(to_numpy(xp.sqrt(xp.sum(x * x, axis=0))).astype("float64"), 1e-30)
            lengths += np.log(norms)
            x = x / like(from_numpy_like(norms, q), delta)
            if power in _POWERS:
                yield float(np.exp((np.max(lengths) - log(_SMALLEST)) / power))
