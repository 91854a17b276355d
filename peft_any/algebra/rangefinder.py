"""The leading singular triplets of a matrix by random projection, with a proof that they are.

Halko, Martinsson & Tropp 2011, https://arxiv.org/abs/0909.4061.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from peft_any._typing import Array
from peft_any.algebra.blockwise import cross, distance, doubled, like, product, square
from peft_any.algebra.certificate import Certificate, Sketch
from peft_any.algebra.lowrank import Cut, Factors, cut_svd
from peft_any.backend import from_numpy_like, namespace, qr, settled, svd, to_numpy
from peft_any.rng import Fresh

SLACK = 0.01
"""How far above the smallest possible residual one may be."""
_DENSE = 4
"""A sketch wider than this part of a matrix costs as much as the full decomposition."""
_SMALL = 128
"""A side up to which the full decomposition takes no time."""
_SWEEPS = (2, 2, 4)
"""Power iterations before each attempt at a proof."""
_FAINT = 1e-9
"""Share of ‖Δ‖² below which a residual is looked for in double precision."""


@dataclass(frozen=True)
class Approximation:
    """The leading part of a matrix Δ, and how good it is.

    Attributes
    ----------
    factors : (array (m, k), array (k, n))
        U·√S and √S·Vᵀ in the dtype of Δ, so signed that the largest component of each column of
        U is positive.
    values : tuple of float
        The k singular values.
    norm, residual : float
        ‖Δ‖ and ‖Δ − U·S·Vᵀ‖ (Frobenius).
    least : float
        No matrix of rank k comes closer to Δ than this.
    way : str
        ``range finder`` or ``svd``.
    """

    factors: Factors
    values: tuple[float, ...]
    norm: float
    residual: float
    least: float
    way: str

    @property
    def rank(self) -> int:
        """How many triplets there are."""
        return len(self.values)


def approximate(delta: Array, cut: Cut, new: Fresh, slack: float = SLACK) -> Approximation:
    """Find the leading singular triplets of a matrix, nearly as well as the full decomposition.

    The residual is at most ``1 + slack`` times the smallest that any matrix of that rank has.
    That is proved for each matrix (`algebra.certificate`); where it cannot be, or where the rank
    is a large part of a side, the full decomposition is taken. A residual below 2·10⁻⁷·‖Δ‖ is
    taken for rounding.

    Parameters
    ----------
    delta : array (m, n), float32 or float64
    cut : Cut
        With `rank`, `energy` or both.
    new : Fresh
        Draws the random directions, in the library and dtype of `delta`.
    slack : float

    Returns
    -------
    Approximation
        Of rank 0 where the matrix is zero.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.backend import resolve
    >>> new = Fresh(0, resolve("numpy"), dtype="float64")
    >>> found = approximate(np.diag(np.asarray([3.0, 2.0, 1.0])), Cut(energy=0.9), new)
    >>> found.rank, round(found.residual, 12)
    (2, 1.0)
    """
    whole = square(delta)
    if not whole:
        return Approximation((delta[:, :0], delta[:0, :]), (), 0.0, 0.0, 0.0, "svd")
    shortest = min(delta.shape)
    rank, basis, tries = 16 if cut.rank is None else cut.rank, None, 0
    if cut.reads_values:
        rank = min(rank, 16)
    while tries < len(_SWEEPS) and _width(rank) * _DENSE < shortest > _SMALL:
        start = _start(delta, basis, _width(rank), new)
        sketch = _sketch(delta, start, _SWEEPS[tries], whole)
        missing = sqrt(sketch.residual2(len(sketch.values)))
        kept = cut.keep([*sketch.values, missing])
        if _width(kept) > len(sketch.values):
            rank, basis = max(2 * rank, kept, _needed(cut, sketch)), sketch.right
            continue
        proof = Certificate(delta, sketch, new)
        least = proof.proved(kept, slack)
        if least is not None:
            return _leading(sketch, kept, delta, least)
        rank, basis, tries = kept, sketch.right, tries + 1
    return _full(delta, cut, whole)


def _width(rank: int) -> int:
    """Columns of a sketch for a rank."""
    return rank + max(16, rank // 2)


def _needed(cut: Cut, sketch: Sketch) -> int:
    """Say what rank is needed at the least to hold the energy asked for."""
    held, last = sum(s * s for s in sketch.values), sketch.values[-1] ** 2
    short = max((cut.energy or 0.0) * sketch.whole - held, 0.0)
    more = short / last if last * (1 << 30) > short else 1 << 30
    rank = len(sketch.values) + int(more)
    return rank if cut.rank is None else min(rank, cut.rank)


def _start(delta: Array, basis: Array | None, width: int, new: Fresh) -> Array:
    """Draw directions, beside those that are known."""
    known = 0 if basis is None else basis.shape[1]
    drawn = new.normal((delta.shape[1], max(width - known, 0)))
    parts = [drawn] if basis is None else [like(basis, delta), drawn]
    return namespace(delta).concat(parts, axis=1)


def _sketch(delta: Array, start: Array, sweeps: int, whole: float) -> Sketch:
    """Find the part of a matrix in the range to which directions lead (algorithm 4.4)."""
    transposed = namespace(delta).matrix_transpose(delta)
    q = qr(settled(delta @ start))[0]
    for _ in range(sweeps):
        q = qr(settled(transposed @ q))[0]
        q = qr(settled(delta @ q))[0]
    sketch = _projected(delta, q, whole)
    if sketch.residual2(len(sketch.values)) < _FAINT * whole:  # more than float32 has seen
        sketch = _projected(delta, product(delta, sketch.right), whole)
    return sketch


def _projected(delta: Array, basis: Array, whole: float) -> Sketch:
    """Decompose the part of a matrix in the range of a thin one, in double precision."""
    q = settled(qr(doubled(basis))[0])
    right, lower = map(settled, qr(cross(delta, q)))
    xp = namespace(q)
    u, s, vt = svd(xp.matrix_transpose(lower))
    v = settled(right @ xp.matrix_transpose(vt))
    return Sketch(settled(q @ u), v, tuple(to_numpy(s).tolist()), whole)


def _leading(sketch: Sketch, rank: int, delta: Array, least: float) -> Approximation:
    values = sketch.values[:rank]
    u, v = sketch.left[:, :rank], sketch.right[:, :rank]
    signs = _signs(u) * from_numpy_like([sqrt(s) for s in values], u)
    factors = like(u * signs, delta), like(namespace(v).matrix_transpose(v * signs), delta)
    residual = sqrt(sketch.residual2(rank))
    return Approximation(factors, values, sqrt(sketch.whole), residual, least, "range finder")


def _full(delta: Array, cut: Cut, whole: float) -> Approximation:
    u, s, vt = map(settled, svd(delta))
    signs = _signs(u)
    best = cut_svd(u * signs, s, signs[:, None] * vt, cut)
    every = [float(x) for x in to_numpy(s)]
    residual = distance(delta, best.factors)
    least = min(sqrt(sum(x * x for x in reversed(every[best.rank :]))), residual)
    values = tuple(every[: best.rank])
    return Approximation(best.factors, values, sqrt(whole), residual, least, "svd")


def _signs(u: Array) -> Array:
    """±1 for each column, so that its largest component becomes positive."""
    xp = namespace(u)
    one = xp.ones_like(u[0, :])
    return xp.where(xp.max(u, axis=0) + xp.min(u, axis=0) < 0.0, -one, one)
