"""One step of two-dimensional wavelet synthesis, of whole matrices or of few coefficients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_any._typing import Array
from peft_any.backend import astype, creation_device, dtype_name, from_numpy_like, namespace
from peft_any.spectra import Host, placed_values, scattered
from peft_any.tape.indexing import can_put

FILTERS: Mapping[str, Sequence[float]] = json.loads(
    (Path(__file__).parent / "wavelets.json").read_text(encoding="utf-8")
)
"""Low-pass synthesis filters of orthonormal wavelets (Daubechies 1992, Ten lectures on wavelets,
https://doi.org/10.1137/1.9781611970104): extremal phase (db), least asymmetric (sym), coiflets;
coif4 is as Hugging Face PEFT has it, off by a hundredth: its files mean that."""


def padded(size: int, lo: Sequence[float]) -> int:
    """Give the even number of coefficients that a step with a filter turns into `size` or more."""
    size += len(lo) - 2
    return size + size % 2


def synthesis(c: Array, lo: Sequence[float]) -> Array:
    """Synthesise a matrix from its four quarters of coefficients.

    The quarter at the top right goes through the high-pass filter along the rows' axis, the one
    at the bottom left along the columns': Hugging Face PEFT's order.

    Parameters
    ----------
    c : array (2k, 2l)
    lo : sequence of float
        A low-pass filter of even length L.

    Returns
    -------
    array (2k − L + 2, 2l − L + 2)

    Examples
    --------
    >>> import numpy as np
    >>> synthesis(np.asarray([[2.0, 0.0], [0.0, 0.0]]), [0.5**0.5] * 2)
    array([[1., 1.],
           [1., 1.]])
    """
    xp, (k, m) = namespace(c), (c.shape[0] // 2, c.shape[1] // 2)
    hi = [(-1) ** i * v for i, v in enumerate(reversed(lo))]
    across = xp.matrix_transpose(c)  # columns first, as rows
    low, high = across[:m, :], across[m:, :]
    first = _stretched(low[:, :k], lo) + _stretched(low[:, k:], hi)
    second = _stretched(high[:, :k], lo) + _stretched(high[:, k:], hi)
    rows = _stretched(xp.matrix_transpose(first), lo) + _stretched(xp.matrix_transpose(second), hi)
    return rows


def _stretched(c: Array, f: Sequence[float]) -> Array:
    """Set zeros between rows and filter: Σᵢ f[n − 2i]·c[i], less what only a part of f reaches."""
    xp, (k, n), taps = namespace(c), c.shape, len(f) // 2
    if taps > 1:
        none = xp.zeros((taps - 1, n), dtype=c.dtype, device=creation_device(c))
        c = xp.concat([none, c, none], axis=0)
    last = taps - 1
    slices = [c[last - j : last - j + k + last, :] for j in range(taps)]
    even = sum((f[2 * j] * s for j, s in enumerate(slices[1:], 1)), f[0] * slices[0])
    odd = sum((f[2 * j + 1] * s for j, s in enumerate(slices[1:], 1)), f[1] * slices[0])
    both: Array = xp.reshape(xp.stack([even, odd], axis=1), (2 * (k + last), n))
    trim = (2 * len(f) - 3) // 2
    return both[trim : 2 * (k + last) - trim, :] if trim else both


def entries(
    values: Array, places: Host, shape: tuple[int, int], lo: Sequence[float] | None
) -> tuple[Array, Array] | None:
    """Give what `synthesised` consists of where that is little: L² entries for each coefficient.

    Parameters
    ----------
    values, places, shape, lo
        As for `synthesised`.

    Returns
    -------
    (values (j,), places (j,)), or None
        Flat places, where the values add up; repeated ones only with a filter. None where they are
        many, or the library's arrays cannot be written to.

    Examples
    --------
    >>> values, places = entries(np.asarray([2.0]), np.asarray([0]), (2, 3), [0.5**0.5] * 2)
    >>> values.round(12), places
    (array([1., 1., 1., 1.]), array([0, 1, 3, 4]))
    """
    if lo is None:
        return values, from_numpy_like(places.copy(), values)
    if not can_put(values) or len(places) * len(lo) ** 2 >= shape[0] * shape[1]:
        return None
    filters = np.asarray([lo, [(-1) ** i * v for i, v in enumerate(reversed(lo))]])
    (u, up, tall), (v, left, wide) = _padded(places, shape, lo)
    taps = np.arange(len(lo)) - (len(lo) - 2)
    rows = 2 * (u % (tall // 2))[:, None, None] + taps[:, None] - up
    columns = 2 * (v % (wide // 2))[:, None, None] + taps - left
    # the axis of the rows takes its filter from the column's half, and the other way round
    factors = filters[v // (wide // 2)][:, :, None] * filters[u // (tall // 2)][:, None, :]
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    which = from_numpy_like(np.nonzero(inside)[0], values)
    scale = from_numpy_like(astype(factors[inside], dtype_name(values)), values)
    at = from_numpy_like((rows * shape[1] + columns)[inside], values)
    return namespace(values).take(values, which) * scale, at


def synthesised(
    values: Array, places: Host, shape: tuple[int, int], lo: Sequence[float] | None
) -> Array:
    """Synthesise the middle of a matrix from coefficients at few places, the others being zero.

    Parameters
    ----------
    values : array (k,)
    places : host array (k,) of int
        Flat places in a matrix of `shape`, each once, which is padded to what it takes.
    shape : (int, int)
        (m, n), of the result too.
    lo : sequence of float, optional
        A low-pass filter of even length L; none: the coefficients are the result.

    Returns
    -------
    array (m, n)

    Examples
    --------
    >>> synthesised(np.asarray([2.0]), np.asarray([0]), (2, 3), [0.5**0.5] * 2).round(12)
    array([[1., 1., 0.],
           [1., 1., 0.]])
    """
    if lo is None:
        return placed_values(values, places, shape)
    if (few := entries(values, places, shape, lo)) is not None:
        return namespace(values).reshape(scattered(*few, shape[0] * shape[1]), shape)
    (u, up, tall), (v, left, wide) = _padded(places, shape, lo)
    whole = synthesis(placed_values(values, u * wide + v, (tall, wide)), lo)
    return whole[up : up + shape[0], left : left + shape[1]]


def _padded(places: Host, shape: tuple[int, int], lo: Sequence[float]) -> Any:
    """Pad, and give by axis: places, what is cut before the result, and the padded size."""
    found = []
    for at, size in zip(np.divmod(places, shape[1]), shape, strict=True):
        whole = padded(size, lo)
        found.append((at + (whole - size) // 2, (whole - len(lo) + 2 - size) // 2, whole))
    return found
