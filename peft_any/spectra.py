"""Dense matrices from few coefficients: sparse, Fourier and wavelet spectra."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_any._typing import Array
from peft_any.backend import (
    astype,
    creation_device,
    dtype_name,
    even_rows,
    from_numpy_like,
    in_memory,
    namespace,
    to_numpy,
)
from peft_any.errors import ConfigError
from peft_any.linalg import packed
from peft_any.rng import Fresh, TorchGenerator
from peft_any.tape.indexing import can_put, put

Host = npt.NDArray[Any]


def scattered(values: Array, places: Array, size: int) -> Array:
    """Put values at places of a vector of zeros; the places differ from one another.

    Where arrays cannot be written to, by a sort and a search instead, which are differentiable and
    lazy too.

    Parameters
    ----------
    values : array (k,)
    places : array (k,) of integers, each once
    size : int

    Returns
    -------
    array (size,)

    Examples
    --------
    >>> scattered(np.asarray([5.0, 7.0]), np.asarray([3, 1]), 4)
    array([0., 7., 0., 5.])
    """
    xp, index = namespace(values), namespace(places)
    if can_put(values):
        return put(xp, values, (places,), (size,))
    order = index.argsort(places)
    known = index.take(places, order)
    every = index.arange(size, dtype=known.dtype, device=creation_device(places))
    at = index.searchsorted(known, every)
    at = index.where(at < known.shape[0], at, index.zeros_like(at))
    found = xp.take(xp.take(values, order), at)
    return xp.where(index.take(known, at) == every, found, xp.zeros_like(found))


def added_at(weight: Array, values: Array, places: Array, *, minus: bool = False) -> Array:
    """Add values to a matrix, or take them away, at flat places that differ from one another.

    Where arrays can be written to, that copies the matrix and touches no more of it.

    Parameters
    ----------
    weight : array (m, n)
    values : array (k,)
    places : array (k,) of integers, each once
    minus : bool

    Returns
    -------
    array (m, n)

    Examples
    --------
    >>> added_at(np.ones((1, 3)), np.asarray([5.0]), np.asarray([1]))
    array([[1., 6., 1.]])
    """
    xp, values, size = namespace(weight, values), -values if minus else values, prod(weight.shape)
    if can_put(values):
        flat = put(xp, values, (places,), (size,), xp.reshape(weight, (size,)))
        return xp.reshape(flat, weight.shape)
    return weight + xp.reshape(scattered(values, places, size), weight.shape)


def placed_values(values: Array, places: Host, shape: tuple[int, int]) -> Array:
    """Put values at flat places, known on the host, of a matrix of zeros."""
    flat = scattered(values, from_numpy_like(places.copy(), values), shape[0] * shape[1])
    return namespace(values).reshape(flat, shape)


@lru_cache(maxsize=64)
def random_places(seed: int | None, size: int, count: int) -> Host:
    """Give the first places of torch's random permutation of 0 … size − 1, on the host.

    Examples
    --------
    >>> random_places(1, 9, 3).tolist()
    [4, 0, 6]
    """
    if seed is None:
        raise ConfigError("random_loc_seed=None: cannot place a spectrum: give a whole number")
    places = TorchGenerator(seed).randperm(size, count)
    places.setflags(write=False)
    return places


def sorted_places(new: Fresh, shape: tuple[int, int], count: int, seed: int | None) -> Any:
    """Draw places of a matrix: rows and columns (2, count) of int32, in the order of its rows.

    With a seed, by torch's permutation; else from `new`.
    """
    size = shape[0] * shape[1]
    if seed is None:
        flat = new.host.permutation(size)[:count]
    else:
        flat = new.torch(seed).randperm(size, count)
    return new.array(np.stack(np.divmod(np.sort(flat), shape[1])).astype(np.int32))


def extreme_places(new: Fresh, weight: Array, count: int, *, largest: bool) -> Any:
    """Find the flat places (count,) of the entries of largest, or smallest, magnitude, as int32.

    Of equal ones, the first.
    """
    size = np.abs(astype(to_numpy(weight), "float64")).reshape(-1)
    order = np.argsort(-size if largest else size, kind="stable")
    return new.array(order[:count].astype(np.int32))


def real_inverse_transform(
    values: Array, places: Host, shape: tuple[int, int], onto: Array | None = None
) -> Array:
    """Real part of the inverse Fourier transform of a matrix that is zero but at few places.

    It is the transform of the spectrum's Hermitian part, half of which says all; without the
    extension ``fft``, cosines and sines of the places (m·n·k operations).

    Parameters
    ----------
    values : array (k,)
    places : host array (k,) of int
        Flat, in the order of rows.
    shape : (int, int)
        (m, n).
    onto : array (m, n), optional
        What the transform is added to.

    Returns
    -------
    array (m, n)

    Examples
    --------
    >>> real_inverse_transform(np.asarray([4.0]), np.asarray([1]), (2, 2))
    array([[ 1., -1.],
           [ 1., -1.]])
    """
    xp, (m, n) = namespace(values), shape
    u, v = places // n, places % n
    if not hasattr(xp, "fft"):
        whole = _by_waves(values, u, v, shape)
        return whole if onto is None else onto + whole
    if can_put(values):
        kind = "complex64" if dtype_name(values) == "float32" else "complex128"
        waves = _column_waves(places.astype("int64").tobytes(), shape, kind)
        if waves is not None:
            return _by_columns(values, waves, shape, onto)
    width, half = n // 2 + 1, None
    for rows, columns in ((u, v), (-u % m, -v % n)):
        kept = np.nonzero(columns < width)[0]
        if len(kept):
            flat = from_numpy_like((rows * width + columns)[kept], values)
            part = scattered(xp.take(values, from_numpy_like(kept, values)), flat, m * width)
            half = part if half is None else half + part
    assert half is not None  # noqa: S101 - of v and −v one is at most n/2
    spectrum = xp.astype(0.5 * xp.reshape(half, (m, width)), _complex(xp, values))
    out: Array = xp.fft.irfftn(spectrum, s=shape, axes=(0, 1))
    return out if onto is None else onto + out


def _complex(xp: Any, like: Array) -> Any:
    return xp.result_type(like.dtype, xp.complex64)


_DEEP = 16
"""Up to so many places of one column, a transform of columns costs more than their waves."""


@lru_cache(maxsize=8)
def _column_waves(places: bytes, shape: tuple[int, int], kind: str) -> tuple[Host, ...] | None:
    """Sort places by the column of the half spectrum that each belongs to, v or −v.

    Returns
    -------
    slots : (columns with places + 1, depth) of int
        Which places a column has, filled up with one that is not there; the last column has none.
    coarse : (…, I·a, 2·depth), fine : (…, depth, 2, 2·b)
        Their waves along the rows: that of row I·a + b is the product. Both are of real numbers,
        a complex one being two, and `fine` holds it, and then i times it.
    of_column : (n // 2 + 1,) of int
        The row of `slots`, for every column.
    known : (columns with places,) of int
        The columns with places.
    """
    (m, n), (u, v) = shape, np.divmod(np.frombuffer(places, "int64"), shape[1])
    mirrored = v > n // 2
    column, turns = np.where(mirrored, n - v, v), np.where(mirrored, -u, u) % m
    counts = np.bincount(column, minlength=n // 2 + 1)
    depth, known = int(counts.max()), np.nonzero(counts)[0]
    if depth > _DEEP:
        return None
    order = np.argsort(column, kind="stable")
    starts = np.cumsum(counts) - counts
    of_column = np.full(n // 2 + 1, len(known))
    of_column[known] = np.arange(len(known))
    slots = np.full((len(known) + 1, depth), len(u))
    slots[of_column[column[order]], np.arange(len(u)) - starts[column[order]]] = order
    at, step = np.append(turns, 0)[slots], isqrt(m // 2 + 1)
    roots = (np.exp(2j * np.pi / m * np.arange(m)) / m).astype(kind)
    coarse = roots[step * np.arange(-(-(m // 2 + 1) // step))[:, None] * at[:, None, :] % m]
    # a real transform counts every column twice but those that are their own mirror images
    once = np.full((len(slots), 1, 1), 0.5 * m, roots.real.dtype)
    once[of_column[2 * np.arange(n // 2 + 1) % n == 0]] = m
    fine = once * roots[np.arange(step) * at[:, :, None] % m]
    real, both = once.dtype, np.stack([fine, 1j * fine], axis=2)
    return slots, coarse.view(real), both.view(real), of_column, known


def _by_columns(
    values: Array, waves: tuple[Host, ...], shape: tuple[int, int], onto: Array | None
) -> Array:
    """Sum each column's waves, and transform rows: half of them, since ΔW is even."""
    slots, coarse, fine, of_column, known = waves
    (columns, depth), half, xp = slots.shape, shape[0] // 2 + 1, namespace(values)

    def given() -> Array:
        every = xp.concat([values, xp.zeros_like(values[:1])])
        return xp.take(every, from_numpy_like(slots.reshape(-1), values))

    whole: Array
    if in_memory(values, values if onto is None else onto):
        try:
            right = from_numpy_like(fine, values) * xp.reshape(given(), (columns, depth, 1, 1))
            right = xp.reshape(right, (columns, 2 * depth, -1))
            sums = xp.reshape(from_numpy_like(coarse, values) @ right, (columns, -1, 2))[:-1, ...]
            whole = even_rows(sums, from_numpy_like(known, values), shape, onto)
        except RuntimeError:  # torch's, under a transformation
            pass
        else:
            return whole
    kind = np.result_type(coarse, np.complex64)
    left, right = (from_numpy_like(a.view(kind), values) for a in (coarse, fine[:, :, 0]))
    taken = xp.reshape(xp.astype(given(), _complex(xp, values)), (columns, depth, 1))
    sums = xp.reshape(left @ (taken * right), (columns, left.shape[1] * right.shape[2]))
    sums = xp.take(sums, from_numpy_like(of_column, values), axis=0)[:, :half]
    rows = packed(xp.matrix_transpose(sums))
    whole = mirrored(xp.fft.irfft(rows, n=shape[1], axis=1), shape[0])
    return whole if onto is None else onto + whole


def mirrored(top: Array, rows: int) -> Array:
    """Complete an even matrix, whose entry (−i, −j) is that at (i, j), by its last rows.

    Parameters
    ----------
    top : array (rows // 2 + 1, n)
    rows : int

    Examples
    --------
    >>> mirrored(np.asarray([[0, 1, 2], [3, 4, 5]]), 3).tolist()
    [[0, 1, 2], [3, 4, 5], [3, 5, 4]]
    """
    xp, half = namespace(top), top.shape[0]
    part = top[1 : rows - half + 1, :]
    first, rest = xp.flip(part[:, :1], axis=(0,)), xp.flip(part[:, 1:], axis=(0, 1))
    return xp.concat([top, xp.concat([first, rest], axis=1)], axis=0)


def _by_waves(values: Array, u: Host, v: Host, shape: tuple[int, int]) -> Array:
    def waves(size: int, places: Host) -> tuple[Array, Array]:
        turns = np.outer(np.arange(size), places) % size * (2.0 * np.pi / size)
        name = dtype_name(values)
        cos, sin = (from_numpy_like(astype(f(turns), name), values) for f in (np.cos, np.sin))
        return cos, sin

    xp, (m, n) = namespace(values), shape
    (cos_m, sin_m), (cos_n, sin_n) = waves(m, u), waves(n, v)
    real: Array = (cos_m * values) @ xp.matrix_transpose(cos_n)
    real = real - (sin_m * values) @ xp.matrix_transpose(sin_n)
    return real / (m * n)
