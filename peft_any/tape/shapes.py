"""Derivative rules of functions that move entries: reshaping, joining, repeating."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from peft_any.tape.rules import Rule, axes_of, rule, running_products

COMPOSITES: dict[str, Rule] = {}
"""Functions that are computed by others, which have rules, when an operand is traced."""

SEQUENCES = frozenset({"concat", "stack"})
"""Functions whose operands come in a sequence."""

PASS = frozenset(
    [
        "all",
        "any",
        "argmax",
        "argmin",
        "argsort",
        "bitwise_and",
        "bitwise_invert",
        "bitwise_left_shift",
        "bitwise_or",
        "bitwise_right_shift",
        "bitwise_xor",
        "broadcast_shapes",
        "ceil",
        "count_nonzero",
        "device",
        "empty_like",
        "equal",
        "floor",
        "floor_divide",
        "greater",
        "greater_equal",
        "isdtype",
        "isfinite",
        "isin",
        "isinf",
        "isnan",
        "less",
        "less_equal",
        "logical_and",
        "logical_not",
        "logical_or",
        "logical_xor",
        "matrix_rank",
        "nonzero",
        "not_equal",
        "ones_like",
        "round",
        "searchsorted",
        "signbit",
        "size",
        "trunc",
        "zeros_like",
    ]
)
"""Functions whose derivative is zero or nowhere, or whose results are not floating."""


def composite(*names: str) -> Callable[[Rule], Rule]:
    """Enter a composite under its functions' names."""

    def enter(f: Rule) -> Rule:
        for name in names:
            COMPOSITES[name] = f
        return f

    return enter


