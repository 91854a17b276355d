"""NumPy's own ways to a traced array: its ufuncs, its functions, its arrays' methods.

So that a function written for NumPy runs under recording as it was written. And a way of our own
to what only stands for an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_any.errors import GradientError

_UFUNCS = {
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh",
    "arctan": "atan", "arctan2": "atan2", "arctanh": "atanh", "conjugate": "conj",
    "fabs": "abs", "fmax": "maximum", "fmin": "minimum", "invert": "bitwise_invert",
    "left_shift": "bitwise_left_shift", "power": "pow", "right_shift": "bitwise_right_shift",
    "rint": "round", "true_divide": "divide",
}  # fmt: skip
_REDUCED = {"add": "sum", "multiply": "prod", "maximum": "max", "minimum": "min",
            "logical_and": "all", "logical_or": "any"}  # fmt: skip
_OPERATORS = {"add", "subtract", "multiply", "divide", "matmul", "pow"}


def _short(name: str) -> str:
    return {"subtract": "_sub", "multiply": "_mul", "divide": "_truediv"}.get(name, f"_{name}")


def _ufunc(self: Any, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    xp = self.space
    given = {k: v for k, v in kwargs.items() if v is not None and k != "out"}
    if any(getattr(a, "depth", 0) > self.depth for a in args if hasattr(a, "space")):
        return NotImplemented
    if kwargs.get("out") is not None or method not in ("__call__", "reduce") or "where" in given:
        raise GradientError(
            f"np.{ufunc.__name__}: cannot be recorded with {method}, out= or where=: make a new "
            "array"
        )
    name = _UFUNCS.get(ufunc.__name__, ufunc.__name__)
    if method == "reduce":
        axis = given.pop("axis", 0)
        given.pop("initial", None)
        return getattr(xp, _REDUCED.get(name, name))(*args, axis=axis, **given)
    if name in _OPERATORS and not given:  # scalars and promotion as NumPy's operators have it
        return getattr(xp, _short(name))(*args)
    return getattr(xp, name)(*args, **given)


def _function(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    xp, name = self.space, func.__name__
    if "linalg" in func.__module__:
        known = getattr(NORMS if name == "norm" else xp.linalg, name, None)
        return (known or _missing(name))(*args, **kwargs)
    if "fft" in func.__module__:
        return getattr(xp.fft, name)(*args[:1], **dict(zip(("n", "axis"), args[1:], strict=False)),
                                     **kwargs)  # fmt: skip
    if name in FUNCTIONS:
        return FUNCTIONS[name](xp, *args, **kwargs)
    if name in _ALIKE:
        return getattr(xp, _ALIKE[name])(*args, **kwargs)
    if name in _FOLDS:
        first, *rest = args
        axis = {"axis": rest[0]} if rest else {}
        return getattr(xp, _FOLDS[name])(first, **axis, **_given(kwargs))
    return _missing(name)()


def _missing(name: str) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise GradientError(
            f"np.{name}: cannot be recorded: use a function of xp = "
            "peft_any.backend.namespace(x), or take peft_any.detach of its operands"
        )

    return fail


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop NumPy's marks for what was not given; ddof is the standard's correction."""
    found = {k: v for k, v in kwargs.items() if v is not None and "NoValue" not in repr(type(v))}
    if "ddof" in found:
        found["correction"] = float(found.pop("ddof"))
    return found


class NORMS:
    """``np.linalg.norm`` in the standard's two functions."""

    @staticmethod
    def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:  # noqa: A002
        """Norm of a vector or of matrices."""
        xp = x.space.linalg
        matrix = isinstance(axis, tuple) or (axis is None and x.ndim == 2 and ord is not None)
        if matrix and ord not in (None, 2):
            return xp.matrix_norm(x, ord=ord, keepdims=keepdims)
        return xp.vector_norm(x, axis=axis, keepdims=keepdims, ord=2 if ord is None else ord)


def _dot(xp: Any, a: Any, b: Any) -> Any:
    if getattr(a, "ndim", 0) == 0 or getattr(b, "ndim", 0) == 0:
        return a * b
    if b.ndim <= 2:
        return xp.matmul(a, b)
    return xp.tensordot(a, b, axes=((a.ndim - 1,), (b.ndim - 2,)))


def _transpose(xp: Any, a: Any, axes: Any = None) -> Any:
    return xp.permute_dims(a, tuple(range(a.ndim))[::-1] if axes is None else tuple(axes))


def _joined(how: str) -> Callable[..., Any]:
    def join(xp: Any, arrays: Any, axis: Any = 0) -> Any:
        return getattr(xp, how)([xp.lift(a) for a in arrays], axis=axis)

    return join


