"""Mixtures of the few likeliest of many: by their logits, or by places and weights."""

from __future__ import annotations

import numpy as np

from peft_any._typing import Array
from peft_any.backend import creation_device, detach, namespace, to_numpy
from peft_any.rng import Host

_SIZES = ("uint8", 2**8), ("int16", 2**15), ("int32", 2**31)


def softmax(logits: Array) -> Array:
    """Shares along the last axis.

    Parameters
    ----------
    logits : array (..., n)

    Examples
    --------
    >>> softmax(np.asarray([0.0, 0.0]))
    array([0.5, 0.5])
    """
    xp = namespace(logits)
    e = xp.exp(logits - xp.max(detach(logits), axis=-1, keepdims=True))
    shares: Array = e / xp.sum(e, axis=-1, keepdims=True)
    return shares


def largest_shares(logits: Array, count: int) -> Array:
    """Softmax of the largest logits along the last axis; the other shares are zero.

    Parameters
    ----------
    logits : array (..., n)
    count : int
        How many are the largest.

    Examples
    --------
    >>> largest_shares(np.asarray([0.0, -1.0, 0.0]), 2)
    array([0.5, 0. , 0.5])
    """
    xp = namespace(logits)
    e = xp.exp(logits - xp.max(detach(logits), axis=-1, keepdims=True))
    e = e * xp.astype(among_largest(logits, count), e.dtype)
    shares: Array = e / xp.sum(e, axis=-1, keepdims=True)
    return shares


def among_largest(values: Array, count: int) -> Array:
    """Whether each is among the largest along the last axis; of equal ones the first are.

    Examples
    --------
    >>> among_largest(np.asarray([0.0, -1.0, 0.0, 0.0]), 2)
    array([ True, False,  True, False])
    """
    xp, left = namespace(values), detach(values)
    found = last = _largest_one(left)
    for _ in range(1, count):
        left = xp.where(last, xp.full_like(left, -float("inf")), left)
        last = _largest_one(left)
        found = xp.logical_or(found, last)
    return found


def _largest_one(values: Array) -> Array:
    place = namespace(values).argmax(values, axis=-1, keepdims=True)
    return _every(values.shape[-1], place) == place


def softmax_but_zeros(logits: Array) -> Array:
    """Softmax along the last axis of what is not 0; zeros stay so, and are all there is of none.

    Examples
    --------
    >>> softmax_but_zeros(np.asarray([[0.0, -9.0, -9.0], [0.0, 0.0, 0.0]]))
    array([[0. , 0.5, 0.5],
           [0. , 0. , 0. ]])
    """
    xp, known = namespace(logits), detach(logits)
    acts = known != 0.0
    top = xp.max(xp.where(acts, known, xp.full_like(known, -float("inf"))), axis=-1, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    e = xp.exp(xp.where(acts, logits, xp.zeros_like(logits) + top) - top)
    e = xp.where(acts, e, xp.zeros_like(e))
    total = xp.sum(e, axis=-1, keepdims=True)
    shares: Array = e / xp.where(total > 0.0, total, xp.ones_like(total))
    return shares


def placed_shares(weights: Array, places: Array, n: int) -> Array:
    """Lay weights at their places among n; the last one is the rest to 1, and not stored.

    Parameters
    ----------
    weights : array (..., k - 1)
    places : array (..., k), integers
    n : int

    Returns
    -------
    array (..., n)

    Examples
    --------
    >>> placed_shares(np.asarray([0.25]), np.asarray([2, 0]), 3)
    array([0.75, 0.  , 0.25])
    """
    xp = namespace(weights)
    last = 1.0 - xp.sum(weights, axis=-1, keepdims=True)
    weights = xp.expand_dims(xp.concat([weights, last], axis=-1), axis=-1)
    every = _every(n, places)
    hits = xp.expand_dims(xp.astype(places, every.dtype), axis=-1) == every
    shares: Array = xp.sum(weights * xp.astype(hits, weights.dtype), axis=-2)
    return shares


def largest(logits: Array, count: int) -> tuple[Host, Host]:
    """Give the places of the largest logits, and the weights of all of them but the last.

    Places have the smallest dtype that holds them, as in Hugging Face PEFT's files.

    Examples
    --------
    >>> places, weights = largest(np.asarray([0.0, -1.0, 0.0]), 2)
    >>> places, weights
    (array([0, 2], dtype=uint8), array([0.5]))
    """
    host = to_numpy(logits)
    places = np.argsort(-host, axis=-1, kind="stable")[..., :count]
    e = np.exp(np.take_along_axis(host, places, axis=-1))
    size = next((kind for kind, limit in _SIZES if host.shape[-1] < limit), "int64")
    return places.astype(size), (e / e.sum(axis=-1, keepdims=True))[..., :-1]


def _every(count: int, like: Array) -> Array:
    """The numbers of all places, where an array is."""
    numbers: Array = namespace(like).arange(count, device=creation_device(like))
    return numbers
