"""Products and sums in the way in which each library does them best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from operator import iadd, imul
from typing import Any

import numpy as np

from peft_any._arrays import namespace
from peft_any._engines import is_differentiated
from peft_any._libraries import LIBRARIES, find_library, library_of
from peft_any._memory import room, spread

_dense_of: dict[type, Callable[..., Any]] = {}
"""A library's own way, by the type of its arrays."""
_BLOCK = 1 << 18
"""Bytes of a block of rows: product and sum of one fit a processor's own cache together."""
_THIN = 16
"""Up to so large a rank a product costs less than the passes over what it gives."""
_FEW = 64
"""Up to so many vectors are multiplied the quicker as columns, which BLAS need not turn."""
_SIDE, _TORCH_SIDE = 256, 1024
"""Where both sides of the matrix have so many numbers, on NumPy and on torch."""


def dense(x: Any, w: Any, b: Any = None, plus: Any = None) -> Any:
    """Compute x·wᵀ + b + plus for x (…, n), w (m, n), b (m,) and plus (…, m), or without these.

    NumPy and CuPy multiply a stack of matrices one by one, though all meet the same one. Where a
    library can be written to, sums are made in the product's memory.

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
            torch = LIBRARIES["torch"].module
            own = _torch_dense(torch) if type(x) is torch.Tensor else torch.nn.functional.linear
        if name:
            _dense_of[type(x)] = own
    y = own(x, w, b)
    if plus is None:
        return y
    if type(y) is np.ndarray is type(plus) and y.shape == plus.shape and y.dtype == plus.dtype:
        return np.add(plus, y, out=y)  # as `summed` does, which has to ask whose memory it is
    return summed(plus, y, ())


def _plain(x: Any, w: Any, b: Any) -> Any:
    return x @ w.T if b is None else x @ w.T + b


def _folded(x: Any, w: Any, b: Any) -> Any:
    rows = x if x.ndim < 3 else x.reshape((prod(x.shape[:-1]), x.shape[-1]))
    few = rows.ndim == 2 and 1 < rows.shape[0] <= _FEW and min(w.shape) >= _SIDE
    if few and type(x) is type(w) is np.ndarray and w.flags.c_contiguous and x.dtype == w.dtype:
        y = np.ascontiguousarray((w @ np.ascontiguousarray(rows.T)).T)
    else:
        y = rows @ w.T
    if b is not None:
        written = type(y) is type(b) and y.dtype == b.dtype  # a sum would be another array
        y = spread(iadd, y, b) if written else y + b
    return y if rows is x else y.reshape((*x.shape[:-1], w.shape[0]))


def _torch_dense(torch: Any) -> Callable[..., Any]:
    linear, compiled = torch.nn.functional.linear, torch.compiler.is_compiling

    def own(x: Any, w: Any, b: Any) -> Any:
        if not few_columns(x, w) or compiled():
            return linear(x, w, b)
        if is_differentiated(x) or is_differentiated(w):
            return linear(x, w, b)
        y = turned(x, w).contiguous().reshape((*x.shape[:-1], w.shape[0]))
        return y if b is None else y + b

    return own


def few_columns(x: Any, w: Any, least: int = _TORCH_SIDE) -> bool:
    """Whether torch multiplies w by so few vectors the quicker where they stand as columns."""
    rows, width = w.shape
    if rows < least or width < least:
        return False
    # fewer make the copies cost more than they save
    few = _FEW // 4 * width <= x.numel() <= _FEW * width
    return bool(few and x.dtype.itemsize > 2 and x.device.type == "cpu" and w.is_contiguous())


def turned(x: Any, w: Any) -> Any:
    """Give torch's x·wᵀ, whose memory has the vectors as columns."""
    return (w @ x.reshape((-1, w.shape[1])).T.contiguous()).T


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
        out = room((u.shape[0], v.shape[1]), x, u, v) if x.ndim == 2 else None
        if out is not None and x.dtype.itemsize > 2:  # half precision would be rounded twice
            try:
                torch.mm(u, v, out=out)
                return (torch.sub if minus else torch.add)(x, out, out=out)
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


def scaled(y: Any, gain: Any, shift: Any = None) -> Any:
    """Give y·gain + shift for y (…, n), gain (n,) and shift (n,), or none.

    Nobody else has `y`, whose memory NumPy writes to.

    Examples
    --------
    >>> scaled(np.ones((1, 2)), np.asarray([1.0, 2.0]), np.asarray([0.0, 1.0]))
    array([[1., 3.]])
    """
    rows = [a for a in (gain, shift) if a is not None]
    if type(y) is np.ndarray and all(type(a) is np.ndarray and a.dtype == y.dtype for a in rows):
        y = spread(imul, y, gain)
        return y if shift is None else spread(iadd, y, shift)
    if shift is not None and getattr(find_library(y), "name", "") == "torch":
        return LIBRARIES["torch"].module.addcmul(shift, y, gain)
    return y * gain if shift is None else y * gain + shift


