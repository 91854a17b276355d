"""Optimisers as pairs of pure functions, for arrays of any library.

``init(params)`` gives a state, and ``update(grads, state, params)`` what to add to the parameters
and the next state. Parameters are arrays in any nest of dicts, lists and tuples; a state is such
a nest too, with a few Python numbers. Nothing is written in place.

Moments are kept in at least float32, updates are rounded to the parameters' dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from peft_any._memory import by_pieces, into
from peft_any._tree import Tree, fused, tree_map
from peft_any._typing import Array
from peft_any.backend import astype, compute_dtype, dtype_name, namespace
from peft_any.errors import ConfigError, nearest
from peft_any.train.schedules import Schedule
from peft_any.train.transforms import (
    Optimizer,
    State,
    as_like,
    check_decay,
    check_from_zero,
    check_nests,
    entries,
    zeros,
)

Rate: TypeAlias = float | Schedule


def adamw(
    learning_rate: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """AdamW: Adam with weight decay apart from the gradient (Loshchilov & Hutter 2019).

    p ← p − η·λ·p − η·m̂/(√v̂ + ε), https://arxiv.org/abs/1711.05101; equal to torch's to rounding.

    Parameters
    ----------
    learning_rate : float or schedule
        η, or a function of the number of steps made.
    betas : pair of float
        Decay of the mean m and of the mean square v of the gradient.
    eps : float
        ε, outside the root.
    weight_decay : float
        λ.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"w": np.asarray([1.0, -1.0])}
    >>> optimizer = adamw(0.1, weight_decay=0.0)
    >>> updates, state = optimizer.update({"w": np.ones(2)}, optimizer.init(params), params)
    >>> apply_updates(params, updates)["w"].round(6)
    array([ 0.9, -1.1])
    """
    check_from_zero("adamw", eps=eps, weight_decay=weight_decay)
    for beta in betas:
        check_decay("adamw", "betas", beta)
    first, second = betas

    def init(params: Tree) -> State:
        return {"step": 0, "m": zeros(params), "v": zeros(params)}

    def advance(move: Any, grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        step, m, v = entries("adamw", state, "step", "m", "v")
        check_nests("adamw", params, grads=grads, m=m, v=v)
        t, rate = step + 1, _rate(learning_rate, step)
        size, root = rate / (1 - first**t), (1 - second**t) ** 0.5
        found, m, v = move(params, grads, m, v, (size, root, rate * weight_decay))
        return found, {"step": t, "m": m, "v": v}

    def moved(
        params: Tree, grads: Tree, m: Tree, v: Tree, numbers: Sequence[float], *, whole: bool
    ) -> tuple[Tree, Tree, Tree]:
        size, root, decay = numbers

        def change(p: Array, g: Array, m: Array, v: Array, out: Any) -> tuple[Array, ...]:
            xp, g = namespace(m, v), as_like(g, m)
            step = g - m
            step *= 1 - first
            m = into(out[1], xp.add, m, step)
            step = g * g
            step *= 1 - second
            v = into(out[2], xp.add, second * v, step)
            step = xp.sqrt(v)
            step += eps * root
            step = m / step
            step *= -size * root
            step = as_like(into(out[0], xp.subtract, step, decay * as_like(p, m)), p)
            return into(out[0], xp.add, p, step) if whole else step, m, v

        found = tree_map(partial(by_pieces, change, like=(0, 2, 3)), params, grads, m, v)
        changed, m, v = (tree_map(lambda _, new, i=i: new[i], params, found) for i in range(3))
        return changed, m, v

    ways = (fused(partial(moved, whole=whole)) for whole in (False, True))
    return Optimizer(init, *(partial(advance, way) for way in ways))


def sgd(
    learning_rate: Rate = 1e-2,
    momentum: float = 0.0,
    *,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Gradient descent with momentum, by torch's rule: the rate is not part of the momentum.

    Parameters
    ----------
    learning_rate : float or schedule
    momentum : float
        Decay of the sum of gradients.
    dampening : float
        Part of each gradient after the first that is left out of the sum.
    nesterov : bool
        Look ahead by the momentum.
    weight_decay : float
        λ; λ·p is added to the gradient.

    Raises
    ------
    ConfigError
        For numbers out of range, or `nesterov` without momentum or with dampening.
    """
    check_from_zero("sgd", momentum=momentum, weight_decay=weight_decay)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ConfigError("sgd: nesterov=True needs momentum above 0 and dampening=0")

    def init(params: Tree) -> State:
        return {"step": 0} | ({"momentum": zeros(params)} if momentum else {})

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        names = ("step", "momentum") if momentum else ("step",)
        t, *moments = entries("sgd", state, *names)
        check_nests("sgd", params, grads=grads, **dict(zip(names[1:], moments, strict=True)))
        share = 1 - dampening if t else 1.0
        updates, kept = moved(params, grads, *moments, _rate(learning_rate, t), share)
        return updates, {"step": t + 1} | ({"momentum": kept} if momentum else {})

    @fused
    def moved(params: Tree, grads: Tree, *rest: Any) -> tuple[Tree, Tree]:
        *moments, rate, share = rest

        def slope(p: Array, g: Array) -> Array:
            wide = compute_dtype(p, g)
            g = astype(g, wide)
            return g + weight_decay * astype(p, wide) if weight_decay else g

        steps = kept = slopes = tree_map(slope, params, grads)
        if momentum:
            steps = kept = tree_map(lambda b, g: momentum * b + share * g, moments[0], slopes)
        if nesterov:
            steps = tree_map(lambda b, g: g + momentum * b, kept, slopes)
        return tree_map(lambda p, s: as_like(-rate * s, p), params, steps), kept

    return Optimizer(init, update)


