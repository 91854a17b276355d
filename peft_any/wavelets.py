"""One step of two-dimensional wavelet synthesis, on standard functions only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_any._typing import Array
from peft_any.backend import creation_device, namespace

FILTERS: Mapping[str, Sequence[float]] = json.loads(
    (Path(__file__).parent / "wavelets.json").read_text(encoding="utf-8")
)
"""Low-pass synthesis filters of orthonormal wavelets (Daubechies 1992, Ten lectures on wavelets,
https://doi.org/10.1137/1.9781611970104): extremal phase (db), least asymmetric (sym), coiflets."""


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
    whole: Array = rows
    return whole


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
