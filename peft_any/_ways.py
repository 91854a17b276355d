"""The shortest ways of NumPy and torch to what is called often, for constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from peft_any._engines import is_trained
from peft_any._kernels import dense, few_columns, turned
from peft_any._libraries import LIBRARIES, library_of


class Ways(NamedTuple):
    """The shortest ways of a library to what calls do that are made often, for constants."""

    take: Callable[[Any, Any], Any]
    """Rows of an array by their numbers, as `taken`."""
    times: Callable[[Any, Any], Any]
    """The products of two stacks of matrices (k, m, n) and (k, n, l)."""
    onto: Callable[[Any, Any, Any], Callable[[Any, Any], Any]]
    """For x, w and b what gives y + `dense` of these, from a y made of x, and that x or its like.

    The memory of y is written to where that may be: torch's BLAS adds without another pass.
    """


_ways_of: dict[type, Ways] = {}


def ways(*arrays: Any) -> Ways | None:
    """Give the shortest ways where all arrays are NumPy's, or all torch's, and none is trained.

    Examples
    --------
    >>> found = ways(np.ones(2))
    >>> found.take(np.asarray([1, 2]), np.asarray([1]))
    array([2])
    """
    kind, *others = {*map(type, arrays)}
    if others or any(map(is_trained, arrays)):
        return None
    if kind is np.ndarray:
        return _NUMPY
    if library_of(arrays[0]).name != "torch":
        return None
    torch = LIBRARIES["torch"].module
    if kind is not torch.Tensor or torch.compiler.is_compiling():
        return None
    if kind not in _ways_of:
        _ways_of[kind] = _torch_ways(torch)
    return _ways_of[kind]


_NUMPY = Ways(
    lambda x, i: x.take(i, 0),
    np.matmul,
    lambda _, w, b: lambda y, x: dense(x, w, b, y),
)


def _torch_ways(torch: Any) -> Ways:

    def added(y: Any, x: Any) -> Any:
        try:
            return y.add_(x)
        except RuntimeError:  # under a transformation
            return y + x

    def onto(x: Any, w: Any, b: Any) -> Callable[[Any, Any], Any]:
        few, turn, rows, width = few_columns(x, w), w.T, (-1, w.shape[0]), (-1, w.shape[1])

        def call(y: Any, x: Any) -> Any:
            try:
                flat = y.view(rows)
                if few:
                    flat.add_(turned(x, w))
                else:
                    torch.addmm(flat, x.reshape(width), turn, out=flat)
            except RuntimeError:  # under a transformation, or differentiated
                return y + dense(x, w, b)
            return y if b is None else added(y, b)

        return call

    return Ways(lambda x, i: x.index_select(0, i), torch.bmm, onto)
