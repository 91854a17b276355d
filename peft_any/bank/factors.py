"""What the joined and stacked paths need of adapters: the factors of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeGuard

import numpy as np

from peft_any._typing import Array, Params
from peft_any.backend import (
    creation_device,
    dense,
    detach,
    dtype_name,
    from_numpy_like,
    is_lazy,
    is_traced,
    namespace,
    taken,
    ways,
)
from peft_any.bound import BoundLayer
from peft_any.layer import EXPERTS, MATRICES, Dense, Site, linear
from peft_any.method import Additive, Tuner

TOGETHER = 32
"""Up to so large a rank of the factors of all adapters together the joined path is the quickest."""
JOINED = 1 << 25
"""The most products of two numbers that all vectors with the factors of all adapters may be, for
the joined path to be chosen where the stacked one is not; half as many where their ranks together
are above a side's size."""
STACKED = 1 << 22
"""The most numbers of all factors together for the stacked path to be chosen."""


def total_rank(layers: Sequence[BoundLayer]) -> int:
    """Bound the rank of the factors of all adapters together; nothing is formed for it."""
    site = layers[0].base.site
    configs = [p.config for one in layers for p in one.parts]
    return sum(config.rank(site) for config in configs if factored(config, site))


def few(total: int, site: Site, vectors: int) -> bool:
    """Whether so many vectors, multiplied by factors of all ranks together, cost little."""
    each, side = total * (site.n_out + site.width), min(site.n_out, site.width)
    return vectors * each <= (JOINED if total <= side else JOINED // 2) or 2 * total <= side


def even(layers: Sequence[BoundLayer], rows: Sequence[int]) -> bool:
    """Whether stacked factors are few numbers, and rows nearly evenly shared among adapters.

    Nothing is formed for it: `Additive.rank` bounds the rank of each method's factors.
    """
    site, groups = layers[0].base.site, groups_of(rows, len(layers))
    ranks = [p.config.rank(site) for one in layers for p in one.parts if factored(p.config, site)]
    numbers = max(ranks, default=1) * (site.n_out + site.width) * len(layers)
    return numbers <= STACKED and len(layers) * max(map(len, groups)) <= 2 * len(rows)


def groups_of(rows: Sequence[int], count: int) -> list[list[int]]:
    """Give the rows of each adapter."""
    groups: list[list[int]] = [[] for _ in range(count)]
    for i, k in enumerate(rows):
        groups[k].append(i)
    return groups


def finite(*arrays: Array) -> bool:
    """Whether arrays are known to hold no infinity: times 0 it would be none."""
    values = [detach(array) for array in arrays]
    if any(is_traced(array) or is_lazy(array) for array in values):
        return False
    try:
        return all(bool(namespace(a).all(namespace(a).isfinite(a))) for a in values)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # no values: torch's meta device, or a transformation


def factored(config: Tuner, site: Site) -> TypeGuard[Additive]:
    """Whether a method adds a product of small factors, and applies it as that."""
    return (
        isinstance(config, Additive)
        and type(config).factors is not Additive.factors
        and type(config).forward is Additive.forward
        and site.kind not in EXPERTS
        and not config.takes
    )


def factors_of(layer: BoundLayer) -> dict[str, Array] | None:
    """Give a layer's factors a (k, width) and b (n_out, k), its gain and shift (n_out,), if any.

    Returns
    -------
    dict or None
        Empty for a layer without adapters; None where it has no such form.
    """
    ready, base = layer.ready
    if not ready:
        return {}
    part = ready[0]
    if len(ready) > 1 or part.weight != 1.0 or part.noise is not None:
        return None
    if not factored(part.config, base.site):
        return None
    b, a = part.config.factors(part.params, base.site)
    more = {
        "gain": part.config.gain(part.params, base),
        "shift": part.config.bias_delta(part.params, base.site),
    }
    return {"a": a, "b": b} | {name: array for name, array in more.items() if array is not None}


def alike(found: Sequence[Mapping[str, Array]], base: Dense) -> list[dict[str, Array]]:
    """Pad factors to one rank with zeros, and give those without a gain or shift one of no effect.

    Parameters
    ----------
    found : sequence of mappings
        As `factors_of` gives them.
    base : Dense
        In the compute dtype.
    """
    w, rank = base.weight, max([1, *(int(f["a"].shape[0]) for f in found if f)])
    xp = namespace(w, *(array for f in found for array in f.values()))
    n_out, width = w.shape
    kinds = {name for f in found for name in f}

    def zeros(*shape: int) -> Array:
        return xp.zeros(shape, dtype=w.dtype, device=creation_device(w))

    made = []
    for f in found:
        have = int(f["a"].shape[0]) if f else 0
        a, b = ([f["a"]], [f["b"]]) if f else ([], [])
        if have < rank or not f:
            a, b = [*a, zeros(rank - have, width)], [*b, zeros(n_out, rank - have)]
        row = {"a": xp.concat(a, axis=0), "b": xp.concat(b, axis=1)}
        if "gain" in kinds:
            row["gain"] = f["gain"] if "gain" in f else zeros(n_out) + 1.0
        if "shift" in kinds:
            row["shift"] = f["shift"] if "shift" in f else zeros(n_out)
        made.append(row)
    return made


def joined(found: Sequence[Mapping[str, Array]], base: Dense, rows: Sequence[int]) -> Params:
    """Lay the factors of all adapters side by side, and say which of them are each row's.

    Parameters
    ----------
    found : sequence of mappings
        As `factors_of` gives them, one of them at least not empty.
    base : Dense
        In the compute dtype.
    rows : sequence of int
        Which of them each row takes.
    """
    kept = [f for f in found if f]
    xp = namespace(base.weight, *(array for f in kept for array in f.values()))
    a, b = (xp.concat([f[n] for f in kept], axis=i) for i, n in enumerate("ab"))
    made = {"a": a, "b": b}
    if len(found) > 1:
        owner = [i for i, f in enumerate(found) if f for _ in range(int(f["a"].shape[0]))]
        mask = (np.asarray(rows)[:, None] == np.asarray(owner)[None, :]).astype(
            dtype_name(base.weight)
        )
        made["mask"] = from_numpy_like(mask, base.weight)
    if any(len(f) > 2 for f in kept):
        each = alike(found, base)
        more = [name for name in ("gain", "shift") if name in each[0]]
        made |= {name: xp.stack([each[i][name] for i in rows], axis=0) for name in more}
    return made


def stacked(found: Sequence[Mapping[str, Array]], base: Dense, rows: Sequence[int]) -> Params:
    """Stack the factors of all adapters, and say where the rows of each go, as many for each.

    Parameters
    ----------
    found, base, rows
        As for `joined`.
    """
    each, groups = alike(found, base), groups_of(rows, len(found))
    xp = namespace(base.weight, *(array for f in each for array in f.values()))
    most = max(map(len, groups))
    order, place = np.zeros(len(found) * most, "int64"), np.zeros(len(rows), "int64")
    for k, group in enumerate(groups):  # filled up with its own, so that it sees no other's
        order[k * most : (k + 1) * most] = (group + group[:1] * most or [0] * most)[:most]
        place[group] = np.arange(k * most, k * most + len(group))
    turn = xp.matrix_transpose
    made = {"down": turn(xp.stack([f["a"] for f in each], axis=0))}
    made |= {"up": xp.stack([turn(f["b"]) for f in each], axis=0)}
    made |= {n: xp.stack([each[i][n] for i in rows], axis=0) for n in each[0] if n not in "ab"}
    if order.tolist() != list(range(len(rows))):
        made |= {"order": from_numpy_like(order, base.weight)}
        made |= {"place": from_numpy_like(place, base.weight)}
    return made


def applied(x: Array, base: Dense, rows: Mapping[str, Array]) -> Array:
    """Apply a layer to rows of which each has factors of its own: two products, perhaps batched.

    Parameters
    ----------
    x : array (rows, …, width)
    base : Dense
    rows : mapping
        a (rows, k, width), b (rows, n_out, k); or down (groups, width, k), up (groups, k, n_out),
        with the `order` in which rows make groups and each row's `place` there, unless they stand
        so; or a (k, width), b (n_out, k) of all adapters and a mask (rows, k) of what is each
        row's; perhaps gain and shift (rows, n_out).

    Returns
    -------
    array (rows, …, n_out)
        bᵢ·aᵢ·xᵢ + shiftᵢ beside the base, the whole but for the bias times gainᵢ.
    """
    n, ones = x.shape[0], (1,) * (x.ndim - 2)
    if "mask" in rows:
        xp = namespace(x, base.weight, rows["a"])
        low = linear(x, rows["a"]) * xp.reshape(rows["mask"], (n, *ones, -1))
        y = base(x) + linear(low, rows["b"])
    elif "down" in rows:
        xp = namespace(x, base.weight, rows["down"])
        y = base(x) + _by_groups(x, rows)
    else:
        xp = namespace(x, base.weight, rows["a"])
        low = xp.reshape(x, (n, prod(x.shape[1:-1]), x.shape[-1])) @ xp.matrix_transpose(rows["a"])
        y = base(x)
        y = y + xp.reshape(low @ xp.matrix_transpose(rows["b"]), y.shape)
    lead = (n, *ones, base.weight.shape[0])
    if "shift" in rows:
        y = y + xp.reshape(rows["shift"], lead)
    if "gain" in rows:
        gain = xp.reshape(rows["gain"], lead)
        y = y * gain if base.bias is None else y * gain + (base.bias - base.bias * gain)
    return y


def planned(x: Array, base: Dense, rows: Mapping[str, Array]) -> Callable[[Array], Array] | None:
    """Prepare `applied` for all inputs that look like x, where a library has shorter ways for it.

    Parameters
    ----------
    x : array (rows, …, width)
    base : Dense
    rows : mapping
        As `joined`, or `stacked`, gives it.

    Returns
    -------
    callable or None
    """
    w, bias = base.weight, base.bias
    short = ways(x, *rows.values(), *(held for held in (w, bias) if held is not None))
    if short is None or base.site.kind not in MATRICES or rows.keys() & {"gain", "shift"}:
        return None
    take, times, onto = short
    whole = onto(x, w, bias)
    if "a" in rows:
        a, b, mask = rows["a"], rows["b"], rows.get("mask")
        if mask is None:
            return lambda x: whole(dense(dense(x, a), b), x)
        own = namespace(mask).reshape(mask, (x.shape[0], *(1,) * (x.ndim - 2), -1))
        return lambda x: whole(dense(dense(x, a) * own, b), x)
    down, up, order, place = rows["down"], rows["up"], rows.get("order"), rows.get("place")
    count, groups = (x if order is None else order).shape[0], down.shape[0]
    each = groups, count // groups * prod(x.shape[1:-1]), x.shape[-1]
    shape = count, *x.shape[1:-1], w.shape[0]

    def beside(x: Array) -> Array:
        some: Any = x if order is None else take(x, order)
        added = times(times(some.reshape(each), down), up).reshape(shape)
        return whole(added if place is None else take(added, place), x)

    return beside


def _by_groups(x: Array, rows: Mapping[str, Array]) -> Array:
    """Apply the factors to the rows of each adapter together."""
    xp, down, order = namespace(x, *rows.values()), rows["down"], rows.get("order")
    some = x if order is None else taken(x, order)
    each = down.shape[0], some.shape[0] // down.shape[0] * prod(x.shape[1:-1]), x.shape[-1]
    shape = *some.shape[:-1], rows["up"].shape[-1]
    y = xp.reshape(xp.reshape(some, each) @ down @ rows["up"], shape)
    return y if order is None else taken(y, rows["place"])
