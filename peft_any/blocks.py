"""Block-diagonal rotations: made of skew-symmetric blocks, multiplied, fused."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from peft_any._typing import Array
from peft_any.backend import by_blocks, creation_device, detach, in_memory, inv, namespace
from peft_any.layer import linear


def skew(v: Array, b: int) -> Array:
    """Make skew-symmetric blocks of their upper triangles, read row by row.

    Parameters
    ----------
    v : array (k, b·(b − 1)/2)
    b : int
        The blocks' size.

    Returns
    -------
    array (k, b, b)

    Examples
    --------
    >>> import numpy as np
    >>> skew(np.asarray([[5.0]]), 2)
    array([[[ 0.,  5.],
            [-5.,  0.]]])
    """
    xp, device = namespace(v), creation_device(v)
    if b == 1:
        return xp.zeros((v.shape[0], 1, 1), dtype=v.dtype, device=device)
    row = xp.reshape(xp.arange(b, device=device), (b, 1))
    column = xp.reshape(row, (1, b))
    above, below = row < column, column < row
    low, high = xp.where(above, row, column), xp.where(above, column, row)
    place = xp.where(above | below, low * (2 * b - low - 1) // 2 + high - low - 1, 0)
    values = xp.reshape(xp.take(v, xp.reshape(place, (b * b,)), axis=1), (v.shape[0], b, b))
    return values * (xp.astype(above, v.dtype) - xp.astype(below, v.dtype))


def drawn_back(v: Array, bound: float, *, constant: bool = True) -> Array:
    """Shorten the rows longer than a bound to it.

    Parameters
    ----------
    v : array (k, n)
    bound : float
    constant : bool
        Whether gradients take the factors as constants.

    Returns
    -------
    array (k, n)

    Examples
    --------
    >>> import numpy as np
    >>> drawn_back(np.asarray([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    array([[0.6, 0.8],
           [0.3, 0.4]])
    """
    xp, fixed = namespace(v), detach(v) if constant else v
    square = xp.sum(fixed * fixed, axis=1, keepdims=True) / bound**2
    return v / xp.sqrt(xp.where(square > 1.0, square, xp.ones_like(square)))


def inverse(a: Array) -> Array:
    """Invert matrices whose symmetric part is positive definite, by halves (Schur complement).

    Products of stacks are many times faster than factorisations. No half needs a pivot: the
    corner and its complement have positive definite symmetric parts again. For I + q, q skew,
    the error is of the order ε·(1 + ‖q‖²).

    Parameters
    ----------
    a : array (k, b, b)

    Returns
    -------
    array (k, b, b)

    Examples
    --------
    >>> import numpy as np
    >>> inverse(np.asarray([[[1.0, 1.0], [-1.0, 1.0]]]))
    array([[[ 0.5, -0.5],
            [ 0.5,  0.5]]])
    """
    xp, h = namespace(a), a.shape[-1] // 2
    if h <= 8:  # smaller halves gain little, and take long to compile
        return inv(a)
    corner, left = inverse(a[:, :h, :h]), a[:, h:, :h]
    above = corner @ a[:, :h, h:]
    rest = inverse(a[:, h:, h:] - left @ above)
    beside = -rest @ (left @ corner)
    upper = xp.concat([corner - above @ beside, -above @ rest], axis=2)
    return xp.concat([upper, xp.concat([beside, rest], axis=2)], axis=1)


def cayley(q: Array) -> Array:
    """Rotations (I − q)·(I + q)⁻¹ of skew-symmetric blocks q (k, b, b).

    Cayley 1846, https://doi.org/10.1515/crll.1846.32.119.

    Examples
    --------
    >>> import numpy as np
    >>> cayley(np.asarray([[[0.0, 1.0], [-1.0, 0.0]]]))
    array([[[ 0., -1.],
            [ 1.,  0.]]])
    """
    eye = namespace(q).eye(q.shape[-1], dtype=q.dtype, device=creation_device(q))
    return 2.0 * inverse(eye + q) - eye


def cayley_neumann(q: Array, terms: int) -> Array:
    """Near-rotations I + 2·(q + … + q^(K−2)) + q^(K−1) of skew-symmetric blocks q (k, b, b).

    The Neumann series of (I + q)·(I − q)⁻¹, cut (Qiu et al. 2025, https://arxiv.org/abs/2506.19847):
    it turns the other way than `cayley`.

    Parameters
    ----------
    q : array (k, b, b)
    terms : int
        K; 3 counts as 4, and less than 1 as 1, as Hugging Face PEFT computes them.

    Examples
    --------
    >>> import numpy as np
    >>> cayley_neumann(np.asarray([[[0.0, 0.5], [-0.5, 0.0]]]), 2)
    array([[[ 1.,  1.],
            [-1.,  1.]]])
    """
    xp = namespace(q)
    eye = xp.eye(q.shape[-1], dtype=q.dtype, device=creation_device(q))
    r: Array
    if terms < 2:
        r = xp.broadcast_to(eye, q.shape)
    elif terms == 2:
        r = eye + 2.0 * q
    else:
        r = eye + q  # and then (I + q)·(I + q + … + q^(K−2)), by Horner's rule
        for _ in range(max(terms, 4) - 3):
            r = eye + q @ r
        r = r + q @ r
    return r


def block_matmul(x: Array, r: Array, apart: int = 1, run: int = 1, *, rows: bool = False) -> Array:
    """Multiply vectors by a block-diagonal matrix: ``x @ blockdiag(r₀, r₁, …)``.

    With `apart` > 1 a block takes runs of `run` consecutive entries that lie `apart` runs from
    one another, and its neighbours the runs between.

    Parameters
    ----------
    x : array (..., n)
    r : array (n/b, b, b), or (1, b, b) for n/b equal blocks
    apart, run : int
        Only for n/b blocks; `apart` divides their number, `run` divides b.
    rows : bool
        Lay the result out by rows. By default it is a transposed view, which is quicker to make
        and as quick to multiply.

    Returns
    -------
    array (..., n)

    Examples
    --------
    >>> import numpy as np
    >>> swap = np.asarray([[[0.0, 1.0], [1.0, 0.0]]] * 2)
    >>> block_matmul(np.asarray([1.0, 2.0, 3.0, 4.0]), swap)
    array([2., 1., 4., 3.])
    >>> block_matmul(np.asarray([1.0, 2.0, 3.0, 4.0]), swap, 2, 1)
    array([3., 4., 1., 2.])
    """
    xp, shape, n, b = namespace(x, r), tuple(x.shape), x.shape[-1], r.shape[-1]
    count, high = prod(shape[:-1]), n // (b * apart)
    if r.shape[0] == 1:
        y = xp.reshape(x, (count * (n // b), b)) @ r[0, ...]
    elif rows:
        if apart == 1 and in_memory(x, r):
            try:
                return xp.reshape(by_blocks(xp.reshape(x, (count, n)), r), shape)
            except RuntimeError:  # torch's, under a transformation
                pass
        y = xp.reshape(x, (count, high, b // run, apart, run))
        y = xp.reshape(xp.permute_dims(y, (1, 3, 0, 2, 4)), (n // b, count, b)) @ r
        y = xp.reshape(y, (high, apart, count, b // run, run))
        y = xp.permute_dims(y, (2, 0, 3, 1, 4))
    else:
        y = xp.matrix_transpose(xp.reshape(x, (count, n)))
        if apart > 1:
            y = xp.reshape(y, (high, b // run, apart, run, count))
            y = xp.permute_dims(y, (0, 2, 1, 3, 4))
        y = xp.matrix_transpose(r) @ xp.reshape(y, (n // b, b, count))
        if apart > 1:
            y = xp.reshape(y, (high, apart, b // run, run, count))
            y = xp.permute_dims(y, (0, 2, 1, 3, 4))
        y = xp.matrix_transpose(xp.reshape(y, (n, count)))
    return xp.reshape(y, shape)


def butterfly(r: Array, limit: int = 256) -> list[tuple[Array, int, int]]:
    """Fuse the factors of a block butterfly into as few block-diagonal ones as is cheap.

    Factor i acts on pairs of runs of b/2 entries that lie 2ⁱ runs apart (Liu et al. 2023,
    https://arxiv.org/abs/2311.06243, section 4); consecutive factors up to i − 1 and i multiply
    to blocks of twice the size, without forming a permutation.

    Parameters
    ----------
    r : array (m, k, b, b)
        Blocks of the m factors, of which the first acts first on a column.
    limit : int
        Blocks are fused up to this size.

    Returns
    -------
    list of (array (n/b′, b′, b′), int, int)
        Blocks, `apart` and `run` for `block_matmul`; the first acts first on a column.

    Examples
    --------
    >>> import numpy as np
    >>> [(blocks.shape, *lie) for blocks, *lie in butterfly(np.ones((3, 8, 4, 4)), 8)]
    [((4, 8, 8), 1, 2), ((8, 4, 4), 4, 2)]
    """
    xp, (m, k, b, _) = namespace(r), r.shape
    fused: list[tuple[Array, int]] = []
    c = b // 2
    for i in range(m):
        step: Array = r[i, ...]
        if not fused or 2 * fused[-1][0].shape[-1] > limit:
            fused.append((step, 2**i))
            continue
        blocks, apart = fused.pop()
        high, half = k >> i, blocks.shape[-1]
        mid = 2**i // apart
        # Axes: segment, run within `apart`, half of the block, pair of runs, row, column.
        step = xp.permute_dims(xp.reshape(step, (high, mid, apart, b, 2, c)), (0, 2, 4, 1, 3, 5))
        blocks = xp.reshape(blocks, (high, 2, apart, mid, c, half))
        blocks = step @ xp.permute_dims(blocks, (0, 2, 1, 3, 4, 5))
        blocks = xp.reshape(blocks, (high, apart, 2, mid, 2, c, half))
        blocks = xp.permute_dims(blocks, (0, 1, 4, 3, 5, 2, 6))
        fused.append((xp.reshape(blocks, (high * apart, 2 * half, 2 * half)), apart))
    return [(blocks, apart, c if m > 1 else 1) for blocks, apart in fused]


def diagonal(blocks: Sequence[Array]) -> Array:
    """Put blocks (mᵢ, nᵢ) along the diagonal of (Σmᵢ, Σnᵢ).

    Examples
    --------
    >>> import numpy as np
    >>> diagonal([np.asarray([[1], [2]]), np.asarray([[3, 4]])])
    array([[1, 0, 0],
           [2, 0, 0],
           [0, 3, 4]])
    """
    xp, rows = namespace(*blocks), []
    for i, block in enumerate(blocks):
        like = {"dtype": block.dtype, "device": creation_device(block)}
        parts = [
            block if j == i else xp.zeros((block.shape[0], other.shape[1]), **like)
            for j, other in enumerate(blocks)
        ]
        rows.append(xp.concat(parts, axis=1))
    return xp.concat(rows, axis=0)


def block_diagonal(w: Array, k: int) -> Array:
    """Put k blocks (m/k, n), which stand one above the other, along the diagonal of (m, k·n).

    Examples
    --------
    >>> import numpy as np
    >>> block_diagonal(np.asarray([[1, 2], [3, 4]]), 2)
    array([[1, 2, 0, 0],
           [0, 0, 3, 4]])
    """
    m = w.shape[0] // k
    return diagonal([w[i * m : (i + 1) * m, :] for i in range(k)])


def block_linear(x: Array, w: Array, k: int) -> Array:
    """Multiply x (..., k·n) by `block_diagonal(w, k)`, block by block."""
    n, m = x.shape[-1] // k, w.shape[0] // k
    parts = [linear(x[..., i * n : (i + 1) * n], w[i * m : (i + 1) * m, :]) for i in range(k)]
    return namespace(x).concat(parts, axis=-1)
