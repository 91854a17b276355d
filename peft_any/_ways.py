"""The shortest ways of NumPy and torch to what is called often, for constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from peft_any._engines import is_differentiated, is_trained
from peft_any._kernels import dense, few_columns, turned
from peft_any._libraries import LIBRARIES, library_of

_SIDE = 768
"""From such a side on, torch adds a product of few vectors to another array the quicker."""


class Ways(NamedTuple):
    """The shortest ways of a library to what calls do that are made often, for constants."""

    take: Callable[[Any, Any], Any]
    """Rows of an array by their numbers, as `taken`."""
    times: Callable[[Any, Any], Any]
    """The products of two stacks of matrices (k, m, n) and (k, n, l)."""
    onto: Callable[[Any, Any, Any, Any], Any]
    """y + `dense` of x, w and b, in the memory of either where that may be."""
    onto_first: Callable[[Any, Any], bool]
    """Whether x and w should be multiplied by `onto`, rather than something be added to that."""


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
    lambda y, x, w, b: dense(x, w, b, y),
    lambda x, w: False,  # noqa: ARG005
)


def _torch_ways(torch: Any) -> Ways:

    def first(x: Any, w: Any) -> bool:
        return few_columns(x, w, _SIDE) and not is_differentiated(x)

    def added(y: Any, x: Any) -> Any:
        try:
            return y.add_(x)
        except RuntimeError:  # under a transformation
            return y + x

    def onto(y: Any, x: Any, w: Any, b: Any) -> Any:
        if not first(x, w):
            return added(y, dense(x, w, b))
        y = added(y.reshape((-1, w.shape[0])), turned(x, w)).reshape(y.shape)
        return y if b is None else added(y, b)

    return Ways(lambda x, i: x.index_select(0, i), torch.bmm, onto, first)
