"""One step of two-dimensional wavelet synthesis, of whole matrices or of few coefficients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_any._typing import Array
from peft_any.backend import astype, creation_device, dtype_name, from_numpy_like, namespace
from peft_any.tape.indexing import put

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


def synthesis_of_few(
    values: Array, places: npt.NDArray[Any], shape: tuple[int, int], lo: Sequence[float]
) -> Array:
    """Synthesise as `synthesis` does from coefficients at few places, by their own L² entries each.

    Parameters
    ----------
    values : array (k,)
        Of a library whose arrays can be written to (`peft_any.tape.indexing.can_put`).
    places : host array (k,) of int
        Flat places in the matrix of coefficients.
    shape : (int, int)
        Of that matrix.
    lo : sequence of float

    Returns
    -------
    array (shape[0] − L + 2, shape[1] − L + 2)

    Examples
    --------
    >>> synthesis_of_few(np.asarray([2.0]), np.asarray([0]), (2, 2), [0.5**0.5] * 2)
    array([[1., 1.],
           [1., 1.]])
    """
    xp, size = namespace(values), len(lo)
    filters = np.asarray([lo, [(-1) ** i * v for i, v in enumerate(reversed(lo))]])
    half, count = [n // 2 for n in shape], [n - size + 2 for n in shape]
    u, v = places // shape[1], places % shape[1]
    taps = np.arange(size) - (size - 2)
    rows = 2 * (u % half[0])[:, None, None] + taps[:, None]
    columns = 2 * (v % half[1])[:, None, None] + taps
    # the axis of the rows takes its filter from the column's half, and the other way round
    factors = filters[v // half[1]][:, :, None] * filters[u // half[0]][:, None, :]
    inside = (rows >= 0) & (rows < count[0]) & (columns >= 0) & (columns < count[1])
    which = np.nonzero(inside)[0]
    at = from_numpy_like((rows * count[1] + columns)[inside], values)
    scale = from_numpy_like(astype(factors[inside], dtype_name(values)), values)
    shares = xp.take(values, from_numpy_like(which, values)) * scale
    return xp.reshape(put(xp, shares, (at,), (count[0] * count[1],)), tuple(count))
