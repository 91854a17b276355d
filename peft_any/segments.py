"""AdaMSS's segments, found again: the rows of a base, parted by its leading directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_any._typing import Array
from peft_any.backend import astype, to_numpy
from peft_any.clusters import clearly_grouped
from peft_any.decompositions import seeded_svd
from peft_any.errors import ConfigError
from peft_any.layer import Dense, widen
from peft_any.rng import Fresh

_STEP = 4e-7
"""A few roundings of single precision."""
_OUT = (
    "merge it with Hugging Face PEFT (merge_and_unload), on the machine that wrote it; "
    "`peft-any extract` makes a LoRA of that"
)


def places(labels: Any) -> Any:
    """Give each row's place when the segments stand one below the other.

    Examples
    --------
    >>> places(np.asarray([1, 0, 1])).tolist()
    [1, 0, 2]
    """
    return np.argsort(np.argsort(labels, kind="stable")).astype(np.int32)


def beside_bias(base: Dense) -> Any:
    """Give [W b] on the host, or W where the layer has no bias."""
    (_,), base = widen([{}], base)
    w = to_numpy(base.weight)
    if not base.site.bias:
        return w
    shift = np.zeros(len(w)) if base.bias is None else to_numpy(base.bias)
    return np.concatenate([w, shift.astype(w.dtype)[:, None]], axis=1)


def segments(v: Array, sizes: Sequence[int], seed: int, new: Fresh) -> Any:
    """Find the segment of each row as the writer of a file did, or refuse.

    Whoever writes a file decomposes the base in single precision. So it is decomposed here in
    single and in double precision, and by how much these differ tells what rounding may do.

    Parameters
    ----------
    v : array (r, n)
        The file's directions.
    sizes : sequence of int
        Of the file's segments.
    seed : int
        Of torch's generator.
    new : Fresh
        The layer's, with its base.

    Returns
    -------
    array of int (m,)

    Raises
    ------
    ConfigError
        If the file's directions or segments are others, or rounding decides about a row.
    """
    name = new.key
    single = beside_bias(new.base_for(name, "adamss_newB")).astype(np.float32)
    (u, _, own), (rough, _, near) = (
        seeded_svd(single.astype(dtype), v.shape[0], 2, seed, new)
        for dtype in (np.float64, np.float32)
    )
    told = to_numpy(astype(v, "float64"))
    if not _outside(told, own) <= 16 * _outside(near, own) + _STEP:
        raise _refusal(name, "its directions are not, to single precision, those of this base")
    labels, allowed = clearly_grouped(u, len(sizes))
    left, _, right = np.linalg.svd(rough.astype(np.float64).T @ u)
    moved = np.linalg.norm(u - rough @ (left @ right), axis=1).max()
    reach = np.linalg.norm(u, axis=1).max() * _STEP
    if not 2 * moved + reach < allowed:
        raise _refusal(name, "rounding alone decides to which segment some rows belong")
    if np.bincount(labels, minlength=len(sizes)).tolist() != list(sizes):
        raise _refusal(name, "its segments have other sizes than those of this base")
    return labels


def _outside(rows: Any, basis: Any) -> float:
    """Measure how far orthonormal rows lie outside the span of others, at most."""
    rows = rows.astype(np.float64)
    return float(np.linalg.norm(rows - (rows @ basis.T) @ basis, axis=1).max())


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"{name}: the rows of AdaMSS's segments cannot be told: {why}: {_OUT}")
