"""Matrices of low rank as pairs of factors: sums, spectra and truncation, never a full product.

A pair is ``(u, v)`` with u (m, k) and v (k, n) and stands for u·v; k may exceed m and n.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import TypeAlias

import numpy as np

from peft_any._typing import Array
from peft_any.backend import creation_device, namespace, qr, to_numpy, widest
from peft_any.errors import ShapeError, UsageError

Factors: TypeAlias = tuple[Array, Array]
_DECIMAL = 2.0**-52
"""How far a share such as 0.9 may be from the number meant."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How many of the leading singular values s₁ ≥ s₂ ≥ … to keep; no more than `rank`.

    Parameters
    ----------
    rank : int, optional
        That many; with one of the others, at most that many.
    energy : float, optional
        The fewest that hold this share of ‖Δ‖² = Σ s².
    sv_fro, sv_cumulative : float, optional
        The fewest that hold this share of ‖Δ‖, or of Σ s.
    sv_ratio : float, optional
        Those above s₁/`sv_ratio`. The last three are named as in kohya's ``resize_lora.py``.

    Raises
    ------
    UsageError
        If a number is out of its range, or two selectors are given.

    Examples
    --------
    >>> Cut(energy=0.9).keep([3.0, 1.0, 0.0]), Cut(sv_ratio=4).keep([3.0, 1.0])
    (1, 2)
    """

    rank: int | None = None
    energy: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    sv_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or self.rank < 1):
            raise UsageError(f"rank={self.rank!r}: cannot be a rank: give at least 1")
        given = {k: v for k, v in vars(self).items() if k != "rank" and v is not None}
        if len(given) > 1:
            raise UsageError(f"{'= and '.join(given)}=: cannot both choose the rank: give one")
        for name, value in given.items():
            if name == "sv_ratio":
                if not (isfinite(value) and value >= 1):
                    raise UsageError(f"sv_ratio={value}: cannot be a ratio s₁/s: give at least 1")
            elif not 0 < value <= 1:
                raise UsageError(f"{name}={value}: cannot be a share: give one in (0, 1]")

    @property
    def selector(self) -> str | None:
        """What besides `rank` is given."""
        return next((k for k, v in vars(self).items() if k != "rank" and v is not None), None)

    @property
    def reads_values(self) -> bool:
        """Whether the singular values themselves decide, and not their number alone."""
        return self.selector is not None

    def keep(self, s: Iterable[float], rounding: float = 0.0) -> int:
        """Count the values to keep: at least one, but none of a zero matrix.

        Parameters
        ----------
        s : iterable of float
            Singular values in descending order.
        rounding : float
            Values up to this are taken for zero.
        """
        values = np.asarray([*s], dtype="float64")
        most = len(values) if self.rank is None else min(self.rank, len(values))
        if not self.reads_values:
            return most
        values = values[values > rounding]
        if not len(values):
            return 0
        if self.sv_ratio is not None:
            return min(most, max(1, int(np.sum(values > values[0] / self.sv_ratio))))
        measured = values if self.sv_cumulative is not None else values**2
        # what is left after the first 0, 1, 2 … values: small sums are not lost in a large one
        left = np.append(np.cumsum(measured[::-1])[::-1], 0.0)
        share = self.sv_cumulative or self.energy or (self.sv_fro or 0.0) ** 2
        allowed = 1.0 - share + _DECIMAL if share < 1 else 0.0
        return min(most, int(np.argmax(left <= allowed * left[0])))


@dataclass(frozen=True)
class Truncation:
    """The best approximation of a rank (Eckart & Young 1936, https://doi.org/10.1007/BF02288367).

    Attributes
    ----------
    factors : (array (m, k), array (k, n))
        U·√S and √S·Vᵀ of the values kept.
    spectrum : array (p,)
        All singular values of the whole, p ≤ min(m, n).
    """

    factors: Factors
    spectrum: Array

    @property
    def rank(self) -> int:
        """How many singular values are kept."""
        return int(self.factors[1].shape[0])

    @property
    def discarded(self) -> float:
        """Share of ‖Δ‖² that is not kept."""
        s = to_numpy(self.spectrum).astype("float64")
        whole = float(np.sum(s**2))
        return float(np.sum(s[self.rank :] ** 2)) / whole if whole else 0.0


def total(terms: Iterable[tuple[float, Factors]]) -> Factors:
    """Sum weighted products exactly, by laying their factors side by side.

    Parameters
    ----------
    terms : iterable of (weight, (u, v))
        At least one; all of one shape (m, n).

    Returns
    -------
    (array (m, Σk), array (Σk, n))
        With the weights in the first.

    Raises
    ------
    ShapeError
        If the products differ in shape, or there are none.

    Examples
    --------
    >>> import numpy as np
    >>> one = np.ones((2, 1)), np.ones((1, 2))
    >>> u, v = total([(2.0, one), (-1.0, one)])
    >>> u @ v
    array([[1., 1.],
           [1., 1.]])
    """
    pairs = [(w * u if w != 1 else u, v) for w, (u, v) in terms]
    shapes = {(u.shape[0], v.shape[1]) for u, v in pairs}
    if len(shapes) != 1:
        raise ShapeError(f"products of shapes {sorted(shapes)}: cannot be summed")
    if len(pairs) == 1:
        return pairs[0]
    us, vs = zip(*pairs, strict=True)
    xp = namespace(*us, *vs)
    return xp.concat(us, axis=1), xp.concat(vs, axis=0)


def svd(factors: Factors) -> tuple[Array, Array, Array]:
    """Decompose u·v by the QR factors of u and vᵀ and the SVD of a (p, p) matrix between them.

    In double precision where the library has it; O((m + n)·k²) operations.

    Parameters
    ----------
    factors : (array (m, k), array (k, n))

    Returns
    -------
    u (m, p), s (p,), vt (p, n)
        p = min(m, n, k); s descending.

    Examples
    --------
    >>> import numpy as np
    >>> svd((np.asarray([[3.0], [4.0]]), np.asarray([[0.0, 2.0]])))[1]
    array([10.])
    """
    left, core, right = _core(factors)
    xp = namespace(core)
    u, s, vt = xp.linalg.svd(core, full_matrices=False)
    return left @ u, s, vt @ xp.matrix_transpose(right)


def spectrum(factors: Factors) -> Array:
    """Find the singular values of u·v (min(m, n, k),), in descending order.

    Examples
    --------
    >>> import numpy as np
    >>> spectrum((np.ones((4, 2)), np.ones((2, 1)))).tolist()
    [4.0]
    """
    _, core, _ = _core(factors)
    return namespace(core).linalg.svd(core, full_matrices=False)[1]  # Dask has no svdvals


def norm(factors: Factors) -> Array:
    """Find ‖u·v‖ (Frobenius), without the cancellation that Gram matrices suffer from.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm((np.ones((4, 2)), np.ones((2, 1)))))
    4.0
    """
    _, core, _ = _core(factors)
    xp = namespace(core)
    return xp.sqrt(xp.sum(core * core))


def dot(one: Factors, two: Factors) -> Array:
    """Find ⟨u₁·v₁, u₂·v₂⟩ = Σ (u₁ᵀ·u₂) ∘ (v₁·v₂ᵀ).

    Examples
    --------
    >>> import numpy as np
    >>> float(dot((np.ones((4, 2)), np.ones((2, 1))), (np.ones((4, 1)), np.ones((1, 1)))))
    8.0
    """
    (u, v), (y, z) = (tuple(map(widest, pair)) for pair in (one, two))
    xp = namespace(u, v, y, z)
    return xp.sum((xp.matrix_transpose(u) @ y) * (v @ xp.matrix_transpose(z)))


def truncate(factors: Factors, cut: Cut) -> Truncation:
    """Give the best approximation of u·v of the rank that a cut chooses.

    With `rank` alone nothing depends on values, and lazy libraries stay lazy.

    Parameters
    ----------
    factors : (array (m, k), array (k, n))
    cut : Cut

    Examples
    --------
    >>> import numpy as np
    >>> best = truncate((np.diag([2.0, 1.0]), np.eye(2)), Cut(rank=1))
    >>> best.rank, best.discarded
    (1, 0.2)
    """
    u, s, vt = svd(factors)
    return cut_svd(u, s, vt, cut)


def cut_svd(u: Array, s: Array, vt: Array, cut: Cut) -> Truncation:
    """Keep the leading triplets of a singular value decomposition.

    Parameters
    ----------
    u (m, p), s (p,), vt (p, n)
    cut : Cut
    """
    xp, k = namespace(u, s, vt), s.shape[0]
    if cut.reads_values:
        values = [float(x) for x in to_numpy(s)]
        size = max(u.shape[0], vt.shape[1])
        k = cut.keep(values, float(xp.finfo(s.dtype).eps) * size * max(values, default=0.0))
    else:
        k = min(k, cut.rank or k)
    root = xp.sqrt(s[:k])
    return Truncation((u[:, :k] * root, root[:, None] * vt[:k, :]), s)


def pad(factors: Factors, rank: int) -> Factors:
    """Grow factors to a larger rank with zeros: the product stays as it is, bit for bit.

    Raises
    ------
    ShapeError
        If they already have a larger rank.

    Examples
    --------
    >>> import numpy as np
    >>> pad((np.ones((2, 1)), np.ones((1, 1))), 2)[1].tolist()
    [[1.0], [0.0]]
    """
    u, v = factors
    m, k = u.shape
    if k > rank:
        raise ShapeError(f"factors of rank {k}: cannot be padded to {rank}: truncate them")
    if k == rank:
        return factors
    xp = namespace(u, v)
    more_u = xp.zeros((m, rank - k), dtype=u.dtype, device=creation_device(u))
    more_v = xp.zeros((rank - k, v.shape[1]), dtype=v.dtype, device=creation_device(v))
    return xp.concat([u, more_u], axis=1), xp.concat([v, more_v], axis=0)


def _core(factors: Factors) -> tuple[Array, Array, Array]:
    """Q of u, R_u·R_vᵀ, and Q of vᵀ: the middle one has the product's singular values."""
    u, v = map(widest, factors)
    xp = namespace(u, v)
    left, upper = qr(u)
    right, lower = qr(xp.matrix_transpose(v))
    return left, upper @ xp.matrix_transpose(lower), right