@rule("reshape", "squeeze", "expand_dims")
def _(xp: Any, y: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    shape = tuple(x.shape)
    return (lambda g: xp.reshape(g, shape),)


@rule("permute_dims")
def _(xp: Any, y: Any, x: Any, axes: Any) -> Any:
    order = [a % x.ndim for a in axes]
    inverse = tuple(sorted(range(x.ndim), key=order.__getitem__))
    return (lambda g: xp.permute_dims(g, inverse),)


@rule("matrix_transpose")
def _(xp: Any, y: Any, x: Any) -> Any:
    return (xp.matrix_transpose,)


@rule("moveaxis")
def _(xp: Any, y: Any, x: Any, source: Any, destination: Any) -> Any:
    return (lambda g: xp.moveaxis(g, destination, source),)


@rule("broadcast_to")
def _(xp: Any, y: Any, x: Any, shape: Any) -> Any:
    return (lambda g: g,)


@rule("flip")
def _(xp: Any, y: Any, x: Any, /, *, axis: Any = None) -> Any:
    return (lambda g: xp.flip(g, axis=axis),)


@rule("roll")
def _(xp: Any, y: Any, x: Any, /, shift: Any, *, axis: Any = None) -> Any:
    back = tuple(-s for s in shift) if isinstance(shift, tuple | list) else -shift
    return (lambda g: xp.roll(g, back, axis=axis),)


@rule("tril")
def _(xp: Any, y: Any, x: Any, /, *, k: int = 0) -> Any:
    return (lambda g: xp.tril(g, k=k),)


@rule("triu")
def _(xp: Any, y: Any, x: Any, /, *, k: int = 0) -> Any:
    return (lambda g: xp.triu(g, k=k),)


@rule("concat")
def _(xp: Any, y: Any, *xs: Any, axis: int | None = 0) -> Any:
    pulls, start = [], 0
    for x in xs:
        n = prod(x.shape) if axis is None else x.shape[axis]
        pulls.append(_piece(xp, start, n, axis, tuple(x.shape)))
        start += n
    return pulls


def _piece(xp: Any, start: int, n: int, axis: int | None, shape: tuple[int, ...]) -> Any:
    def back(g: Any) -> Any:
        lead = (slice(None),) * (0 if axis is None else axis % len(shape))
        return xp.reshape(g[(*lead, slice(start, start + n), ...)], shape)

    return back


@rule("stack")
def _(xp: Any, y: Any, *xs: Any, axis: int = 0) -> Any:
    lead = (slice(None),) * (axis % y.ndim)
    return [lambda g, i=i: g[(*lead, i, ...)] for i in range(len(xs))]


@composite("unstack")
def _(xp: Any, x: Any, /, *, axis: int = 0) -> Any:
    lead = (slice(None),) * (axis % x.ndim)
    return tuple(x[(*lead, i, ...)] for i in range(x.shape[axis]))


@composite("broadcast_arrays")
def _(xp: Any, *xs: Any) -> Any:
    total = xs[0]
    for x in xs[1:]:
        total = xp.raw.broadcast_arrays(xp.lower(total), xp.lower(x))[0]
    return [xp.broadcast_to(x, tuple(total.shape)) for x in xs]


@composite("meshgrid")
def _(xp: Any, *xs: Any, indexing: str = "xy") -> Any:
    order = list(range(len(xs)))
    if indexing == "xy":
        order[:2] = order[:2][::-1]
    n = len(xs)
    shaped = [
        xp.reshape(x, tuple(x.size if j == order[i] else 1 for j in range(n)))
        for i, x in enumerate(xs)
    ]
    return xp.broadcast_arrays(*shaped) if n > 1 else shaped


@composite("tile")
def _(xp: Any, x: Any, repetitions: Any, /) -> Any:
    ndim = max(x.ndim, len(repetitions))
    times = (1,) * (ndim - len(repetitions)) + tuple(repetitions)
    shape = (1,) * (ndim - x.ndim) + tuple(x.shape)
    apart = xp.reshape(x, tuple(k for n in shape for k in (1, n)))
    wide = tuple(k for t, n in zip(times, shape, strict=True) for k in (t, n))
    whole = tuple(t * n for t, n in zip(times, shape, strict=True))
    return xp.reshape(xp.broadcast_to(apart, wide), whole)


@composite("repeat")
def _(xp: Any, x: Any, repeats: Any, /, *, axis: int | None = None) -> Any:
    if axis is None:
        x, axis = xp.reshape(x, (prod(x.shape),)), 0
    places = xp.arange(x.shape[axis], device=x.device)
    return xp.take(x, xp.raw.repeat(xp.lower(places), xp.lower(repeats)), axis=axis)


@composite("diff")
def _(
    xp: Any, x: Any, /, *, axis: int = -1, n: int = 1, prepend: Any = None, append: Any = None
) -> Any:
    parts = [p for p in (prepend, x, append) if p is not None]
    x = xp.concat(parts, axis=axis) if len(parts) > 1 else x
    lead = (slice(None),) * (axis % x.ndim)
    for _i in range(n):
        x = x[(*lead, slice(1, None), ...)] - x[(*lead, slice(None, -1), ...)]
    return x


@composite("clip")
def _(xp: Any, x: Any, /, min: Any = None, max: Any = None) -> Any:  # noqa: A002
    if min is not None:
        x = xp.where(x < min, min, x)
    return x if max is None else xp.where(x > max, max, x)


@composite("full", "full_like")
def _(xp: Any, shape: Any, fill_value: Any, *args: Any, **kwargs: Any) -> Any:
    if not hasattr(fill_value, "node"):
        return xp.wrap(xp.raw.full_like(xp.lower(shape), fill_value, *args, **kwargs))
    shape = getattr(shape, "shape", shape)
    return xp.broadcast_to(fill_value, (shape,) if isinstance(shape, int) else tuple(shape))


@composite("var")
def _(xp: Any, x: Any, /, *, axis: Any = None, correction: float = 0.0, keepdims: Any = 0) -> Any:
    gap = x - xp.mean(x, axis=axis, keepdims=True)
    n = prod(x.shape[a] for a in axes_of(axis, x.ndim))
    return xp.sum(xp.real(gap * xp.conj(gap)) if _complex(x) else gap * gap, axis=axis,
                  keepdims=bool(keepdims)) / (n - correction)  # fmt: skip


@composite("std")
def _(xp: Any, x: Any, /, **kwargs: Any) -> Any:
    return xp.sqrt(xp.var(x, **kwargs))


def _complex(x: Any) -> bool:
    return "complex" in str(x.dtype)


@composite("cumulative_prod")
def _(
    xp: Any, x: Any, /, *, axis: Any = None, dtype: Any = None, include_initial: bool = False
) -> Any:
    axis = 0 if axis is None else axis % x.ndim
    x = x if dtype is None else xp.astype(x, dtype)
    y = running_products(xp, x, axis)
    if not include_initial:
        return y
    lead = (slice(None),) * axis
    return xp.concat([xp.ones_like(x[(*lead, slice(0, 1), ...)]), y], axis=axis)
