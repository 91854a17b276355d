"""Linear algebra that methods share, on standard functions only."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod

from peft_any._typing import Array
from peft_any.backend import creation_device, namespace


def row_norms(w: Array, b: Array | None = None, a: Array | None = None) -> Array:
    """Norms of the rows of ``w + b @ a``, without forming the product.

    ‖w + b·a‖² = ‖w‖² + 2·Σ b∘(w·aᵀ) + Σ b∘(b·(a·aᵀ)), sums over the rank.

    Parameters
    ----------
    w : array (m, n)
    b : array (m, r), optional
    a : array (r, n), optional

    Returns
    -------
    array (m,)

    Examples
    --------
    >>> import numpy as np
    >>> row_norms(np.asarray([[3.0, 4.0], [0.0, 2.0]]))
    array([5., 2.])
    """
    xp = namespace(w, b, a)
    square = xp.vecdot(w, w)
    if a is not None and b is not None:
        at = xp.matrix_transpose(a)
        square = square + xp.vecdot(b, 2.0 * (w @ at) + b @ (a @ at))
        square = xp.where(square > 0.0, square, xp.zeros_like(square))
    return xp.sqrt(square)


def orthogonality(a: Array) -> Array:
    """Distance of a matrix's rows from orthonormal ones: ‖a·aᵀ − I‖ (Frobenius).

    Parameters
    ----------
    a : array (r, n)

    Returns
    -------
    array ()

    Examples
    --------
    >>> import numpy as np
    >>> float(orthogonality(np.asarray([[0.0, 2.0]])))
    3.0
    """
    xp = namespace(a)
    eye = xp.eye(a.shape[0], dtype=a.dtype, device=creation_device(a))
    gap = a @ xp.matrix_transpose(a) - eye
    return xp.sqrt(xp.sum(gap * gap))


def packed(x: Array) -> Array:
    """Lay the rows of a matrix close together, where a library keeps strides.

    Examples
    --------
    >>> import numpy as np
    >>> packed(np.zeros((3, 2)).T).flags.c_contiguous
    True
    """
    return namespace(x).reshape(namespace(x).reshape(x, (-1,)), x.shape)


def khatri_rao(a: Array, b: Array) -> Array:
    """Column-wise Khatri-Rao product: row i·m + j is the product of rows i of `a` and j of `b`.

    (uᵀ·a) ∘ (vᵀ·b) = (u ⊗ v)ᵀ·khatri_rao(a, b) (Khatri & Rao 1968, Sankhyā A 30, 167).

    Parameters
    ----------
    a : array (k, n)
    b : array (m, n)

    Returns
    -------
    array (k·m, n)

    Examples
    --------
    >>> import numpy as np
    >>> khatri_rao(np.asarray([[1, 2]]), np.asarray([[3, 4], [5, 6]]))
    array([[ 3,  8],
           [ 5, 12]])
    """
    xp = namespace(a, b)
    (k, n), (m, _) = a.shape, b.shape
    return xp.reshape(xp.reshape(a, (k, 1, n)) * xp.reshape(b, (1, m, n)), (k * m, n))


def tucker(t: Array, b: Array) -> Array:
    """Columns of a convolution in Tucker form: row i is Σⱼ t[i, j, κ]·b[j, q] over (q, κ).

    Parameters
    ----------
    t : array (r, r, kernel …)
    b : array (r, n)

    Returns
    -------
    array (r, n · kernel)

    Examples
    --------
    >>> import numpy as np
    >>> tucker(np.asarray([[[1, 2]]]), np.asarray([[1, 10]]))
    array([[ 1,  2, 10, 20]])
    """
    xp = namespace(t, b)
    r, n, k = t.shape[0], b.shape[1], prod(t.shape[2:])
    columns = xp.permute_dims(xp.reshape(t, (r, r, k)), (0, 2, 1)) @ b
    return xp.reshape(xp.permute_dims(columns, (0, 2, 1)), (r, n * k))


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Split a size in two: `factor` and the rest, or else the most equal pair, smaller one first.

    A `factor` that does not divide bounds the first of the pair; -1 does not.

    Examples
    --------
    >>> factorize(128), factorize(128, 32), factorize(127), factorize(30, 4)
    ((8, 16), (32, 4), (1, 127), (3, 10))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    first = max((d for d in range(2, bound + 1) if size % d == 0), default=1)
    return first, size // first


def factored(a: Array, b: Array) -> tuple[Array, ...]:
    """Give the factors of a product, or the product alone where it is cheaper to apply.

    Examples
    --------
    >>> import numpy as np
    >>> column, square = np.ones((9, 1)), np.ones((2, 2))
    >>> len(factored(column, column.T)), len(factored(square, square))
    (2, 1)
    """
    (m, r), n = a.shape, b.shape[1]
    return (a, b) if r * (m + n) < m * n else (a @ b,)


def as_product(w: Array) -> tuple[Array, Array]:
    """Write a matrix as a product of itself and the smaller identity.

    Examples
    --------
    >>> import numpy as np
    >>> as_product(np.asarray([[2.0, 3.0]]))
    (array([[1.]]), array([[2., 3.]]))
    """
    m, n = w.shape
    eye = namespace(w).eye(min(m, n), dtype=w.dtype, device=creation_device(w))
    return (w, eye) if m >= n else (eye, w)


def kron_factors(left: Sequence[Array], right: Sequence[Array]) -> tuple[Array, Array]:
    """Factor a Kronecker product of two matrices by theirs: (u₁·v₁) ⊗ (u₂·v₂).

    Parameters
    ----------
    left, right : sequence of one array or two
        A matrix, or the factors of one.

    Returns
    -------
    array (m·k, r), array (r, p·q)
        r is the product of the factors' inner sizes.

    Examples
    --------
    >>> import numpy as np
    >>> u, v = kron_factors([np.asarray([[2.0]])], [np.asarray([[1.0, 3.0]])])
    >>> u @ v
    array([[2., 6.]])
    """
    (a, b), (c, d) = ((w[0], w[1]) if len(w) > 1 else as_product(w[0]) for w in (left, right))
    return kron(a, c), kron(b, d)


def kron(a: Array, b: Array) -> Array:
    """Kronecker product of two matrices.

    Examples
    --------
    >>> import numpy as np
    >>> kron(np.asarray([[1, 2]]), np.asarray([[1, 10]]))
    array([[ 1, 10,  2, 20]])
    """
    xp, (m, n), (p, q) = namespace(a, b), a.shape, b.shape
    blocks = xp.reshape(a, (m, 1, n, 1)) * xp.reshape(b, (1, p, 1, q))
    return xp.reshape(blocks, (m * p, n * q))


def linear_kron(x: Array, left: Sequence[Array], right: Sequence[Array]) -> Array:
    """Apply a Kronecker product to vectors without forming it: ``x @ kron(left, right)ᵀ``.

    Reshaped to matrices X (p, q), the vectors become left·X·rightᵀ, in the order that
    multiplies less.

    Parameters
    ----------
    x : array (..., p·q)
    left : sequence of arrays
        Factors of a matrix (m, p), the first one outermost.
    right : sequence of arrays
        Factors of a matrix (k, q).

    Returns
    -------
    array (..., m·k)

    Examples
    --------
    >>> import numpy as np
    >>> swap, one = np.asarray([[0.0, 1.0], [1.0, 0.0]]), np.asarray([[1.0]])
    >>> linear_kron(np.asarray([5.0, 6.0]), [swap], [one])
    array([6., 5.])
    """
    xp = namespace(x, *left, *right)
    lead, n = tuple(x.shape[:-1]), prod(x.shape[:-1])
    m, p, k, q = left[0].shape[0], left[-1].shape[1], right[0].shape[0], right[-1].shape[1]
    outer, inner = (sum(prod(w.shape) for w in side) for side in (left, right))

    def on_right(z: Array, rows: int) -> Array:
        z = xp.reshape(z, (n * rows, q))  # one product of matrices, not a stack of small ones
        for w in reversed(right):
            z = z @ xp.matrix_transpose(w)
        z = xp.reshape(z, (n, rows, k))
        return z

    def on_left(z: Array, columns: int) -> Array:
        if columns >= 16:  # below, products so thin cost more than two transpositions
            for w in reversed(left):
                z = w @ z
            return z
        z = xp.reshape(xp.permute_dims(z, (0, 2, 1)), (n * columns, p))
        for w in reversed(left):
            z = z @ xp.matrix_transpose(w)
        z = xp.permute_dims(xp.reshape(z, (n, columns, m)), (0, 2, 1))
        return z

    z = xp.reshape(x, (n, p, q))
    if p * inner + k * outer <= q * outer + m * inner:
        z = on_left(on_right(z, p), k)
    else:
        z = on_right(on_left(z, q), m)
    return xp.reshape(z, (*lead, m * k))
