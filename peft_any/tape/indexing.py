"""Derivative rules of functions that pick entries: sorting, taking, indexing; and its adjoint."""

from __future__ import annotations

from math import prod
from typing import Any

from peft_any._engines import can_scatter, scatter
from peft_any.backend import creation_device
from peft_any.tape.record import deep
from peft_any.tape.rules import rule


@rule("sort")
def _(
    xp: Any, y: Any, x: Any, /, *, axis: int = -1, descending: bool = False, stable: bool = True
) -> Any:
    order = xp.argsort(x, axis=axis, descending=descending, stable=stable)
    back = xp.argsort(order, axis=axis)
    return (lambda g: xp.take_along_axis(g, back, axis=axis),)


@rule("take")
def _(xp: Any, y: Any, x: Any, indices: Any, /, *, axis: int | None = None) -> Any:
    shape, axis = tuple(x.shape), 0 if axis is None else axis % x.ndim

    def back(g: Any) -> Any:
        if can_put(g):
            return put(xp, g, (slice(None),) * axis + (indices,), shape)
        hot = _hot(xp, indices, shape[axis], g)
        moved = xp.moveaxis(g, axis, 0)
        rest = tuple(moved.shape[1:])
        sums = xp.matrix_transpose(hot) @ xp.reshape(moved, (hot.shape[0], prod(rest)))
        return xp.moveaxis(xp.reshape(sums, (shape[axis], *rest)), 0, axis)

    return (back,)


def _hot(xp: Any, indices: Any, n: int, g: Any) -> Any:
    """Give the one-hot form of indices, on a new last axis, in a cotangent's dtype."""
    places = xp.arange(n, dtype=indices.dtype, device=creation_device(indices))
    wrapped = xp.where(indices < 0, indices + n, indices)
    return xp.astype(xp.expand_dims(wrapped, axis=-1) == places, g.dtype)


@rule("take_along_axis")
def _(xp: Any, y: Any, x: Any, indices: Any, /, *, axis: int = -1) -> Any:
    shape, axis = tuple(x.shape), axis % x.ndim

    def back(g: Any) -> Any:
        if can_put(g):
            device, ndim = creation_device(indices), len(shape)
            key = [
                xp.reshape(
                    xp.arange(indices.shape[i], device=device),
                    tuple(-1 if j == i else 1 for j in range(ndim)),
                )
                for i in range(ndim)
            ]
            key[axis] = indices
            return put(xp, g, tuple(key), shape)
        hot = xp.moveaxis(_hot(xp, indices, shape[axis], g), -1, axis)  # … new, index …
        return xp.sum(hot * xp.expand_dims(g, axis=axis), axis=axis + 1)

    return (back,)


@rule("_getitem")
def _(xp: Any, y: Any, x: Any, key: Any) -> Any:
    parts = key if isinstance(key, tuple) else (key,)
    shape = tuple(x.shape)
    if not all(k is None or k is ... or isinstance(k, int | slice) for k in parts):
        if can_put(x):
            return (lambda g: put(xp, g, key, shape),)
        n = prod(shape)
        places = xp.reshape(xp.arange(n, device=creation_device(x)), shape)[key]

        def back(g: Any) -> Any:
            hot = _hot(xp, xp.reshape(places, (-1,)), n, g)
            return xp.reshape(xp.reshape(g, (1, -1)) @ hot, shape)

        return (back,)
    kept = tuple(k for k in parts if k is not None)
    if all(k is ... or k == slice(None) for k in kept):
        return (lambda g: xp.reshape(g, shape),)
    inner = tuple(x[kept].shape)
    return (lambda g: put(xp, xp.reshape(g, inner), kept, shape),)


def can_put(x: Any) -> bool:
    """Tell whether `put` takes arrays of integers in its key, with the library under all tapes."""
    while hasattr(x, "node"):
        x = x.value
    return can_scatter(x)


def put(xp: Any, g: Any, key: Any, shape: tuple[int, ...], onto: Any = None) -> Any:
    """Add a cotangent to zeros of a shape, or to an array, at a key: the adjoint of indexing."""
    own = getattr(xp, "_put", None)  # a tape's, which records it
    if own is None:
        return scatter(g, key, shape, onto)
    return own(g, deep(xp.kind, key), shape, *(() if onto is None else (onto,)))


@rule("_put")
def _(xp: Any, y: Any, g: Any, key: Any, *rest: Any) -> Any:
    return (lambda h: h[key]), None, None, (lambda h: h)
