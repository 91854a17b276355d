"""Products with the stand-in of an adapted weight, by the adapted layer's own forward.

A stand-in `w` is a matrix with `w.source` (what applies the layer) and `w.flipped`: whether it is
the layer's matrix (n_out, n_in) or that matrix transposed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from peft_any.backend import dtype_name, is_array, is_floating, namespace
from peft_any.errors import BackendError, ConfigError

Route: TypeAlias = Callable[..., Any]


def is_view(x: Any) -> bool:
    """Tell whether `x` stands for an adapted weight."""
    return hasattr(type(x), "_stands_for_weight")


def plain(x: Any) -> Any:
    """Put merged arrays in the place of stand-ins, in a nest of lists, tuples and dicts."""
    if is_view(x):
        return x.merged
    if type(x) in (list, tuple):
        return type(x)(plain(i) for i in x)
    return {k: plain(v) for k, v in x.items()} if type(x) is dict else x


def _fits(x: Any, w: Any, size: Any) -> bool:
    """Tell whether the layer takes `x`: floating, of `size` inputs, of a library that meets it."""
    if w.ndim != 2 or not is_array(x) or not is_floating(x):
        return False
    try:
        namespace(x, *w.source.arrays)
    except BackendError:
        return False
    return bool(size == w.source.site.n_in)


def _swap(x: Any) -> Any:
    return namespace(x).matrix_transpose(x)


def matmul(a: Any, b: Any, /, **rest: Any) -> Any:
    """Multiply as ``a @ b``."""
    if rest:
        return NotImplemented
    if is_view(a) and is_view(b):
        b = b.merged
    if is_view(b):
        if b.flipped and getattr(a, "ndim", None) and _fits(a, b, a.shape[-1]):
            return b.source.layer(a)
        return operator.matmul(a, b.merged)
    if not a.flipped and getattr(b, "ndim", None) and _fits(b, a, b.shape[max(b.ndim - 2, 0)]):
        return a.source.layer(b) if b.ndim == 1 else _swap(a.source.layer(_swap(b)))
    return operator.matmul(a.merged, b)


def _reflected(a: Any, b: Any, /) -> Any:
    return matmul(b, a)


def tensordot(a: Any, b: Any, /, axes: Any = 2, **rest: Any) -> Any:
    """Contract one axis of an array with the layer's inputs; anything else is not done here."""
    axes = rest.pop("dims", axes)
    if is_view(a) and is_view(b):
        b = b.merged
    w, x = (a, b) if is_view(a) else (b, a)
    if rest or not getattr(x, "ndim", 0):
        return NotImplemented
    if axes == 1:
        first, second = a.ndim - 1, 0
    elif isinstance(axes, list | tuple) and len(axes) == 2:
        pair = [i[0] if isinstance(i, list | tuple) and len(i) == 1 else i for i in axes]
        if not all(isinstance(i, int) for i in pair):
            return NotImplemented
        first, second = pair
    else:
        return NotImplemented
    of_w, of_x = (first, second) if w is a else (second, first)
    if not (-x.ndim <= of_x < x.ndim and -2 <= of_w < 2):
        return NotImplemented
    if of_w % 2 == int(w.flipped) or not _fits(x, w, x.shape[of_x]):
        return NotImplemented
    xp, of_x = namespace(x), of_x % x.ndim
    y = w.source.layer(xp.permute_dims(x, (*(i for i in range(x.ndim) if i != of_x), of_x)))
    return y if w is b else namespace(y).permute_dims(y, (y.ndim - 1, *range(y.ndim - 1)))


def contracted(w: Any, x: Any, axis: int, own: int) -> Any:
    """Contract an axis of `x` with one of the stand-in; the layer's outputs last, None if not."""
    y = tensordot(x, w, axes=(axis, own))
    return None if y is NotImplemented else y


def dot(a: Any, b: Any, /, **rest: Any) -> Any:
    """Multiply as NumPy's ``dot``: the last axis of `a` by the last but one of `b`."""
    if rest or not (getattr(a, "ndim", 0) and getattr(b, "ndim", 0)):
        return NotImplemented
    return tensordot(a, b, axes=(a.ndim - 1, max(b.ndim - 2, 0)))


def inner(a: Any, b: Any, /) -> Any:
    """Multiply the last axes."""
    return tensordot(a, b, axes=(-1, -1))


def vecdot(a: Any, b: Any, /, *, axis: int = -1, dim: int = -1) -> Any:
    """Multiply rows of an array, one by one, by all of the layer's: ``x[..., None, :]`` by `w`."""
    w, x = (a, b) if is_view(a) else (b, a)
    if (axis, dim) != (-1, -1) or is_view(x) or getattr(x, "ndim", 0) < 2 or x.shape[-2] != 1:
        return NotImplemented
    return linear(x[..., 0, :], w)


def matvec(w: Any, x: Any, /) -> Any:
    """Multiply vectors as NumPy's ``matvec``: the layer's matrix by the last axis of `x`."""
    return linear(x, w) if is_view(w) else NotImplemented


def vecmat(x: Any, w: Any, /) -> Any:
    """Multiply vectors as NumPy's ``vecmat``."""
    return linear(x, w.T) if is_view(w) and w.ndim == 2 else NotImplemented