def _swapped(xp: Any, a: Any, i: int, j: int) -> Any:
    order = list(range(a.ndim))
    order[i], order[j] = order[j], order[i]
    return xp.permute_dims(a, tuple(order))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dot": _dot,
    "transpose": _transpose,
    "swapaxes": _swapped,
    "concatenate": _joined("concat"),
    "concat": _joined("concat"),
    "stack": _joined("stack"),
    "hstack": lambda xp, a: _joined("concat")(xp, a, axis=0 if a[0].ndim == 1 else 1),
    "ravel": lambda xp, a: xp.reshape(a, (a.size,)),
    "outer": lambda xp, a, b: xp.linalg.outer(a, b),
    "trace": lambda xp, a: xp.linalg.trace(a),
    "cumsum": lambda xp, a, axis=None: xp.cumulative_sum(
        xp.reshape(a, (a.size,)) if axis is None else a, axis=axis or 0
    ),
    "where": lambda xp, c, a, b: xp.where(c, a, b),
    "flip": lambda xp, a, axis=None: xp.flip(a, axis=axis),
    "roll": lambda xp, a, shift, axis=None: xp.roll(a, shift, axis=axis),
    "take": lambda xp, a, i, axis=None: xp.take(
        xp.reshape(a, (a.size,)) if axis is None else a, i, axis=axis or 0
    ),
    "sort": lambda xp, a, axis=-1: xp.sort(a, axis=axis),
    "clip": lambda xp, a, a_min=None, a_max=None, **kw: xp.clip(
        a, kw.get("min", a_min), kw.get("max", a_max)
    ),
    "expand_dims": lambda xp, a, axis: xp.expand_dims(a, axis=axis),
    "real": lambda xp, a: xp.real(a) if "complex" in str(a.dtype) else a,
    "tensordot": lambda xp, a, b, axes=2: xp.tensordot(a, b, axes=axes),
    "shape": lambda xp, a: a.shape,
    "ndim": lambda xp, a: a.ndim,
    "astype": lambda xp, a, dtype: xp.astype(a, dtype),
}
_ALIKE = {
    name: name
    for name in ("broadcast_to", "imag", "moveaxis", "ones_like", "reshape", "tile", "tril", "triu",
                 "zeros_like")
}  # fmt: skip
_FOLDS = {"sum": "sum", "mean": "mean", "prod": "prod", "max": "max", "min": "min",
          "amax": "max", "amin": "min", "var": "var", "std": "std", "all": "all", "any": "any",
          "argmax": "argmax", "argmin": "argmin", "argsort": "argsort"}  # fmt: skip


def _fold(name: str) -> Callable[..., Any]:
    def method(self: Any, axis: Any = None, **kwargs: Any) -> Any:
        return getattr(self.space, name)(self, axis=axis, **_given(kwargs))

    return method


def _shape(first: Any, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    return (first, *rest) if isinstance(first, int) else tuple(first)


METHODS: dict[str, Any] = {name: _fold(name) for name in
                           ("sum", "mean", "prod", "max", "min", "var", "std", "all", "any",
                            "argmax", "argmin")} | {
    "reshape": lambda self, first, *rest: self.space.reshape(self, _shape(first, rest)),
    "transpose": lambda self, *axes: _transpose(
        self.space, self, _shape(axes[0], axes[1:]) if axes and axes[0] is not None else None
    ),
    "astype": lambda self, dtype, **kw: self.space.astype(self, dtype),
    "dot": lambda self, other: _dot(self.space, self, other),
    "ravel": lambda self: self.space.reshape(self, (self.size,)),
    "flatten": lambda self: self.space.reshape(self, (self.size,)),
    "copy": lambda self: self.space.asarray(self, copy=True),
    "squeeze": lambda self, axis=None: self.space.squeeze(
        self, axis=tuple(i for i, n in enumerate(self.shape) if n == 1) if axis is None else axis
    ),
    "clip": lambda self, low=None, high=None: self.space.clip(self, low, high),
    "swapaxes": lambda self, i, j: _swapped(self.space, self, i, j),
    "conj": lambda self: FUNCTIONS["real"](self.space, self) if "complex" not in str(self.dtype)
    else self.space.conj(self),
}  # fmt: skip


def methods() -> dict[str, Any]:
    """Give what classes of traced NumPy and CuPy arrays have beside the standard's."""
    return {**METHODS, "__array_ufunc__": _ufunc, "__array_function__": _function}


_GIVING = frozenset({"matmul", "tensordot", "vecdot", "take", "matrix_transpose", "permute_dims"})
"""Functions that an operand may do its own way, if it only stands for an array."""


def giving_way(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Ask operands for `__tape_function__`, as NumPy's functions ask for `__array_function__`."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        for a in args:
            if (own := getattr(type(a), "__tape_function__", None)) is not None:
                return own(name, call, args, kwargs)
        return call(*args, **kwargs)

    return ask if name in _GIVING else call
