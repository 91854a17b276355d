"""Sums and products of a large matrix in double precision, of which no copy is made.

The matrix is read in blocks of rows; each is widened, used and dropped. A library without
float64 hands its blocks to NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from peft_any._typing import Array
from peft_any.algebra.lowrank import Factors
from peft_any.backend import (
    astype,
    backend_of,
    dtype_name,
    from_numpy_like,
    namespace,
    settled,
    to_numpy,
    widest,
)

_BLOCK = 1 << 21
"""Elements of a block."""


def doubled(x: Array) -> Array:
    """Bring an array to float64: in its library, or in NumPy where that has none.

    Examples
    --------
    >>> import numpy as np
    >>> str(doubled(np.ones(2, "float32")).dtype)
    'float64'
    """
    wide = widest(x)
    return wide if dtype_name(wide) == "float64" else to_numpy(x).astype("float64")


def like(x: Array, delta: Array) -> Array:
    """Bring an array of double precision to the library and the dtype of another.

    Examples
    --------
    >>> import numpy as np
    >>> str(like(np.ones(2), np.ones((1, 1), "float32")).dtype)
    'float32'
    """
    narrow: Array = astype(x, dtype_name(delta))
    return (
        narrow if backend_of(x).name == backend_of(delta).name else from_numpy_like(narrow, delta)
    )


def blocks(delta: Array) -> Iterator[slice]:
    """Cut the rows of a matrix into blocks."""
    m, n = delta.shape
    step = max(_BLOCK // max(n, 1), 1)
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def square(delta: Array) -> float:
    """Find ‖Δ‖² (Frobenius).

    Examples
    --------
    >>> import numpy as np
    >>> square(np.full((2, 3), 2.0, "float32"))
    24.0
    """
    total = 0.0
    for rows in blocks(delta):
        part = doubled(delta[rows, :])
        total += float(namespace(part).sum(part * part))
    return total


def product(delta: Array, x: Array) -> Array:
    """Find Δ·x for a thin x (n, k) in float64.

    Examples
    --------
    >>> import numpy as np
    >>> product(np.ones((2, 3), "float32"), np.ones((3, 1))).tolist()
    [[3.0], [3.0]]
    """
    parts = [settled(doubled(delta[rows, :]) @ x) for rows in blocks(delta)]
    return namespace(x).concat(parts, axis=0)


def cross(delta: Array, q: Array) -> Array:
    """Find Δᵀ·q for a thin q (m, k) in float64.

    Examples
    --------
    >>> import numpy as np
    >>> cross(np.ones((2, 3), "float32"), np.ones((2, 1))).tolist()
    [[2.0], [2.0], [2.0]]
    """
    xp = namespace(q)
    total: Array | None = None
    for rows in blocks(delta):
        part = xp.matrix_transpose(doubled(delta[rows, :])) @ q[rows, :]
        total = settled(part if total is None else total + part)
    assert total is not None  # noqa: S101 - matrices have rows
    return total


def distance(delta: Array, factors: Factors) -> float:
    """Find ‖Δ − u·v‖ (Frobenius) from the differences themselves.

    Examples
    --------
    >>> import numpy as np
    >>> distance(np.ones((2, 3), "float32"), (np.ones((2, 1)), np.zeros((1, 3))))
    2.449489742783178
    """
    u, v = map(doubled, factors)
    total = 0.0
    for rows in blocks(delta):
        gap = doubled(delta[rows, :]) - u[rows, :] @ v
        total += float(namespace(gap).sum(gap * gap))
    return sqrt(total)
