"""Frozen random matrices that all sites share, each reading its part of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from peft_any._typing import Array, Params, Shape
from peft_any.errors import ConfigError
from peft_any.layer import Site
from peft_any.rng import Fresh


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
    return a[:, : site.n_in], b[: site.n_out, :]
