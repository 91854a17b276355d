"""Bases that layers of one role share: FRoD's decomposition of all of them together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from peft_any._typing import Array
from peft_any.backend import (
    astype,
    compute_dtype,
    creation_device,
    from_numpy_like,
    inv,
    is_lazy,
    namespace,
    to_numpy,
    widest,
)
from peft_any.errors import BackendError, ShapeError
from peft_any.layer import Site
from peft_any.rng import TorchGenerator
from peft_any.spectra import scattered

SHARED = "frod_V", "frod_s_indices", "frod_s_size"
"""What layers of one role share."""


def named(role: str) -> list[str]:
    """Name what the layers of a role share.

    Examples
    --------
    >>> named("fc")
    ['frod_V.fc', 'frod_s_indices.fc', 'frod_s_size.fc']
    """
    return [f"{name}.{role}" for name in SHARED]


def role_of(name: str) -> str:
    """Say whose basis a layer has, by its name: Hugging Face PEFT's rule.

    Examples
    --------
    >>> role_of("layers.0.self_attn.q_proj"), role_of("h.3.fc"), role_of("attention.output.dense")
    ('self_attn_q_proj', 'fc', 'attention_output')
    """
    parts = name.split(".")[-3:]
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    role = "_".join(parts[-2:])
    return "attention_output" if (parts[0], role) == ("attention", "output_dense") else role


def by_role(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Gather the layers that share a basis, in the order of their roles.

    Raises
    ------
    ShapeError
        If some of one role have other inputs.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        own = found.setdefault(role_of(site.name), [])
        own.append(site)
        if own[0].n_in != site.n_in:
            raise ShapeError(
                f"{site.name}: {site.n_in} inputs cannot share a basis with the "
                f"{own[0].n_in} of {own[0].name}: FRoD takes layers with equal last parts of "
                "their names for one role: leave one of them out of target_modules"
            )
    return dict(sorted(found.items()))


def joint_basis(weights: Iterable[Array], ridge: float) -> Any:
    """Find FRoD's basis of the inputs of several layers, in single precision as HF PEFT does.

    Hierarchical joint decomposition: with W₁, W₂, … = Q₁·R, Q₂·R, …, V = Rᵀ·E of the eigenvectors
    E of Σ (QᵢᵀQᵢ + ridge·I)⁻¹; with fewer rows than columns, the right singular vectors.

    Parameters
    ----------
    weights : iterable of array (m, n)
    ridge : float

    Returns
    -------
    array (n, n), on the host

    Examples
    --------
    >>> v = joint_basis([np.eye(3), np.ones((2, 3))], 1e-3)
    >>> bool(np.linalg.cond(v) < 10)
    True
    """
    parts = [to_numpy(astype(w, "float32")) for w in weights]
    every = np.concatenate(parts)
    if every.shape[0] < every.shape[1]:
        return np.linalg.svd(every, full_matrices=True)[2].T
    q, r = np.linalg.qr(every)
    blocks = np.split(q, np.cumsum([len(part) for part in parts])[:-1])
    eye = np.float32(ridge) * np.eye(len(r), dtype=np.float32)
    total = sum(np.linalg.inv(block.T @ block + eye) for block in blocks)
    return r.T @ np.linalg.eigh(total)[1]


def off_diagonal_places(stream: TorchGenerator, n: int, count: int) -> Any:
    """Draw places off the diagonal of a matrix (n, n), each once: rows and columns (2, count).

    Examples
    --------
    >>> off_diagonal_places(TorchGenerator(0), 2, 2).tolist()
    [[0, 1], [1, 0]]
    """
    rows, columns = np.divmod(stream.randperm(n * (n - 1), count), max(n - 1, 1))
    return np.stack([rows, columns + (columns >= rows)])


def spread(w: Array, v: Array) -> tuple[Array, Array]:
    """Solve w = U·diag(s)·vᵀ for U with columns of length 1, and s ≥ 0, in double precision.

    On the host, but for arrays whose values are not known yet.

    Parameters
    ----------
    w : array (m, n)
    v : array (n, n)

    Returns
    -------
    u : array (m, n)
    s : array (n,)
        Both in the compute dtype of `w` and `v`.

    Examples
    --------
    >>> spread(np.asarray([[0.0, 6.0]]), np.diag([1.0, 2.0]))
    (array([[0., 1.]]), array([0., 3.]))
    """
    name = compute_dtype(w, v)
    try:
        known = None if is_lazy(w) else (to_numpy(w), to_numpy(v))
    except BackendError:
        known = None
    if known is None:
        across = widest(w) @ namespace(v).matrix_transpose(inv(widest(v)))
        u, size = _unit_columns(across)
    else:
        u, size = (from_numpy_like(a, w) for a in _unit_columns(_solved(*known)))
    return astype(u, name), astype(size, name)


def _solved(w: Any, v: Any) -> Any:
    """Give w·v⁻ᵀ, or the nearest to it where there is no inverse, as HF PEFT does."""
    w, v = w.astype("float64"), v.astype("float64")
    try:
        return np.linalg.solve(v, w.T).T
    except np.linalg.LinAlgError:
        return w @ np.linalg.pinv(v, 1e-6).T


def _unit_columns(a: Array) -> tuple[Array, Array]:
    """Give a matrix with columns of length 1, or 0, and their lengths."""
    xp = namespace(a)
    size = xp.sqrt(xp.sum(a * a, axis=0))
    whole = size > 1e-12  # HF's bound
    return xp.where(whole, a / xp.where(whole, size, xp.ones_like(size)), xp.zeros_like(a)), size


def with_diagonal(values: Array, places: Array, diagonal: Array) -> Array:
    """Form a matrix (n, n) of its diagonal (n,), and values (k,) at places (2, k) beside it.

    Examples
    --------
    >>> with_diagonal(np.asarray([5.0]), np.asarray([[0], [1]]), np.asarray([1.0, 2.0]))
    array([[1., 5.],
           [0., 2.]])
    """
    xp, index, n = namespace(values, diagonal), namespace(places), diagonal.shape[0]
    steps = (n + 1) * index.arange(n, dtype=places.dtype, device=creation_device(places))
    at = index.concat([places[0, :] * n + places[1, :], steps])
    flat = scattered(xp.concat([values, diagonal]), at, n * n)
    return xp.reshape(flat, (n, n))
