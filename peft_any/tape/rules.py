"""Derivative rules, written once over the standard: elementwise functions and reductions.

A rule gets the namespace, the result and the operands, and gives for each operand the function
from the result's cotangent to the operand's. The sweep sums over broadcast axes and casts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from math import log, prod
from typing import Any, TypeAlias

from peft_any._dtypes import SCALARS, dtype_name

_LETTERS = re.compile(r"[a-z]+")
Rule: TypeAlias = Callable[..., Any]
RULES: dict[str, Rule] = {}


@lru_cache(maxsize=64)
def _kind(library: str, dtype: Any) -> str:
    match = _LETTERS.match(dtype_name(dtype))
    return match.group() if match else ""


def is_complex(dtype: Any) -> bool:
    """Tell whether a dtype is complex."""
    return _kind(type(dtype).__module__, dtype) == "complex"


def is_inexact(dtype: Any) -> bool:
    """Tell whether arrays of a dtype have derivatives."""
    return _kind(type(dtype).__module__, dtype) in ("float", "bfloat", "complex")


def conj(xp: Any, x: Any) -> Any:
    """Conjugate an array or a scalar, if it is complex."""
    if type(x) in SCALARS:
        return x.conjugate()
    return xp.conj(x) if is_complex(x.dtype) else x


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under its functions' names."""

    def enter(f: Rule) -> Rule:
        for name in names:
            RULES[name] = f
        return f

    return enter


def _slope(slope: Callable[[Any, Any, Any], Any]) -> Rule:
    """Make the rule of an elementwise function from its derivative in (xp, x, y)."""

    def of(xp: Any, y: Any, x: Any) -> Any:
        return (lambda g: g * conj(xp, slope(xp, x, y)),)

    return of


_UNARY: dict[str, Callable[[Any, Any, Any], Any]] = {
    "exp": lambda xp, x, y: y,
    "expm1": lambda xp, x, y: y + 1.0,
    "log": lambda xp, x, y: 1.0 / x,
    "log1p": lambda xp, x, y: 1.0 / (1.0 + x),
    "log2": lambda xp, x, y: (1.0 / log(2.0)) / x,
    "log10": lambda xp, x, y: (1.0 / log(10.0)) / x,
    "sqrt": lambda xp, x, y: 0.5 / y,
    "square": lambda xp, x, y: 2.0 * x,
    "reciprocal": lambda xp, x, y: -(y * y),
    "sin": lambda xp, x, y: xp.cos(x),
    "cos": lambda xp, x, y: -xp.sin(x),
    "tan": lambda xp, x, y: 1.0 + y * y,
    "asin": lambda xp, x, y: 1.0 / xp.sqrt(1.0 - x * x),
    "acos": lambda xp, x, y: -1.0 / xp.sqrt(1.0 - x * x),
    "atan": lambda xp, x, y: 1.0 / (1.0 + x * x),
    "sinh": lambda xp, x, y: xp.cosh(x),
    "cosh": lambda xp, x, y: xp.sinh(x),
    "tanh": lambda xp, x, y: 1.0 - y * y,
    "asinh": lambda xp, x, y: 1.0 / xp.sqrt(1.0 + x * x),
    "acosh": lambda xp, x, y: 1.0 / (xp.sqrt(x - 1.0) * xp.sqrt(x + 1.0)),
    "atanh": lambda xp, x, y: 1.0 / (1.0 - x * x),
}
RULES |= {name: _slope(slope) for name, slope in _UNARY.items()}
EVEN = {RULES[name] for name in _UNARY}
"""Rules to whose ways back one number is as good as an array full of it."""


def _square(xp: Any, y: Any, x: Any) -> Any:
    return (lambda g: (2.0 * g) * conj(xp, x),)


SAME = {"multiply": _square}
"""Rules of operators for twice the same array: fewer passes over it; all are such as in `EVEN`."""


@rule("abs")
def _(xp: Any, y: Any, x: Any) -> Any:
    if not is_complex(x.dtype):
        return (lambda g: g * xp.sign(x),)
    return (lambda g: g * (x / xp.where(y == 0.0, xp.ones_like(y), y)),)