def _empty(shape: tuple[int, ...], like: Any) -> Any:
    """Make memory for a result, in huge pages where there is room in some."""
    out = room(shape, like)
    return namespace(like).empty(shape, dtype=like.dtype) if out is None else out


def by_blocks(x: Any, r: Any) -> Any:
    """Multiply by a block-diagonal matrix, laid out by rows: groups of rows, each written once.

    Parameters
    ----------
    x : array (m, k·b)
    r : array (k, b, b)
        As `in_memory` takes them.

    Examples
    --------
    >>> by_blocks(np.ones((1, 2)), np.asarray([[[2.0]], [[3.0]]]))
    array([[2., 3.]])
    """
    (m, n), (k, b, _) = x.shape, r.shape
    if library_of(x).name == "numpy":  # OpenBLAS takes twice as long for small transposed blocks
        product, r = np.matmul, np.ascontiguousarray(r)
    else:
        product = LIBRARIES["torch"].module.bmm
    rows = max(16 * _BLOCK // (n * x.dtype.itemsize), 8)
    out = _empty((m, n), x)
    for i in range(0, m, rows):
        given, made = (a[i : i + rows].reshape((-1, k, b)).swapaxes(0, 1) for a in (x, out))
        product(given, r, out=made)
    return out


def even_rows(columns: Any, places: Any, shape: tuple[int, int], onto: Any = None) -> Any:
    """Transform an even matrix's rows back, entry (−i, −j) being that at (i, j), block by block.

    What a block forms on its way stays in the processor's cache; only what is given is written.

    Parameters
    ----------
    columns : array (k, m // 2 + 1 or more, 2)
        Real and imaginary parts of columns of the half spectrum, the others being zero: of NumPy,
        or of torch on the processor, where no derivative is asked for.
    places : array (k,) of int
        Which columns.
    shape : (int, int)
        (m, n).
    onto : array (m, n), optional
        What the matrix is added to.

    Returns
    -------
    array (m, n)

    Examples
    --------
    >>> even_rows(np.asarray([[[0.0, 0.0], [3.0, 0.0]]]), np.asarray([1]), (2, 3)).round(3)
    array([[ 0.,  0.,  0.],
           [ 2., -1., -1.]])
    """
    xp, (m, n), dtype = namespace(columns), shape, columns.dtype
    inverse: Callable[..., Any]
    if library_of(columns).name == "numpy":
        waves = columns.view(np.result_type(dtype, np.complex64))[..., 0]
        inverse = partial(np.fft.irfft, n=n, axis=1)
    else:
        torch = LIBRARIES["torch"].module
        waves, inverse = torch.view_as_complex(columns), partial(torch.fft.irfft, n=n, dim=1)
    half, rows = m // 2 + 1, max(8 * _BLOCK // (n * dtype.itemsize), 8)
    spectrum = xp.zeros((min(rows, half), n // 2 + 1), dtype=waves.dtype)
    out = _empty((m * n,), columns)
    known = None if onto is None else onto.reshape((m * n,))

    def write(here: slice, new: Any) -> None:
        if known is None:
            out[here] = new
        else:
            xp.add(known[here], new, out=out[here])

    for i in range(0, half, rows):
        part = spectrum[: half - i]
        part[:, places] = waves[:, i : min(i + rows, half)].T
        top = inverse(part)
        write(slice(i * n, min(i + rows, half) * n), top.reshape(-1))
        first, last = max(i, 1), min(i + rows, m - half + 1)
        if first < last:
            top, start, stop = top[first - i : last - i], (m - last + 1) * n, (m - first + 1) * n
            write(slice(start + 1, stop), xp.flip(top, axis=(0, 1)).reshape(-1)[:-1])
            write(slice(start, stop, n), xp.flip(top[:, 0], axis=0))  # which came a row too low
    return out.reshape(shape)


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
            if isinstance(x, np.ndarray) and not any(np.may_share_memory(fresh, k) for k in arrays):
                return (np.subtract if minus else np.add)(x, fresh, out=fresh)
        elif name == "torch" and not (x.requires_grad or fresh.requires_grad):
            torch = LIBRARIES["torch"].module
            tensors = [k for k in (x, *kept) if isinstance(k, torch.Tensor)]
            # a graph that is compiled finds such memory itself
            if not torch.compiler.is_compiling() and _address(fresh) not in map(_address, tensors):
                try:
                    return (torch.sub if minus else torch.add)(x, fresh, out=fresh)
                except RuntimeError:  # under a transformation, or of a spread tensor
                    pass
    return x - fresh if minus else x + fresh


def _address(x: Any) -> Any:
    """Give where a tensor's numbers are, None where none are."""
    return x.untyped_storage().data_ptr() if x.layout is LIBRARIES["torch"].module.strided else None
