"""Derivative rules of products and norms."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from typing import Any

from peft_any._kernels import dense
from peft_any.tape.rules import Rule, conj, is_complex, rule
from peft_any.tape.shapes import COMPOSITES

LINALG_RULES: dict[str, Rule] = {}
LINALG_COMPOSITES: dict[str, Rule] = {}


def linalg(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule of a `linalg` function."""

    def enter(f: Rule) -> Rule:
        LINALG_RULES.update(dict.fromkeys(names, f))
        return f

    return enter


def composite(*names: str) -> Callable[[Rule], Rule]:
    """Enter a composite of an extension."""

    def enter(f: Rule) -> Rule:
        LINALG_COMPOSITES.update(dict.fromkeys(names, f))
        return f

    return enter


def adjoint(xp: Any, a: Any) -> Any:
    """Transpose matrices and conjugate them."""
    return conj(xp, a.T if a.ndim == 2 else xp.matrix_transpose(a))


@rule("_T")
def _(xp: Any, y: Any, x: Any) -> Any:
    return (lambda g: g.T,)


@rule("matmul")
def _(xp: Any, y: Any, a: Any, b: Any) -> Any:
    if a.ndim == 1 or b.ndim == 1:
        return _by_vector(xp, a, b)
    if a.ndim == b.ndim == 2 and not is_complex(y.dtype):
        return (lambda g: g @ b.T), (lambda g: a.T @ g)

    def right(g: Any) -> Any:
        if b.ndim == 2 and a.ndim > 2:  # one product of matrices, not a sum over a stack
            rows = prod(a.shape[:-1])
            flat = xp.reshape(a, (rows, a.shape[-1]))
            return adjoint(xp, flat) @ xp.reshape(g, (rows, g.shape[-1]))
        return adjoint(xp, a) @ g

    def left(g: Any) -> Any:
        return dense(g, conj(xp, b)) if b.ndim == 2 else g @ adjoint(xp, b)

    return left, right


@rule("_linear")
def _(xp: Any, y: Any, x: Any, w: Any, *sums: Any) -> Any:
    def rows(a: Any) -> Any:
        return a if a.ndim == 2 else xp.reshape(a, (prod(a.shape[:-1]), a.shape[-1]))

    pulls = (lambda g: dense(g, adjoint(xp, w))), (lambda g: rows(g).T @ rows(x))
    return *pulls, *((lambda g: g) for _ in sums)


def _by_vector(xp: Any, a: Any, b: Any) -> Any:
    if a.ndim == 1 and b.ndim == 1:
        return (lambda g: g * conj(xp, b)), (lambda g: g * conj(xp, a))
    if b.ndim == 1:
        return (
            lambda g: xp.expand_dims(g, axis=-1) * conj(xp, b),
            lambda g: xp.expand_dims(g, axis=-1) * conj(xp, a),
        )
    return (
        lambda g: xp.sum(xp.expand_dims(g, axis=-2) * conj(xp, b), axis=-1),
        lambda g: xp.expand_dims(conj(xp, a), axis=-1) * xp.expand_dims(g, axis=-2),
    )


@rule("vecdot")
def _(xp: Any, y: Any, a: Any, b: Any, /, *, axis: int = -1) -> Any:
    axis = axis if axis < 0 else axis - max(a.ndim, b.ndim)
    return (
        lambda g: conj(xp, xp.expand_dims(g, axis=axis)) * b,
        lambda g: xp.expand_dims(g, axis=axis) * a,
    )


def _tensordot(xp: Any, a: Any, b: Any, /, *, axes: Any = 2) -> Any:
    if isinstance(axes, int):
        left, right = tuple(range(a.ndim - axes, a.ndim)), tuple(range(axes))
    else:
        left, right = (tuple(i % x.ndim for i in s) for s, x in zip(axes, (a, b), strict=True))
    free = [i for i in range(a.ndim) if i not in left], [i for i in range(b.ndim) if i not in right]
    k = prod(a.shape[i] for i in left)
    shape = tuple(a.shape[i] for i in free[0]) + tuple(b.shape[i] for i in free[1])
    a = xp.permute_dims(a, (*free[0], *left)) if a.ndim > 1 else a
    b = xp.permute_dims(b, (*right, *free[1])) if b.ndim > 1 else b
    rows, columns = prod(shape[: len(free[0])]), prod(shape[len(free[0]) :])
    product = xp.reshape(a, (rows, k)) @ xp.reshape(b, (k, columns))
    return xp.reshape(product, shape)


COMPOSITES["tensordot"] = _tensordot


@composite("outer")
def _(xp: Any, a: Any, b: Any) -> Any:
    return xp.expand_dims(a, axis=-1) * xp.expand_dims(b, axis=0)


@composite("cross")
def _(xp: Any, a: Any, b: Any, /, *, axis: int = -1) -> Any:
    a, b = (xp.moveaxis(x, axis, -1) for x in (a, b))
    x, y = ([v[..., i] for i in range(3)] for v in (a, b))
    parts = [x[i - 2] * y[i - 1] - x[i - 1] * y[i - 2] for i in range(3)]
    return xp.moveaxis(xp.stack(parts, axis=-1), -1, axis)


def _lengths(xp: Any, x: Any, axis: Any, keepdims: bool) -> Any:
    """Euclidean lengths, whose gradient at zero is zero, as torch's."""
    square = xp.sum(xp.real(x * xp.conj(x)) if is_complex(x.dtype) else x * x, axis=axis,
                    keepdims=keepdims)  # fmt: skip
    zero = square == 0
    root = xp.sqrt(xp.where(zero, xp.ones_like(square), square))
    return xp.where(zero, xp.zeros_like(root), root)


@composite("vector_norm")
def _(xp: Any, x: Any, /, *, axis: Any = None, keepdims: bool = False, ord: Any = 2) -> Any:  # noqa: A002
    if ord == 2:
        return _lengths(xp, x, axis, keepdims)
    size = xp.abs(x)
    if ord in (inf, -inf):
        return (xp.max if ord > 0 else xp.min)(size, axis=axis, keepdims=keepdims)
    if ord == 0:
        return xp.sum(xp.astype(size != 0, size.dtype), axis=axis, keepdims=keepdims)
    total = xp.sum(size if ord == 1 else size**ord, axis=axis, keepdims=keepdims)
    return total if ord == 1 else total ** (1.0 / ord)


@composite("matrix_norm")
def _(xp: Any, x: Any, /, *, keepdims: bool = False, ord: Any = "fro") -> Any:  # noqa: A002
    if ord == "fro":
        return _lengths(xp, x, (-2, -1), keepdims)
    if ord in ("nuc", 2, -2):
        s = xp.linalg.svdvals(x)
        reduce = {"nuc": xp.sum, 2: xp.max, -2: xp.min}[ord]
        norm = reduce(s, axis=-1)
        return xp.expand_dims(xp.expand_dims(norm, axis=-1), axis=-1) if keepdims else norm
    along, across = (-2, -1) if abs(ord) == 1 else (-1, -2)
    sums = xp.sum(xp.abs(x), axis=along, keepdims=True)
    norm = (xp.max if ord > 0 else xp.min)(sums, axis=across, keepdims=True)
    return norm if keepdims else xp.squeeze(norm, axis=(-2, -1))