def lion(
    learning_rate: Rate = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> Optimizer:
    """Lion: the sign of an interpolated momentum (Chen et al. 2023), half of AdamW's state.

    p ← p − η·(sign(β₁·m + (1 − β₁)·g) + λ·p), m ← β₂·m + (1 − β₂)·g,
    https://arxiv.org/abs/2302.06675.
    """
    check_from_zero("lion", weight_decay=weight_decay)
    for beta in betas:
        check_decay("lion", "betas", beta)
    first, second = betas

    def init(params: Tree) -> State:
        return {"step": 0, "m": zeros(params)}

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        step, m = entries("lion", state, "step", "m")
        check_nests("lion", params, grads=grads, m=m)
        updates, m = moved(params, grads, m, _rate(learning_rate, step))
        return updates, {"step": step + 1, "m": m}

    @fused
    def moved(params: Tree, grads: Tree, m: Tree, rate: float) -> tuple[Tree, Tree]:
        def change(p: Array, m: Array, g: Array) -> Array:
            way = namespace(m).sign(first * m + (1 - first) * as_like(g, m))
            return as_like(-rate * (way + weight_decay * as_like(p, m)), p)

        updates = tree_map(change, params, m, grads)
        m = tree_map(lambda m, g: second * m + (1 - second) * as_like(g, m), m, grads)
        return updates, m

    return Optimizer(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Add updates to parameters; dtypes stay."""
    check_nests("apply_updates", params, updates=updates)
    return _sum(params, updates)


def updated(optimizer: Optimizer, grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
    """Give the next parameters and state, in fewer passes than updates of their own take.

    Parameters
    ----------
    optimizer : Optimizer
        One of this module or of optax, or any such pair of functions.
    grads, params : nest of arrays
    state : dict

    Returns
    -------
    params : nest of arrays
        What `apply_updates` would make of the updates, bit for bit.
    state : dict

    Examples
    --------
    >>> import numpy as np
    >>> rule, params = sgd(0.5), {"w": np.asarray([1.0, 2.0])}
    >>> updated(rule, {"w": np.ones(2)}, rule.init(params), params)[0]["w"]
    array([0.5, 1.5])
    """
    if (whole := getattr(optimizer, "whole", None)) is not None:
        return whole(grads, state, params)
    updates, state = optimizer.update(grads, state, params)
    return apply_updates(params, updates), state


@fused
def _sum(params: Tree, updates: Tree) -> Tree:
    return tree_map(lambda p, u: p + astype(u, dtype_name(p)), params, updates)


def _rate(rate: Rate, step: int) -> float:
    return rate(step) if callable(rate) else rate


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "sgd": sgd, "lion": lion}
"""Optimisers that `fit` knows by name."""


def optimizer_for(given: str | Optimizer) -> Optimizer:
    """Find an optimiser by name, with its defaults; one that is given is itself.

    Raises
    ------
    ConfigError
        If there is none of that name, or the given one is no pair of functions.
    """
    if not isinstance(given, str):
        if not (hasattr(given, "init") and hasattr(given, "update")):
            raise ConfigError(
                f"optimizer {given!r:.60}: cannot train: give one of {', '.join(OPTIMIZERS)}, or a "
                "pair of functions init and update"
            )
        return given
    if given not in OPTIMIZERS:
        raise ConfigError(f"optimizer {given!r}: is not known{nearest(given, OPTIMIZERS)}")
    return OPTIMIZERS[given]()
