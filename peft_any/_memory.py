"""Where results are written: in huge pages, in memory that is there, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

from peft_any._engines import in_memory
from peft_any._libraries import LIBRARIES, find_library

_PIECE = 1 << 15
"""Entries of a piece, some arrays of which fit a processor's own cache together."""
_HUGE = 1 << 22
"""From so many bytes on, NumPy asks the system for huge pages."""
_LINE = 64
"""Bytes that torch's own memory on the processor is aligned to."""


def room(shape: tuple[int, ...], *like: Any) -> Any:
    """Make memory in huge pages for a large result of torch on the processor, without values.

    torch takes its own by pages of 4 KiB, and to be given them one by one takes longer than to
    write to them; NumPy asks for huge ones.

    Parameters
    ----------
    shape : tuple of int
    *like : array
        What the result is computed from.

    Returns
    -------
    array, or None
        None where the result is small, or the library has to say itself where it is.

    Examples
    --------
    >>> room((1024, 1024), np.ones(1)) is None
    True
    """
    if getattr(find_library(like[0]), "name", "") != "torch" or not in_memory(*like):
        return None
    torch, size = LIBRARIES["torch"].module, prod(shape) * like[0].dtype.itemsize
    if size < _HUGE or torch.compiler.is_compiling():
        return None
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % _LINE
    return torch.from_numpy(memory[start : start + size]).view(like[0].dtype).reshape(shape)


def spread(f: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Give f(a, b), an operator's function, where b is spread over rows or columns of a.

    NumPy, whose buffers hold more than most rows do, would first write b out as often.

    Examples
    --------
    >>> from operator import mul
    >>> spread(mul, np.ones((2, 2)), np.asarray([[1.0], [3.0]])).tolist()
    [[1.0, 1.0], [3.0, 3.0]]
    """
    if not (type(a) is np.ndarray is type(b) and a.dtype == b.dtype and a.size > _PIECE):
        return f(a, b)
    size = np.setbufsize(16)  # of this thread
    try:
        return f(a, b)
    finally:
        np.setbufsize(size)


def by_pieces(f: Callable[..., tuple[Any, ...]], *arrays: Any, like: Iterable[int]) -> Any:
    """Apply a function of entries, and of where to put its results, to arrays of one shape.

    On NumPy piece by piece: what the function forms on its way stays in the processor's cache.

    Parameters
    ----------
    f : callable
        ``f(*arrays, out)`` gives a tuple of arrays, each of them in the array at its place in
        `out` (see `into`), where there is one and the function can.
    arrays : array
    like : iterable of int
        Which of the arrays each result has the dtype of.

    Examples
    --------
    >>> def f(a, b, out):
    ...     return into(out[0], np.add, a, b), a - b
    >>> by_pieces(f, np.ones(2), np.ones(2), like=(0, 0))
    (array([2., 2.]), array([0., 0.]))
    """
    shape, like = arrays[0].shape, (*like,)
    if not all(
        type(a) is np.ndarray and a.flags.c_contiguous and a.shape == shape and a.size > 2 * _PIECE
        for a in arrays
    ):
        return f(*arrays, (None,) * len(like))
    found = tuple(np.empty(shape, arrays[i].dtype) for i in like)
    flat, wholes = ([a.reshape(-1) for a in some] for some in (arrays, found))
    for i in range(0, flat[0].size, _PIECE):
        out = [a[i : i + _PIECE] for a in wholes]
        for place, part in zip(out, f(*(a[i : i + _PIECE] for a in flat), out), strict=True):
            if part is not place:
                place[...] = part
    return found


def into(out: Any, f: Callable[..., Any], a: Any, b: Any) -> Any:
    """Give f(a, b): in an array that is there for it, where that has its dtype."""
    fits = out is not None and a.dtype == b.dtype == out.dtype
    return f(a, b, out=out) if fits else f(a, b)