@rule("sign")
def _(xp: Any, y: Any, x: Any) -> Any:
    if not is_complex(x.dtype):
        return None
    size = xp.abs(x)
    size = xp.where(size == 0.0, xp.ones_like(size), size)
    return (
        lambda g: xp.where(y == 0.0, xp.zeros_like(g), (g - y * xp.real(conj(xp, y) * g)) / size),
    )


@rule("negative")
def _(xp: Any, y: Any, x: Any) -> Any:
    return (lambda g: -g,)


@rule("positive", "asarray", "astype", "_copy")
def _(xp: Any, y: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return (lambda g: g,) if is_inexact(y.dtype) else None


@rule("_to_device")
def _(xp: Any, y: Any, x: Any, device: Any) -> Any:
    home = x.device
    return (lambda g: g.to_device(home),)


@rule("conj")
def _(xp: Any, y: Any, x: Any) -> Any:
    return (lambda g: conj(xp, g),)


@rule("real")
def _(xp: Any, y: Any, x: Any) -> Any:
    return (lambda g: g,)


@rule("imag")
def _(xp: Any, y: Any, x: Any) -> Any:
    return (lambda g: xp.astype(g, x.dtype) * 1j,)


@rule("add")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g), (lambda g: g)


@rule("subtract")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g), (lambda g: -g)


@rule("multiply")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g * conj(xp, b)), (lambda g: g * conj(xp, a))


@rule("divide")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g / conj(xp, b)), (lambda g: -g * conj(xp, y / b))


@rule("pow")
def _(xp: Any, y: Any, x: Any, p: Any) -> Any:
    if type(p) in SCALARS:
        if p == 2:
            return *_square(xp, y, x), None
        return (lambda g: g * conj(xp, p * x ** (p - 1)) if p != 0 else xp.zeros_like(y)), None

    def base(g: Any) -> Any:
        zero = p == 0
        safe = xp.where(zero, xp.ones_like(p), p)
        slope = safe * x ** (safe - 1)
        return g * conj(xp, xp.where(zero, xp.zeros_like(slope), slope))

    def exponent(g: Any) -> Any:
        if type(x) in SCALARS:
            return g * conj(xp, y * log(x)) if x != 0 else xp.zeros_like(y)
        zero = x == 0
        return g * conj(xp, y * xp.log(xp.where(zero, xp.ones_like(x), x)))

    return base, exponent


@rule("atan2")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g * (b / (a * a + b * b))), (lambda g: -g * (a / (a * a + b * b)))


def _safe(xp: Any, y: Any) -> Any:
    return xp.where(y == 0, xp.ones_like(y), y)


@rule("hypot")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g * (a / _safe(xp, y))), (lambda g: g * (b / _safe(xp, y)))


@rule("logaddexp")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g * xp.exp(a - y)), (lambda g: g * xp.exp(b - y))


@rule("maximum")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: _share(xp, g, a > b, a == b)), (lambda g: _share(xp, g, b > a, a == b))


@rule("minimum")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: _share(xp, g, a < b, a == b)), (lambda g: _share(xp, g, b < a, a == b))


def _share(xp: Any, g: Any, first: Any, tie: Any) -> Any:
    """Give a cotangent to the operand chosen, and half of it where both are equal."""
    zero = xp.zeros_like(g)
    return xp.where(first, g, xp.where(tie, 0.5 * g, zero))


@rule("copysign")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    def back(g: Any) -> Any:
        same = xp.signbit(y) == xp.signbit(a)
        return xp.where(a == 0, xp.zeros_like(g), xp.where(same, g, -g))

    return back, None


@rule("remainder")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    return (lambda g: g), (lambda g: -g * xp.floor(a / b))


@rule("where")
def _(xp: Any, y: Any, c: Any, a: Any, b: Any) -> Any:
    def zero(g: Any) -> Any:
        return xp.zeros_like(g)

    return None, (lambda g: xp.where(c, g, zero(g))), (lambda g: xp.where(c, zero(g), g))