def linear(x: Any, w: Any, bias: Any = None) -> Any:
    """Apply as torch's ``linear``: ``x @ wᵀ + bias``."""
    if not is_view(w) or is_view(x) or w.flipped or not x.ndim or not _fits(x, w, x.shape[-1]):
        return NotImplemented
    y = w.source.layer(x)
    return y if bias is None else y + plain(bias)


def rows(w: Any, idx: Any, axis: int | None = 0) -> Any:
    """Take rows of an embedding's table."""
    site = w.source.site
    if site.kind != "Embedding" or not w.flipped or axis not in (0, -2):
        return NotImplemented
    if not is_array(idx) or not dtype_name(idx).startswith(("int", "uint")):
        return NotImplemented
    try:
        xp = namespace(idx, *w.source.arrays)
    except BackendError:
        return NotImplemented
    if dtype_name(idx).startswith("int"):
        idx = xp.where(idx < 0, idx + site.n_in, idx)
    return w.source.layer(idx)


def take(w: Any, idx: Any, /, axis: int | None = None, **rest: Any) -> Any:
    """Take along an axis."""
    return NotImplemented if rest or not is_view(w) else rows(w, idx, axis)


def embedding(idx: Any, w: Any, *args: Any, **rest: Any) -> Any:
    """Look up as torch's ``embedding``."""
    padding = args[0] if args else rest.get("padding_idx")
    others = [*args[1:3], rest.get("max_norm")]
    if any(o is not None for o in others[:1] + others[-1:]):
        raise ConfigError(
            f"{w.source.site.weight}: max_norm cannot be used: it writes into the weight, which "
            "is adapted; take model.merge() and look up there"
        )
    return NotImplemented if padding is not None or is_view(idx) else rows(w, idx)


def transpose(w: Any, *axes: Any, **rest: Any) -> Any:
    """Turn a matrix around, by whichever order of axes says so."""
    given = [*axes, *rest.values()]
    if w.ndim != 2 or is_view(given):
        return NotImplemented
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = [*given[0]]
    if not all(isinstance(i, int) for i in given):
        return w.T if given == [None] else NotImplemented
    order = [i % 2 for i in given]
    return w if order == [0, 1] else w.T if order in ([], [1, 0]) else NotImplemented


def exchange(w: Any, *axes: Any, **rest: Any) -> Any:
    """Exchange two axes of a matrix."""
    given = [*axes, *rest.values()]
    two = w.ndim == 2 and all(isinstance(i, int) for i in given)
    return w.T if two and sorted(i % 2 for i in given) in ([], [0, 1]) else NotImplemented


OF_VIEWS: Mapping[str, Route] = {
    "matmul": matmul, "__matmul__": matmul, "__rmatmul__": _reflected, "mm": matmul, "mv": matmul,
    "dot": dot, "tensordot": tensordot, "inner": inner, "linear": linear, "vecdot": vecdot,
    "linalg_vecdot": vecdot, "matvec": matvec, "vecmat": vecmat,
}  # fmt: skip
_OPERANDS = ("input", "a", "x1", "weight", "other", "mat2", "vec", "b", "x2")
"""Their operands by the names that libraries give them, the first ones first."""
_OF_ONE: Mapping[str, Route] = {
    "take": take, "permute": transpose, "permute_dims": transpose, "t": exchange,
    "matrix_transpose": exchange, "swapaxes": exchange, "swapdims": exchange,
    "ndim": lambda w: w.ndim, "shape": lambda w: w.shape, "size": lambda w: w.size,
}  # fmt: skip


def call(
    func: Callable[..., Any], args: Any, kwargs: Any, *, name: str = "", torch_like: bool = False
) -> Any:
    """Call a library's function on arguments of which some stand for adapted weights."""
    name = name or getattr(func, "__name__", "")
    kwargs = {k: v for k, v in (kwargs or {}).items() if k != "out" or v is not None}
    if name in OF_VIEWS or name == "embedding":
        args = *args, *(kwargs.pop(k) for k in _OPERANDS if k in kwargs)
    if name == "embedding" and len(args) > 1 and is_view(args[1]):
        route: Route | None = embedding
    elif name == "transpose" and args and is_view(args[0]):
        route = exchange if torch_like else transpose
    elif name in OF_VIEWS and len(args) > 1 and (is_view(args[0]) or is_view(args[1])):
        route = OF_VIEWS[name]
    else:
        route = _OF_ONE.get(name) if args and is_view(args[0]) else None
    if route is not None:
        try:
            found = route(*args, **kwargs)
        except TypeError:  # arguments that only the library's own function has
            found = NotImplemented
        if found is not NotImplemented:
            return found
    outs = kwargs.get("out")
    if any(map(is_view, outs if isinstance(outs, tuple) else (outs,))) or (
        args
        and is_view(args[0])
        and (name in _WRITERS or (name.endswith("_") and not name.endswith("__")))
    ):
        w = args[0] if args and is_view(args[0]) else outs
        raise refusal(w if is_view(w) else None, name)
    return func(*plain(tuple(args)), **plain(dict(kwargs)))


_WRITERS = frozenset(
    {"copyto", "put", "place", "putmask", "fill_diagonal", "put_along_axis", "__setitem__"}
)


def refusal(w: Any, how: str) -> ConfigError:
    """Say that a stand-in cannot be written to, and what to do."""
    name = "weights" if w is None else w.source.site.weight
    return ConfigError(
        f"{name}: the weight of an adapted layer cannot be written to ({how}): make a new array of "
        "it (W + d), change the base before model.bind(), or edit the arrays of model.merge()"
    )
