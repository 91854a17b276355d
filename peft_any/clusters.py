"""Points in groups: k-means."""

from __future__ import annotations

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
    x = np.asarray(points)
    x = x.astype(np.float64) - np.mean(x, axis=0, dtype=np.float64)
    bound = 1e-4 * np.mean(np.var(x, axis=0))
    start = np.random.RandomState(seed).choice(len(x), size=k, replace=False, p=_even(len(x)))
    means, labels = x[start], np.full(len(x), -1)
    for _ in range(sweeps):
        before, labels = labels, _nearest(x, means)
        moved = _means(x, means, labels)
        moves, means = np.sum((moved - means) ** 2), moved
        if np.array_equal(labels, before):
            return _filled(x, means, labels)
        if moves <= bound:
            break
    return _filled(x, means, _nearest(x, means))


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
