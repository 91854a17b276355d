"""Frozen random matrices that all sites share, each reading its part of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np

from peft_any._typing import Array, Params, Shape
from peft_any.backend import (
    astype,
    dtype_name,
    from_numpy_like,
    is_lazy,
    is_traced,
    namespace,
    to_numpy,
)
from peft_any.errors import ConfigError
from peft_any.layer import Site
from peft_any.rng import Fresh, TorchGenerator

_ALIKE = 0.02
"""Of an array's norm: bfloat16 rounds by less, and two draws differ by more than all of it."""


def largest(sites: Sequence[Site]) -> tuple[int, int]:
    """Give the most inputs and the most outputs of any site."""
    return max(s.n_in for s in sites), max(s.n_out for s in sites)


def drawn(shapes: Mapping[str, Shape], seed: int, new: Fresh) -> Params:
    """Draw matrices (m, n), one after the other, as torch's generator does: U(±√(6/n)).

    He et al. 2015, https://arxiv.org/abs/1502.01852, with the gain √2.
    """
    stream, found = new.torch(seed), {}
    for name, shape in shapes.items():
        bound = sqrt(3.0) * (sqrt(2.0) / sqrt(shape[1]))  # in torch's order of operations
        found[name] = new.array(stream.uniform(shape, -bound, bound))
    return found


def held(drawn: Params, stored: str) -> Params:
    """Round matrices that were drawn again as HF PEFT does: to half precision, if the base has it.

    Examples
    --------
    >>> import numpy as np
    >>> held({"vera_A": np.asarray([1 + 2.0**-20], "float32")}, "float16")["vera_A"].tolist()
    [1.0]
    """
    if stored not in ("bfloat16", "float16"):
        return drawn
    return {name: astype(astype(a, stored), dtype_name(a)) for name, a in drawn.items()}


def own_part(a: Array, b: Array, site: Site, rows: int, r: int) -> tuple[Array, Array]:
    """Take a site's part of A (rows, most n_in) and B (most n_out, r).

    Returns
    -------
    a : array (rows, n_in)
    b : array (n_out, r)

    Raises
    ------
    ConfigError
        If they are too small, or of another rank.
    """
    missing = a.shape[1] < site.n_in or b.shape[0] < site.n_out
    if missing or a.shape[0] != rows or b.shape[1] != r:
        raise ConfigError(
            f"{site.name}: projections A {tuple(a.shape)} and B {tuple(b.shape)} cannot adapt "
            f"it: A has {rows} rows and at least {site.n_in} columns, B at least {site.n_out} rows "
            f"and r={r} columns"
        )
    a = a if a.shape[1] == site.n_in else a[:, : site.n_in]
    return a, b if b.shape[0] == site.n_out else b[: site.n_out, :]


def random_bases(
    of_a: Shape, of_b: Shape, seed: int, among: float | None, new: Fresh
) -> tuple[Any, Any]:
    """Draw RandLoRA's bases, each divided by its standard deviation.

    Parameters
    ----------
    of_a, of_b : shape
        (r, 1, d) and (D, q, r).
    seed : int
    among : float, optional
        Entries are −1 or 1, one in 2·`among` of each, and else 0 (Achlioptas 2003,
        https://doi.org/10.1016/S0022-0000(03)00025-4); without, uniform in bfloat16, as torch
        draws them where the machine has it.
    """
    stream = new.torch(seed)
    if among is None:
        a = _uniform(stream, of_a)
        size, count, r = of_b
        b = np.concatenate([_uniform(stream, (size, 1, r)) for _ in range(count)], axis=1)
    else:
        a, b = (_ternary(stream.random(shape), 1 / (2 * among)) for shape in (of_a, of_b))
    return new.array(_normalised(a)), new.array(_normalised(b))


def _uniform(stream: TorchGenerator, shape: Shape) -> Any:
    bound = sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(shape[1] * shape[2]))
    return stream.uniform(shape, -bound, bound, "bfloat16")


def _ternary(host: Any, share: float) -> Any:
    return ((host > 1 - share) * 1.0 - (host < share) * 1.0).astype(host.dtype)


def _normalised(host: Any) -> Any:
    """Divide by the standard deviation, rounded to the dtype before and after."""
    spread = astype(np.std(host.astype(np.float64), ddof=1), host.dtype.name)
    wide = host.astype(np.float32) / np.float32(spread)
    return astype(astype(wide, host.dtype.name), "float32")


def leading_pair(w: Any, r: int, dtype: str) -> tuple[Any, Any]:
    """Give √S·Vᵀ (r, n) and U·√S (m, r) of a matrix's r largest singular values, in a dtype.

    Each of U, S and V is rounded to it first, as HF PEFT does.
    """
    u, s, v = (astype(a, dtype) for a in np.linalg.svd(w, full_matrices=False))
    root = np.sqrt(s[:r])
    return root[:, None] * v[:r], u[:, :r] * root


@lru_cache(maxsize=1024)
def normal_projection(shape: Shape, seed: int) -> Any:
    """Draw TinyLoRA's projection (u, r, r), normal of variance 1/r, as torch's generator does."""
    return TorchGenerator(seed).normal(shape) * np.float32(shape[1] ** -0.5)


def place_of(array: Array, draw: Callable[[int], Any], order: Sequence[int], name: str) -> Array:
    """Tell which of some draws an array is, as far as torch's builds agree, and dtypes round.

    Parameters
    ----------
    array : array
    draw : callable
        Gives one of them, on the host, by its number.
    order : sequence of int
        Their numbers, the likeliest first.
    name : str
        What errors begin with.

    Returns
    -------
    array of integers (1,)

    Raises
    ------
    ConfigError
        If it is none of them, where that can be seen.
    """
    place: Array
    if is_lazy(array) or is_traced(array):
        every = from_numpy_like(np.stack([draw(i) for i in sorted(order)]), array)
        xp = namespace(array)
        gaps = xp.sum((astype(every, dtype_name(array)) - array) ** 2, axis=(1, 2, 3))
        place = xp.reshape(xp.argmin(gaps), (1,))
        return place
    host = to_numpy(array).astype("float64")
    found = next((i for i in order if _norm(host - draw(i)) <= _ALIKE * _norm(host)), None)
    if found is None:
        raise ConfigError(
            f"{name}: was not drawn for any of the adapted layers: projection_seed is another, or "
            "layers are missing; convert the adapter where it was made (convert_to_lora)"
        )
    place = from_numpy_like(np.asarray([found]), array)
    return place


def _norm(host: Any) -> float:
    return float(np.linalg.norm(host.reshape(-1)))


@lru_cache(maxsize=2)
def even_places(count: int, d: int, seed: int) -> tuple[Any, Any]:
    """Share a vector's d entries out, each as often as any other or once more.

    Parameters
    ----------
    count, d, seed : int
        `seed` is that of NumPy's generator.

    Returns
    -------
    places : array of int64 (count,)
    scales : array of float32 (d,)
        1/√c of the c places of each entry, 1 where there is none.

    Examples
    --------
    >>> places, scales = even_places(5, 2, seed=0)
    >>> np.bincount(places).tolist(), (1 / scales**2).round().tolist()
    ([2, 3], [2.0, 3.0])
    """
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(d), count // d)
    if count % d:
        places = np.concatenate([places, rng.choice(d, size=count % d, replace=False)])
    rng.shuffle(places)
    uses = np.maximum(np.bincount(places, minlength=d), 1).astype(np.float32)
    return places, np.float32(1) / np.sqrt(uses)