def axes_of(axis: Any, ndim: int) -> tuple[int, ...]:
    """Give the axes of a reduction, none negative."""
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple | list) else (axis,)))


def _kept(xp: Any, g: Any, x: Any, axis: Any) -> Any:
    """Put the axes of a reduction back, of length 1, where broadcasting needs them."""
    if axis is None or g.ndim == x.ndim:
        return g
    axes = axes_of(axis, x.ndim)
    return xp.reshape(g, tuple(1 if i in axes else n for i, n in enumerate(x.shape)))


def _spread(xp: Any, g: Any, x: Any, axis: Any) -> Any:
    """Repeat a cotangent over the axes of a reduction; that of all axes is one number."""
    g = _kept(xp, g, x, axis)
    return xp.broadcast_to(g, tuple(x.shape)) if g.ndim else g


@rule("sum")
def _(xp: Any, y: Any, x: Any, /, *, axis: Any = None, dtype: Any = None, keepdims: Any = 0) -> Any:
    return (lambda g: _spread(xp, g, x, axis),)


@rule("mean")
def _(xp: Any, y: Any, x: Any, /, *, axis: Any = None, keepdims: Any = False) -> Any:
    n = prod(x.shape) // max(prod(y.shape), 1)
    return (lambda g: _spread(xp, g / n, x, axis),)


@rule("max", "min")
def _(xp: Any, y: Any, x: Any, /, *, axis: Any = None, keepdims: Any = False) -> Any:
    def back(g: Any) -> Any:
        hit = xp.astype(x == _kept(xp, y, x, axis), x.dtype)
        many = xp.sum(hit, axis=axes_of(axis, x.ndim), keepdims=True)
        return _kept(xp, g, x, axis) * (hit / many)

    return (back,)


def running_products(xp: Any, x: Any, axis: int) -> Any:
    """Multiply cumulatively by doubling (Hillis and Steele 1986): zeros need no care."""
    n, shift = x.shape[axis], 1
    lead = (slice(None),) * axis
    while shift < n:
        ones = xp.ones_like(x[(*lead, slice(0, shift), ...)])
        x = x * xp.concat([ones, x[(*lead, slice(0, n - shift), ...)]], axis=axis)
        shift *= 2
    return x


def _others(xp: Any, x: Any) -> Any:
    """Give the products of all other entries along the last axis."""
    one = xp.ones_like(x[..., :1])
    before = running_products(xp, xp.concat([one, x[..., :-1]], axis=-1), x.ndim - 1)
    after = xp.concat([one, xp.flip(x, axis=-1)[..., :-1]], axis=-1)
    return before * xp.flip(running_products(xp, after, x.ndim - 1), axis=-1)


@rule("prod")
def _(xp: Any, y: Any, x: Any, /, *, axis: Any = None, dtype: Any = None, keepdims: Any = 0) -> Any:
    axes = axes_of(axis, x.ndim)
    order = (*(i for i in range(x.ndim) if i not in axes), *axes)
    shape = tuple(x.shape[i] for i in order)

    def back(g: Any) -> Any:
        if not axes or not prod(shape):
            return xp.broadcast_to(_kept(xp, g, x, axis), tuple(x.shape))
        rows = xp.permute_dims(x, order)
        flat = xp.reshape(rows, (*shape[: x.ndim - len(axes)], prod(x.shape[a] for a in axes)))
        rest = xp.reshape(_others(xp, flat), shape)
        inverse = tuple(sorted(range(x.ndim), key=order.__getitem__))
        return _kept(xp, g, x, axis) * conj(xp, xp.permute_dims(rest, inverse))

    return (back,)


@rule("cumulative_sum")
def _(
    xp: Any, y: Any, x: Any, /, *, axis: Any = None, dtype: Any = None,
    include_initial: bool = False,
) -> Any:  # fmt: skip
    axis = 0 if axis is None else axis % x.ndim

    def back(g: Any) -> Any:
        if include_initial:
            g = g[((slice(None),) * axis + (slice(1, None), ...))]
        return xp.flip(xp.cumulative_sum(xp.flip(g, axis=axis), axis=axis), axis=axis)

    return (back,)
