"""How far factors are from what they stand for, from products of the factors alone."""

from __future__ import annotations

from math import sqrt
from typing import Any

from peft_any._typing import Array
from peft_any.algebra import lowrank
from peft_any.algebra.blockwise import distance, square
from peft_any.algebra.lowrank import Factors
from peft_any.backend import namespace, widest

_CANCELLED = 1e-3
"""Below this part of its terms, a sum of squares is not taken for what is left of it."""


def length(factors: Factors) -> float:
    """Find ‖u·v‖ (Frobenius): Σ (uᵀ·u) ∘ (v·vᵀ), or by QR where terms of that sum cancel.

    Examples
    --------
    >>> import numpy as np
    >>> length((np.ones((4, 2)), np.ones((2, 1))))
    4.0
    """
    u, v = map(widest, factors)
    xp = namespace(u, v)
    terms = (xp.matrix_transpose(u) @ u) * (v @ xp.matrix_transpose(v))
    found, most = float(xp.sum(terms)), float(xp.sum(xp.abs(terms)))
    if found > _CANCELLED * most:
        return sqrt(found)
    exact: Any = lowrank.norm((u, v)) if most else 0.0
    return float(exact)


def gap(one: Factors, two: Factors) -> Factors:
    """Give u₁·v₁ − u₂·v₂ as a product; of factors that are nearly the same, by their difference.

    Examples
    --------
    >>> import numpy as np
    >>> u, v = gap((np.ones((1, 1)), np.ones((1, 1))), (np.ones((1, 1)), np.zeros((1, 1))))
    >>> u @ v
    array([[1.]])
    """
    (u, v), (y, z) = (tuple(map(widest, pair)) for pair in (one, two))
    if u.shape[1] != y.shape[1]:
        return lowrank.total([(1.0, (u, v)), (-1.0, (y, z))])
    xp = namespace(u, v, y, z)
    return xp.concat([u - y, y], axis=1), xp.concat([v, v - z], axis=0)


def error_of(stored: Factors, made: Factors, wanted: Factors | Array, lost: float) -> float | None:
    """Find ‖stored − wanted‖/‖wanted‖; None where nothing is wanted.

    ‖stored − wanted‖² = ‖stored − made‖² + 2·⟨stored − made, made − wanted⟩ + ‖made − wanted‖².

    Parameters
    ----------
    stored, made : Factors
        After and before rounding.
    wanted : Factors, or array (m, n)
    lost : float
        ‖made − wanted‖²; only for factors.
    """
    if not isinstance(wanted, tuple):
        size = sqrt(square(wanted))
        return distance(wanted, stored) / size if size else None
    size, rounding = length(wanted), gap(stored, made)
    if not size:
        return None
    total = length(rounding) ** 2
    if lost:
        dots: list[Any] = [lowrank.dot(rounding, part) for part in (made, wanted)]
        total += 2.0 * (float(dots[0]) - float(dots[1])) + lost
    return sqrt(max(total, 0.0)) / size
