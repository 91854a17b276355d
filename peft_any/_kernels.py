"""Products and sums in the way in which each library does them best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

from peft_any._arrays import namespace
from peft_any._engines import is_differentiated
from peft_any._libraries import LIBRARIES, find_library, library_of

_dense_of: dict[type, Callable[..., Any]] = {}
"""A library's own way, by the type of its arrays."""
_BLOCK = 1 << 18
"""Bytes of a block of rows: product and sum of one fit a processor's own cache together."""
_PIECE = 1 << 14
"""Entries of a piece, some arrays of which fit there together."""
_THIN = 16
"""Up to so large a rank a product costs less than the passes over what it gives."""


def dense(x: Any, w: Any, b: Any = None) -> Any:
    """Compute x·wᵀ + b for x (…, n), w (m, n) and b (m,), or none.

    NumPy and CuPy multiply a stack of matrices one by one, though all meet the same one.

    Examples
    --------
    >>> dense(np.ones((1, 1, 2)), np.asarray([[1.0, 2.0]]), np.asarray([0.5]))
    array([[[3.5]]])
    """
    own = _dense_of.get(type(x))
    if own is None:
        name = library_of(x).name
        own = _folded if name in ("numpy", "cupy") else _plain
        if name == "torch":
            own = LIBRARIES["torch"].module.nn.functional.linear
        if name:
            _dense_of[type(x)] = own
    return own(x, w, b)


def _plain(x: Any, w: Any, b: Any) -> Any:
    # one expression: NumPy adds into the product
    return x @ w.T if b is None else x @ w.T + b


def _folded(x: Any, w: Any, b: Any) -> Any:
    if x.ndim < 3:
        return _plain(x, w, b)
    y = _plain(x.reshape((prod(x.shape[:-1]), x.shape[-1])), w, b)
    return y.reshape((*x.shape[:-1], w.shape[0]))


def taken(x: Any, places: Any) -> Any:
    """Take rows of an array by an array of their numbers, all from 0.

    Examples
    --------
    >>> taken(np.asarray([[1], [2]]), np.asarray([1, 1])).tolist()
    [[2], [2]]
    """
    if library_of(x).name == "torch":  # without asking which are negative
        return x.index_select(0, places)
    return namespace(x).take(x, places, axis=0)


