"""One fused layer against its parts: the parameters of q, k and v from those of qkv, and back.

The rows of a fused weight are those of its parts: one part after the other, or, where heads are
interleaved, in equal groups, each of which holds its share of every part. A method is `separable`
if each row of the merged weight depends on no other row: then a part's parameters are rows of the
fused ones, and what has no rows is the same for all parts. Factors of rank r fuse to rank Σr, with
the parts' B along a diagonal: [B₁·A₁; B₂·A₂] = diag(B₁, B₂)·[A₁; A₂], exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from peft_any._typing import Array, Params
from peft_any.backend import astype, compute_dtype, creation_device, dtype_name, namespace, to_numpy
from peft_any.errors import ConfigError, PeftError, ShapeError
from peft_any.layer import Site
from peft_any.method import Additive, Tuner


@dataclass(frozen=True)
class Pieces:
    """How a fused layer is made of parts.

    Attributes
    ----------
    names : tuple of str
        The parts' modules, in the order of their rows.
    sizes : tuple of int
        Rows of each.
    groups : int
        Into how many equal groups the fused rows are ordered; 1 for one part after the other.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    def check(self, whole: str, rows: int | None = None) -> None:
        """Refuse sizes that do not divide, or do not make up the whole.

        Raises
        ------
        ShapeError
        """
        if any(size < 1 or size % self.groups for size in self.sizes):
            raise ShapeError(
                f"{whole}: parts of {', '.join(map(str, self.sizes))} rows cannot lie in "
                f"{self.groups} equal groups"
            )
        if rows is not None and sum(self.sizes) != rows:
            raise ShapeError(
                f"{whole}: has {rows} rows, and its parts {' + '.join(map(str, self.sizes))}: they "
                "cannot be the same layer"
            )

    def cut(self, whole: Array) -> list[Array]:
        """Take the parts (nᵢ, …) out of a fused array (Σn, …).

        Examples
        --------
        >>> import numpy as np
        >>> [*map(str, Pieces(("k", "v"), (2, 2), groups=2).cut(np.asarray([0, 1, 2, 3])))]
        ['[0 2]', '[1 3]']
        """
        xp, tail, each = namespace(whole), tuple(whole.shape[1:]), self._each
        table = xp.reshape(whole, (self.groups, sum(each), *tail))
        ends = [*accumulate(each)]
        runs = [table[:, end - size : end, ...] for end, size in zip(ends, each, strict=True)]
        return [xp.reshape(r, (n, *tail)) for r, n in zip(runs, self.sizes, strict=True)]

    def join(self, parts: Sequence[Array]) -> Array:
        """Make a fused array of its parts: the inverse of `cut`."""
        xp, tail = namespace(*parts), tuple(parts[0].shape[1:])
        pairs = zip(parts, self._each, strict=True)
        table = xp.concat([xp.reshape(a, (self.groups, n, *tail)) for a, n in pairs], axis=1)
        return xp.reshape(table, (sum(self.sizes), *tail))

    @property
    def _each(self) -> list[int]:
        return [size // self.groups for size in self.sizes]


class Own(NamedTuple):
    """One layer's configuration, resolved for it, its site and its parameters."""

    config: Tuner
    site: Site
    params: Params


def own(config: Tuner, name: str, params: Params, rows: int | None = None) -> Own:
    """Find the sizes of the linear layer that parameters belong to.

    Parameters
    ----------
    config : Tuner
    name : str
    params : dict of arrays
    rows : int, optional
        Its outputs, where they are known.

    Raises
    ------
    ConfigError
        If the method's rows depend on one another.
    ShapeError
        If no layer has such parameters.
    """
    if not config.separable:
        raise ConfigError(
            f"{name}: {config.peft_type} cannot be split or fused: its ΔW is not made row by row; "
            "merge it into a base of the same layers"
        )
    shapes = {k: tuple(a.shape) for k, a in params.items()}
    for site in _sites(config, name, shapes.values(), rows):
        try:
            found = config.at(site)
            if found.shapes(site) == shapes:
                return Own(found, site, params)
        except PeftError:
            continue
    asked = "" if rows is None else f" of {rows} outputs"
    said = ", ".join(f"{k} {shape}" for k, shape in shapes.items())
    raise ShapeError(f"{name}: {said}: no linear layer{asked} has such {config.where} parameters")


def _sites(config: Tuner, name: str, shapes: Any, rows: int | None) -> Iterator[Site]:
    """Make linear layers of all sizes that parameters of these shapes may belong to."""
    sizes = sorted({n for shape in shapes for n in shape if n}, reverse=True)
    # A skew matrix (b, b) is stored as its b·(b − 1)/2 entries; k blocks of b make k·b inputs.
    roots = [round((2 * n) ** 0.5 + 0.5) for n in sizes]
    counts = {n for n in (*sizes, *vars(config).values()) if type(n) is int and n > 0}
    inputs = dict.fromkeys([*sizes, *roots, *(m * n for m in counts for n in (*sizes, *roots))])
    for n_out in sizes if rows is None else [rows]:
        for n_in in inputs:
            yield Site(name, n_in, n_out)


def parted(one: Own, pieces: Pieces) -> list[Params]:
    """Take the parts' parameters out of a fused layer's."""
    parts: list[Params] = [{} for _ in pieces.names]
    known = roles(one)
    for key, array in one.params.items():
        each = pieces.cut(array) if known[key].rows else [array] * len(parts)
        for part, piece in zip(parts, each, strict=True):
            part[key] = piece
    return parts


def fuse(whole: str, parts: Sequence[Own | None], pieces: Pieces) -> tuple[Tuner, Params]:
    """Make a fused layer's parameters of its parts'; None stands for a part without an adapter.

    Returns
    -------
    config : Tuner
        Resolved for the fused layer: of rank Σr, and of the parts' common scale.
    params : dict of arrays

    Raises
    ------
    ConfigError
        If the fused layer cannot have the parts' parameters.
    """
    given = [one for one in parts if one is not None]
    config, known = given[0].config, roles(given[0])
    if any(roles(one) != known for one in given):
        names = ", ".join(one.site.name for one in given)
        raise ConfigError(f"{whole}: {names} cannot be fused: they are adapted in different ways")
    if any(role.rank for role in known.values()):
        config, factors = _stacked(whole, given)
    else:
        factors = [1.0] * len(given)
    scales = iter(factors)
    scaled = [None if one is None else _scaled(one, known, next(scales)) for one in parts]
    params = {key: _fused(whole, key, role, scaled, pieces) for key, role in known.items()}
    return config, params


class Role(NamedTuple):
    """Whether a parameter grows with the layer's outputs, along its first axis, and with r."""

    rows: bool
    rank: bool


def roles(one: Own) -> dict[str, Role]:
    """Tell what each parameter grows with."""
    config: Any = one.config
    tall = replace(one.site, n_out=2 * one.site.n_out)
    shapes, taller = config.shapes(one.site), config.shapes(tall)
    ranked = hasattr(config, "rank_pattern")
    wider = replace(config, r=2 * config.r).shapes(tall) if ranked else taller
    return {k: Role(taller[k] != s, wider[k] != taller[k]) for k, s in shapes.items()}


def _stacked(whole: str, given: Sequence[Own]) -> tuple[Tuner, list[float]]:
    """Give the configuration of the stacked factors, and what each part's must be scaled by."""
    configs: list[Any] = [one.config for one in given]
    config, rank = configs[0], sum(its.r for its in configs)
    alpha = "lora_alpha" if hasattr(config, "lora_alpha") else "alpha"
    unit = replace(config, r=rank, **{alpha: 1.0}).scaling
    if unit == replace(config, r=2 * rank, **{alpha: 1.0}).scaling:
        raise ConfigError(
            f"{whole}: {config.peft_type} layers cannot be fused: their scale does not follow the "
            "rank; merge into a base of the same layers"
        )
    scales = [its.scaling for its in configs]
    factors = [1.0 if s == scales[0] else s / scales[0] for s in scales]
    if len({*scales}) > 1 and config.changes_bias(given[0].site):
        raise ConfigError(
            f"{whole}: biases of scales {scales} cannot be fused: give them one scale"
        )
    size = scales[0] / unit
    fused = replace(config, r=rank, **{alpha: round(size)})
    return fused if fused.scaling == scales[0] else replace(fused, **{alpha: size}), factors


def _scaled(one: Own, known: Mapping[str, Role], factor: float) -> Own:
    """Multiply one of a product's factors."""
    if factor == 1.0:
        return one
    key = next(key for key, role in known.items() if role.rows and role.rank)
    array = one.params[key]
    wide = astype(array, compute_dtype(array))
    return one._replace(params={**one.params, key: factor * wide})


def _fused(whole: str, key: str, role: Role, parts: Sequence[Own | None], pieces: Pieces) -> Array:
    arrays = _alike([part.params[key] for part in parts if part is not None])
    every: Iterator[Array] = iter(arrays)
    aligned = [None if part is None else next(every) for part in parts]
    if role.rows:
        make = _diagonal if role.rank else _column
        return pieces.join(make(whole, parts, aligned, pieces))
    xp = namespace(*arrays)
    if not role.rank:
        _refuse_different(whole, key, parts, arrays)
        return arrays[0]
    return xp.concat(arrays, axis=0)


def _alike(arrays: list[Array]) -> list[Array]:
    if len({dtype_name(a) for a in arrays}) == 1:
        return arrays
    return [astype(a, compute_dtype(*arrays)) for a in arrays]


def _full(like: Array, shape: tuple[int, ...], value: float = 0.0) -> Array:
    array: Array = namespace(like).full(
        shape, value, dtype=like.dtype, device=creation_device(like)
    )
    return array


def _diagonal(
    whole: str,  # noqa: ARG001 - as `_column`
    parts: Sequence[Own | None],  # noqa: ARG001
    arrays: Sequence[Array | None],
    pieces: Pieces,
) -> list[Array]:
    """Widen factors (nᵢ, rᵢ) to (nᵢ, Σr), each in columns of its own."""
    given = [a for a in arrays if a is not None]
    like, rank, before = given[0], sum(a.shape[1] for a in given), 0
    rows = []
    for array, n in zip(arrays, pieces.sizes, strict=True):
        if array is None:
            rows.append(_full(like, (n, rank)))
            continue
        after = before + array.shape[1]
        around = _full(like, (n, before)), array, _full(like, (n, rank - after))
        rows.append(namespace(array).concat(around, axis=1))
        before = after
    return rows


def _column(
    whole: str, parts: Sequence[Own | None], arrays: Sequence[Array | None], pieces: Pieces
) -> list[Array]:
    """Give each part's rows; where there are none, what changes nothing."""
    given = [one for one in parts if one is not None]
    like = next(a for a in arrays if a is not None)
    if len(given) < len(parts) and getattr(given[0].config, "use_dora", False):
        absent = [n for n, p in zip(pieces.names, parts, strict=True) if p is None]
        raise ConfigError(
            f"{whole}: DoRA's magnitudes of {', '.join(absent)} are not in the adapter: they would "
            "be the base's row norms; merge into a base of the same layers"
        )
    neutral = 0.0 if isinstance(given[0].config, Additive) else 1.0
    return [
        _full(like, (n, *like.shape[1:]), neutral) if array is None else array
        for array, n in zip(arrays, pieces.sizes, strict=True)
    ]


def _refuse_different(
    whole: str, key: str, parts: Sequence[Own | None], arrays: Sequence[Array]
) -> None:
    """Refuse parts that treat their common input differently."""
    given = [one for one in parts if one is not None]
    first = to_numpy(arrays[0])
    if len(given) < len(parts) or any((to_numpy(a) != first).any() for a in arrays[1:]):
        names = ", ".join(one.site.name for one in given)
        raise ConfigError(
            f"{whole}: {given[0].config.peft_type} of {names} cannot be fused: {key} acts on the "
            "input, which all parts share, and they differ; merge into a base of the same layers"
        )
