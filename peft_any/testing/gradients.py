"""Gradients on every engine, and by finite differences, to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import numpy as np

from peft_any.autodiff import flatten, value_and_grad
from peft_any.backend import Backend, from_numpy, namespace, resolve, to_numpy
from peft_any.testing.libraries import compiled, missing, set_up

ENGINES = ("numpy", "strict", "torch:tape", "jax:tape", "torch", "jax")
"""Libraries; with ":tape", recorded by the tape although they differentiate themselves."""


def prepared(engine: str) -> tuple[Backend, Any]:
    """Give a library and the engine to use on it.

    Raises
    ------
    unittest.SkipTest
        If it is not installed.
    """
    library, _, forced = engine.partition(":")
    if reason := missing(library):
        raise SkipTest(reason)
    set_up(library)
    return resolve(library), forced or "auto"


def mapped(f: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the arrays of a nest."""
    leaves, _, fill = flatten(tree)
    return fill([f(x) for x in leaves])


def gradients(engine: str, f: Callable[..., Any], params: Any, *rest: Any) -> tuple[Any, Any]:
    """Compute loss and gradients of host arrays on an engine, back on the host."""
    backend, how = prepared(engine)
    there = [mapped(lambda x: from_numpy(np.array(x), backend), a) for a in (params, *rest)]
    both = value_and_grad(f, engine=how)
    if backend.name == "jax":  # compiled once, instead of operation by operation
        arrays, _, fill = flatten(there)

        def flat(xs: list[Any]) -> tuple[Any, list[Any]]:
            value, found = both(*fill(xs))
            return value, flatten(found)[0]

        loss, found = compiled(flat)(arrays)
        grads = flatten(there[0])[2](found)
    else:
        loss, grads = both(*there)
    if (found_on := resolve("auto", loss).name) != backend.name:
        raise AssertionError(f"{engine}: the loss is an array of {found_on}")
    return float(to_numpy(loss)), mapped(to_numpy, grads)


def difference(got: Any, want: Any) -> float:
    """Largest difference of two nests of arrays, relative to the largest entry wanted."""
    pairs = list(zip(flatten(got)[0], flatten(want)[0], strict=True))
    for g, w in pairs:
        if (g.shape, g.dtype) != (w.shape, w.dtype):
            raise AssertionError(f"a gradient is {g.dtype} {g.shape}, not {w.dtype} {w.shape}")
        if not np.all(np.isfinite(g)):
            raise AssertionError("a gradient is not finite")
    size = max([float(np.max(np.abs(w), initial=0.0)) for _, w in pairs] + [1.0])
    return max(float(np.max(np.abs(g - w), initial=0.0)) for g, w in pairs) / size


def finite_differences(f: Callable[..., Any], params: Any, *rest: Any, step: float = 1e-4) -> Any:
    """Differentiate by central differences of fourth order, one entry after the other."""
    leaves, _, fill = flatten(params)

    def along(i: int, at: tuple[int, ...], h: complex) -> float:
        moved = [np.array(x) for x in leaves]
        moved[i][at] += h
        return float(f(fill(moved), *rest))

    def slope(i: int, at: tuple[int, ...], unit: complex) -> float:
        h = step * unit
        near = along(i, at, h) - along(i, at, -h)
        far = along(i, at, 2 * h) - along(i, at, -2 * h)
        return (8 * near - far) / (12 * step)

    grads = []
    for i, x in enumerate(leaves):
        g = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            g[at] = slope(i, at, 1)
            if np.iscomplexobj(x):
                g[at] += 1j * slope(i, at, 1j)
        grads.append(g)
    return fill(grads)


def weighed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make a loss of a function of arrays: its results, weighed with fixed numbers."""

    def loss(params: list[Any], *rest: Any) -> Any:
        xp = namespace(*params)
        results = f(xp, *params, *rest)
        total = None
        for n, y in enumerate(results if isinstance(results, tuple | list) else [results]):
            count = int(np.prod(y.shape, dtype=int))
            w = np.cos(1.0 + n + np.arange(count, dtype="float64")).reshape(y.shape)
            w = like(w, y)
            part = xp.sum(y * w) if "complex" not in str(y.dtype) else xp.sum(
                xp.real(y) * w + xp.imag(y) * (1.0 - w * w)
            )  # fmt: skip
            total = part if total is None else total + part
        return total

    return loss


def like(host: np.ndarray, y: Any) -> Any:
    """Bring fixed numbers to the library and precision of an array under any engine."""
    while hasattr(y, "node"):
        y = y.value
    name = str(y.dtype).rpartition(".")[2]
    name = {"complex128": "float64", "complex64": "float32"}.get(name, name)
    return from_numpy(host.astype(name), resolve("auto", y))