def plus_product(x: Any, u: Any, v: Any, *, minus: bool = False, owned: bool = False) -> Any:
    """Give x + u·v, or x − u·v, in a new array, in fewer passes than product and sum.

    Parameters
    ----------
    x : array (m, n), or a stack (…, m, n)
    u : array (m, k)
    v : array (k, n)
        All of one library and dtype; stacks where `x` is one.
    minus : bool
    owned : bool
        Whether nobody else has `x`, so that its memory may be written to.

    Examples
    --------
    >>> plus_product(np.ones((1, 2)), np.asarray([[2.0]]), np.asarray([[1.0, 3.0]]), minus=True)
    array([[-1., -5.]])
    """
    name = getattr(find_library(u), "name", "")
    if name == "torch" and x.ndim < 4:
        torch = LIBRARIES["torch"].module
        way, sign = "addmm" if x.ndim == 2 else "baddbmm", -1 if minus else 1
        if owned and not any(map(is_differentiated, (x, u, v))):
            try:
                return getattr(x, f"{way}_")(u, v, alpha=sign)
            except RuntimeError:  # under a transformation
                pass
        return getattr(torch, way)(x, u, v, alpha=sign)
    if x.ndim > 2:
        return summed(x, u @ v, (x, u, v), minus=minus)
    add, (m, n) = np.subtract if minus else np.add, x.shape
    rows = max(_BLOCK // max(n * getattr(x.dtype, "itemsize", 8), 1), 8)
    plain = name == "numpy" and isinstance(x, np.ndarray) and x.flags.c_contiguous
    if not plain or u.shape[1] > _THIN or m <= 2 * rows:
        return summed(x, u @ v, (x, u, v), minus=minus)
    out = np.empty(x.shape, np.result_type(x, u, v))
    for i in range(0, m, rows):
        block = out[i : i + rows]
        np.matmul(u[i : i + rows], v, out=block)
        add(x[i : i + rows], block, out=block)
    return out


def by_pieces(f: Callable[..., tuple[Any, ...]], *arrays: Any) -> tuple[Any, ...]:
    """Apply a function of entries to arrays of one shape.

    On NumPy piece by piece: what the function forms on its way stays in the processor's cache.

    Examples
    --------
    >>> by_pieces(lambda a, b: (a + b, a - b), np.ones(2), np.ones(2))
    (array([2., 2.]), array([0., 0.]))
    """
    shape = arrays[0].shape
    if not all(
        type(a) is np.ndarray and a.flags.c_contiguous and a.shape == shape and a.size > 2 * _PIECE
        for a in arrays
    ):
        return f(*arrays)
    flat = [a.reshape(-1) for a in arrays]
    found: list[Any] = []
    for i in range(0, flat[0].size, _PIECE):
        part = f(*(a[i : i + _PIECE] for a in flat))
        found = found or [np.empty(shape, a.dtype) for a in part]
        for whole, piece in zip(found, part, strict=True):
            whole.reshape(-1)[i : i + _PIECE] = piece
    return tuple(found)


def mirrored(top: Any, rows: int, onto: Any = None) -> Any:
    """Complete an even matrix, whose entry (−i, −j) is that at (i, j), by its last rows.

    Parameters
    ----------
    top : array (rows // 2 + 1, n)
    rows : int
    onto : array (rows, n), optional
        What it is added to.

    Examples
    --------
    >>> mirrored(np.asarray([[0, 1, 2], [3, 4, 5]]), 3).tolist()
    [[0, 1, 2], [3, 4, 5], [3, 5, 4]]
    """
    xp, half, name = namespace(top), top.shape[0], library_of(top).name
    part = top[1 : rows - half + 1, :]
    first, rest = xp.flip(part[:, :1], axis=(0,)), xp.flip(part[:, 1:], axis=(0, 1))
    if name in ("numpy", "torch") and not any(map(is_differentiated, (top, onto))):
        shape, kind = (rows, top.shape[1]), top.dtype if onto is None else xp.result_type(top, onto)
        out = np.empty(shape, kind) if name == "numpy" else top.new_empty(shape, dtype=kind)
        below = slice(half, None)
        parts = (
            ((slice(half), slice(None)), top),
            ((below, slice(1)), first),
            ((below, slice(1, None)), rest),
        )
        try:
            for place, new in parts:
                if onto is None:
                    out[place] = new
                else:
                    xp.add(onto[place], new, out=out[place])
        except RuntimeError:  # under a transformation
            pass
        else:
            return out
    whole = xp.concat([top, xp.concat([first, rest], axis=1)], axis=0)
    return whole if onto is None else onto + whole


def summed(x: Any, fresh: Any, kept: Iterable[Any], *, minus: bool = False) -> Any:
    """Give x + fresh, or x − fresh: in the memory of `fresh`, where the library lets it be written.

    Parameters
    ----------
    x, fresh : array
        Of one library; `fresh` is not asked for again.
    kept : iterable
        Whatever else is kept: what `fresh` shares with an array of these is not written to.
    minus : bool

    Examples
    --------
    >>> summed(np.ones(2), np.asarray([1.0, 2.0]), [], minus=True)
    array([ 0., -1.])
    """
    name = getattr(find_library(fresh), "name", "")
    if fresh.shape == x.shape and fresh.dtype == x.dtype:
        if name == "numpy" and fresh.ndim and fresh.flags.writeable:
            arrays = [k for k in (x, *kept) if isinstance(k, np.ndarray)]
            if not any(np.may_share_memory(fresh, k) for k in arrays):
                return (np.subtract if minus else np.add)(x, fresh, out=fresh)
        elif name == "torch" and not (x.requires_grad or fresh.requires_grad):
            torch = LIBRARIES["torch"].module
            owned = {_memory(k) for k in (x, *kept) if isinstance(k, torch.Tensor)}
            if _memory(fresh) not in owned:
                try:
                    return (torch.sub if minus else torch.add)(x, fresh, out=fresh)
                except RuntimeError:  # under a transformation, or of a spread tensor
                    pass
    return x - fresh if minus else x + fresh


def _memory(x: Any) -> Any:
    """Give where a tensor's numbers are, None where none are."""
    return x.untyped_storage().data_ptr() if x.layout is LIBRARIES["torch"].module.strided else None
