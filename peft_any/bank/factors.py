"""What the stacked path needs of adapters: the factors of all of them, of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeGuard

import numpy as np

from peft_any._typing import Array, Params
from peft_any.backend import (
    creation_device,
    detach,
    dtype_name,
    from_numpy_like,
    is_lazy,
    is_traced,
    namespace,
)
from peft_any.bound import BoundLayer
from peft_any.layer import EXPERTS, Dense, Site, linear
from peft_any.method import Additive, Tuner

EACH, ALL = 1 << 18, 1 << 24
"""The most numbers that the rows' factors may be, by adapter and in all, for the stacked path to be
chosen: as `tests/benchmarks/mixed.py` measured it."""


def small(layers: Sequence[BoundLayer], rows: int) -> bool:
    """Whether the factors of all rows are so few numbers that the stacked path is the quicker one.

    Nothing is formed for it: `Additive.rank` bounds the rank of each method's factors.
    """
    site = layers[0].base.site
    ranks = [p.config.rank(site) for one in layers for p in one.parts if factored(p.config, site)]
    size = max(ranks, default=1) * (site.n_out + site.width) * rows
    return size <= min(EACH * len(layers), ALL)


JOINED = 1 << 25
"""The most products of two numbers that all vectors with the factors of all adapters may be, for
the joined path to be chosen; half as many where their ranks together are above a side's size."""


def total_rank(layers: Sequence[BoundLayer]) -> int:
    """Bound the rank of the factors of all adapters together; nothing is formed for it."""
    site = layers[0].base.site
    configs = [p.config for one in layers for p in one.parts]
    return sum(config.rank(site) for config in configs if factored(config, site))


def few(total: int, site: Site, vectors: int) -> bool:
    """Whether so many vectors, multiplied by factors of all ranks together, cost little."""
    each, side = total * (site.n_out + site.width), min(site.n_out, site.width)
    return vectors * each <= (JOINED if total <= side else JOINED // 2) or 32 * total <= side


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
        return xp.zeros(shape, dtype=w.dtype, device=creation_device(w))  # type: ignore[no-any-return]

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
    owner = np.asarray([i for i, f in enumerate(found) if f for _ in range(int(f["a"].shape[0]))])
    mask = (np.asarray(rows)[:, None] == owner[None, :]).astype(dtype_name(base.weight))
    made = {"a": a, "b": b, "mask": from_numpy_like(mask, base.weight)}
    if any(len(f) > 2 for f in kept):
        each = alike(found, base)
        more = [name for name in ("gain", "shift") if name in each[0]]
        made |= {name: xp.stack([each[i][name] for i in rows], axis=0) for name in more}
    return made


def applied(x: Array, base: Dense, rows: Mapping[str, Array]) -> Array:
    """Apply a layer to rows of which each has factors of its own: two products, perhaps batched.

    Parameters
    ----------
    x : array (rows, …, width)
    base : Dense
    rows : mapping
        a (rows, k, width), b (rows, n_out, k); or a (k, width), b (n_out, k) of all adapters and
        a mask (rows, k) of what is each row's; and perhaps gain and shift (rows, n_out).

    Returns
    -------
    array (rows, …, n_out)
        bᵢ·aᵢ·xᵢ + shiftᵢ beside the base, the whole but for the bias times gainᵢ.
    """
    xp = namespace(x, base.weight, rows["a"])
    n = x.shape[0]
    y, ones = base(x), (1,) * (x.ndim - 2)
    if "mask" in rows:
        low = linear(x, rows["a"]) * xp.reshape(rows["mask"], (n, *ones, -1))
        y = y + linear(low, rows["b"])
    else:
        flat = xp.reshape(x, (n, prod(x.shape[1:-1]), x.shape[-1])) if x.ndim != 3 else x
        low = xp.matmul(flat, xp.matrix_transpose(rows["a"]))
        y = y + xp.reshape(xp.matmul(low, xp.matrix_transpose(rows["b"])), y.shape)
    lead = (n, *ones, base.weight.shape[0])
    if "shift" in rows:
        y = y + xp.reshape(rows["shift"], lead)
    if "gain" in rows:
        gain = xp.reshape(rows["gain"], lead)
        y = y * gain if base.bias is None else (y - base.bias) * gain + base.bias
    return y
