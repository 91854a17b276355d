"""Points in groups: k-means."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

SEED = 123456789
"""Of the points that the groups start from, in Hugging Face PEFT's AdaMSS."""


def grouped(points: Any, k: int, sweeps: int = 10, seed: int = SEED) -> Any:
    """Part points into k groups around their means (Lloyd 1982, 10.1109/TIT.1982.1056489).

    The steps are those of scikit-learn's ``KMeans(init="random", n_init=1)``: k of the points are
    drawn for a start, the means stop when they move by less than 10⁻⁴ of the mean variance, and
    a group that has lost all its points takes the one that is farthest from its mean.

    Parameters
    ----------
    points : array (n, d), on the host
    k : int
        At most n.
    sweeps : int
    seed : int

    Returns
    -------
    array of int64 (n,)
        Each point's group, from 0 to k − 1; none is empty.

    Examples
    --------
    >>> grouped([[0.0], [5.0], [0.1], [5.2]], 2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    True
    """
    return _grouped(points, k, sweeps, seed)[0]


def clearly_grouped(points: Any, k: int, sweeps: int = 10, seed: int = SEED) -> tuple[Any, float]:
    """Part points as `grouped` does, and say by how much they may be off.

    Returns
    -------
    labels : array of int64 (n,)
    off : float
        Points that are nearer than this to the given ones, turned by any rotation, are parted
        alike: it is a part of the least lead that a mean has over the next, at any step.

    Examples
    --------
    >>> labels, off = clearly_grouped([[0.0], [5.0], [0.1], [5.2]], 2)
    >>> len(labels), 0 < off < 0.1
    (4, True)
    """
    return _grouped(points, k, sweeps, seed)


def _grouped(points: Any, k: int, sweeps: int, seed: int) -> tuple[Any, float]:
    x = np.asarray(points)
    x = x.astype(np.float64) - np.mean(x, axis=0, dtype=np.float64)
    bound = 1e-4 * np.mean(np.var(x, axis=0))
    start = np.random.RandomState(seed).choice(len(x), size=k, replace=False, p=_even(len(x)))
    means, labels, off = x[start], np.full(len(x), -1), inf
    for _ in range(sweeps):
        off = min(off, _lead(x, means))
        before, labels = labels, _nearest(x, means)
        moved = _means(x, means, labels)
        moves, means = np.sum((moved - means) ** 2), moved
        if np.array_equal(labels, before):
            return _filled(x, means, labels), off
        off = min(off, float(abs(moves**0.5 - bound**0.5)) / (4.0 * k**0.5))
        if moves <= bound:
            break
    off = min(off, _lead(x, means))
    return _filled(x, means, _nearest(x, means)), off


def _lead(x: Any, means: Any) -> float:
    """Say how far points and means may be off, each, and no point be nearer to another mean.

    Nothing where a mean has no point: which one it takes hangs on distances.
    """
    if len(means) == 1:
        return inf
    away = np.stack([np.linalg.norm(x - mean, axis=1) for mean in means], axis=1)
    if len({*np.argmin(away, axis=1).tolist()}) < len(means):
        return 0.0
    first, second = np.partition(away, 1, axis=1)[:, :2].T
    return float(np.min(second - first)) / 5.0


def _even(n: int) -> Any:
    """Say that every point is as likely: the draw takes another course without."""
    return np.full(n, 1.0 / n)


def _nearest(x: Any, means: Any) -> Any:
    return np.argmin(np.sum(means**2, axis=1) - 2.0 * (x @ means.T), axis=1)


def _means(x: Any, means: Any, labels: Any) -> Any:
    """Give the groups' means."""
    labels = _filled(x, means, labels)
    count = np.bincount(labels, minlength=len(means))
    return (
        np.stack([np.bincount(labels, column, len(means)) for column in x.T], axis=1)
        / count[:, None]
    )


def _filled(x: Any, means: Any, labels: Any) -> Any:
    """Give empty groups the points that are farthest from the means of theirs."""
    labels, k = labels.copy(), len(means)
    away = np.sum((x - means[labels]) ** 2, axis=1)
    for group in np.nonzero(np.bincount(labels, minlength=k) == 0)[0]:
        crowded = np.bincount(labels, minlength=k)[labels] > 1
        labels[np.argmax(np.where(crowded, away, -1.0))] = group
    return labels
