"""Factors that adapters start from: leading singular triplets, QR, pairs without a product."""

from __future__ import annotations

from typing import Any

from peft_any._typing import Array
from peft_any.backend import astype, compute_dtype, namespace, to_numpy
from peft_any.layer import Site
from peft_any.rng import Fresh


def leading_svd(
    w: Array, r: int, sketch: Array | None = None, sweeps: int = 0
) -> tuple[Array, ...]:
    """Find the leading singular triplets of a matrix.

    Parameters
    ----------
    w : array (m, n)
    r : int
        How many triplets.
    sketch : array (n, k), k ≥ r, optional
        Random directions: the triplets are then those of the randomised range finder with
        `sweeps` power iterations (Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061,
        algorithm 4.4) instead of the full decomposition's.

    Returns
    -------
    u (m, r), s (r,), vt (r, n)
        Signs are those of the library.

    Examples
    --------
    >>> import numpy as np
    >>> leading_svd(np.diag(np.asarray([3.0, 2.0, 1.0])), 2)[1]
    array([3., 2.])
    """
    xp = namespace(w, sketch)
    q = None
    if sketch is not None:
        q = xp.linalg.qr(w @ sketch)[0]
        for _ in range(sweeps):
            q = xp.linalg.qr(xp.matrix_transpose(w) @ q)[0]
            q = xp.linalg.qr(w @ q)[0]
    core = w if q is None else xp.matrix_transpose(q) @ w
    u, s, vt = xp.linalg.svd(core, full_matrices=False)
    u = u[:, :r]
    return (u if q is None else q @ u), s[:r], vt[:r, :]


def seeded_svd(w: Any, r: int, sweeps: int, seed: int, new: Fresh) -> tuple[Any, ...]:
    """Find a matrix's leading singular triplets as ``torch.svd_lowrank`` does, on the host.

    Parameters
    ----------
    w : host array (m, n)
    r, sweeps : int
        How many triplets, and how many power iterations.
    seed : int
        Of torch's generator, which draws the sketch.
    new : Fresh

    Returns
    -------
    u (m, r), s (r,), vt (r, n)
        torch's up to signs and rounding.
    """
    flip = namespace(w).matrix_transpose
    wide = w.shape[0] < w.shape[1]
    tall = flip(w) if wide else w
    sketch = new.torch(seed).normal((tall.shape[1], r)).astype(w.dtype)
    u, s, vt = leading_svd(tall, r, sketch, sweeps)
    return (flip(vt), s, flip(u)) if wide else (u, s, vt)


def starting_factors(
    how: str, w: Array, r: int, scale: float, sketch: Array | None = None
) -> tuple[Array, Array]:
    """Factor the leading part of a matrix as ``scale · b @ a``, for a LoRA to start from.

    Parameters
    ----------
    how : {"olora", "pissa", "pissa_niter_k"}
        The first r columns and rows of the QR factors (whose product is not scaled), or the
        leading singular triplets, found with k power iterations on `sketch`.
    w : array (m, n)
    r : int
        Rank, at most min(m, n).
    scale : float
        What the product will be multiplied with.
    sketch : array (n, k), optional
        As in `leading_svd`.

    Returns
    -------
    a (r, n), b (m, r)

    Examples
    --------
    >>> import numpy as np
    >>> a, b = starting_factors("pissa", np.diag(np.asarray([4.0, 1.0])), 1, 2.0)
    >>> np.allclose(2.0 * b @ a, [[4, 0], [0, 0]])
    True
    """
    xp = namespace(w)
    if how == "olora":
        q, upper = xp.linalg.qr(w)
        return upper[:r, :], q[:, :r]
    if how == "pissa":
        u, s, vt = leading_svd(w, r)
    else:
        u, s, vt = leading_svd(w, r, sketch, sweeps=int(how.rsplit("_", 1)[1]))
    root = xp.sqrt(s / scale)
    return root[:, None] * vt, u * root


def annihilating_factors(q: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Make a (r, n) and b (m, r) with b·a = 0, neither zero.

    Parameters
    ----------
    q : array (r, r), r even
        Its QR factor's even and odd rows span the two orthogonal halves.
    x : array (n, r/2)
    y : array (m, r/2)

    Examples
    --------
    >>> import numpy as np
    >>> draw = np.random.default_rng(0).standard_normal
    >>> a, b = annihilating_factors(draw((4, 4)), draw((6, 2)), draw((5, 2)))
    >>> bool(np.max(np.abs(b @ a)) < 1e-15)
    True
    """
    xp = namespace(q, x, y)
    basis = xp.linalg.qr(q)[0]
    return xp.matrix_transpose(x @ basis[1::2, :]) / 10, y @ basis[0::2, :] / 10


def host_weight(new: Fresh, site: Site, why: str) -> Any:
    """Take the base's weight, which `why` needs, to the host, in no half precision."""
    base = new.base_for(site.name, why).weight
    return to_numpy(astype(base, compute_dtype(base)))
