"""Optimisers' common ground: the pair of pure functions, and what wraps or precedes a rule."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

from peft_any._tree import (
    Path,
    Tree,
    alike,
    first,
    fused,
    leaves,
    map_with_path,
    named,
    tree_map,
)
from peft_any._typing import Array
from peft_any.backend import (
    astype,
    compute_dtype,
    dtype_name,
    is_array,
    is_floating,
    namespace,
    to_numpy,
)
from peft_any.errors import ConfigError, ShapeError

State: TypeAlias = dict[str, Any]


class Optimizer(NamedTuple):
    """A pair of pure functions, as in optax.

    Attributes
    ----------
    init : callable params -> state
    update : callable (grads, state, params) -> (updates, state)
    whole : callable (grads, state, params) -> (params, state), optional
        The same with the updates added, where that takes fewer passes than one after the other:
        see `updated`.
    """

    init: Callable[[Tree], State]
    update: Callable[[Tree, State, Tree], tuple[Tree, State]]
    whole: Callable[[Tree, State, Tree], tuple[Tree, State]] | None = None


def lora_plus(
    optimizer: Optimizer, ratio: float = 16.0, embedding_ratio: float | None = None
) -> Optimizer:
    """LoRA+: a rate `ratio` times as large for every B factor (Hayou et al. 2024).

    https://arxiv.org/abs/2402.12354. As in Hugging Face PEFT vectors learn like B.

    Parameters
    ----------
    optimizer : Optimizer
        Whose updates are proportional to its rate, weight decay included: all of this module.
    ratio : float
        How much faster B learns than A.
    embedding_ratio : float, optional
        How much faster both factors of an embedding learn than A; by default they learn as the
        others do. Hugging Face PEFT's ``loraplus_lr_embedding``, 10⁻⁶ unless it is given, is this
        times the rate.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"lora_A.weight": np.ones((1, 1)), "lora_B.weight": np.ones((1, 1))}
    >>> from peft_any.train.optimise import sgd
    >>> faster = lora_plus(sgd(1.0), ratio=4.0)
    >>> updates, _ = faster.update(params, faster.init(params), params)
    >>> float(updates["lora_A.weight"][0, 0]), float(updates["lora_B.weight"][0, 0])
    (-1.0, -4.0)
    """
    check_from_zero("lora_plus", ratio=ratio, embedding_ratio=embedding_ratio or 0.0)

    def scale(path: Path, update: Array) -> Array:
        name = str(path[-1]) if path else ""
        if name.startswith("lora_embedding_") and embedding_ratio is not None:
            return embedding_ratio * update
        fast = "lora_B" in name or name == "lora_embedding_B" or update.ndim == 1
        return ratio * update if fast else update

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        updates, state = optimizer.update(grads, state, params)
        return map_with_path(scale, updates), state

    return Optimizer(optimizer.init, update)


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """Shrink all gradients by one factor where their common norm is above `max_norm`.

    The factor is max_norm/(norm + 10⁻⁶), as torch's `clip_grad_norm_` has it.

    Examples
    --------
    >>> import numpy as np
    >>> clip = clip_by_global_norm(1.0)
    >>> clip.update({"w": np.asarray([3.0, 4.0])}, clip.init({}), {})[0]["w"].round(5)
    array([0.6, 0.8])
    """
    check_from_zero("clip_by_global_norm", max_norm=max_norm)

    @fused
    def shrunk(grads: Tree) -> Tree:
        factor: Any = max_norm / (global_norm(grads) + 1e-6)
        xp = namespace(factor)
        factor = xp.where(factor < 1.0, factor, xp.ones_like(factor))
        return tree_map(lambda g: as_like(as_like(g, factor) * factor, g), grads)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:  # noqa: ARG001
        return shrunk(grads), state

    return Optimizer(lambda params: {}, update)  # noqa: ARG005 - the pair's signature


def global_norm(tree: Tree) -> Array:
    """Norm of all numbers of a nest, computed in at least float32.

    Raises
    ------
    ShapeError
        If there are no arrays.

    Examples
    --------
    >>> import numpy as np
    >>> float(global_norm([np.asarray([3.0]), np.asarray([4.0])]))
    5.0
    """
    arrays = [leaf for _, leaf in leaves(tree)]
    if not arrays:
        raise ShapeError("global_norm: an empty nest has no norm: give at least one array")
    return _norm(arrays)


@fused
def _norm(arrays: list[Array]) -> Array:
    name = compute_dtype(*arrays)
    wide = [astype(a, name) for a in arrays]
    xp = namespace(*wide)
    squares = [xp.sum(a * a) for a in wide]
    return xp.sqrt(sum(squares[1:], squares[0]))


def chain(*stages: Optimizer) -> Optimizer:
    """Let every stage work on what the one before it gives: clipping, then AdamW.

    Examples
    --------
    >>> from peft_any.train.optimise import adamw
    >>> optimizer = chain(clip_by_global_norm(1.0), adamw(1e-3))
    """

    def init(params: Tree) -> State:
        return {"stages": [stage.init(params) for stage in stages]}

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        states: list[State] = []
        (given,) = entries("chain", state, "stages")
        if len(given) != len(stages):
            raise ConfigError(f"chain: {len(given)} states cannot be those of {len(stages)} stages")
        for stage, own in zip(stages, given, strict=True):
            grads, new = stage.update(grads, own, params)
            states.append(new)
        return grads, {"stages": states}

    return Optimizer(init, update)


def accumulate(optimizer: Optimizer, every: int) -> Optimizer:
    """Step once for `every` gradients, with their mean; the other updates are zero."""
    if every < 1:
        raise ConfigError(f"accumulate: every={every} cannot be a number of gradients: give 1 on")

    def init(params: Tree) -> State:
        return {"count": 0, "sum": zeros(params), "inner": optimizer.init(params)}

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        so_far, before, inner = entries("accumulate", state, "sum", "count", "inner")
        check_nests("accumulate", params, grads=grads, sum=so_far)
        total = tree_map(lambda s, g: s + as_like(g, s), so_far, grads)
        count = before + 1
        if count < every:
            idle = tree_map(lambda p: namespace(p).zeros_like(p), params)
            return idle, {"count": count, "sum": total, "inner": inner}
        mean = tree_map(lambda s: s / every, total)
        updates, inner = optimizer.update(mean, inner, params)
        return updates, {"count": 0, "sum": zeros(params), "inner": inner}

    return Optimizer(init, update)


def skip_not_finite(optimizer: Optimizer) -> Optimizer:
    """Make no step where a gradient holds a NaN or an infinity: updates of 0, the state kept.

    ``state["skipped"]`` counts such steps. It looks at values, so it is not for traced code.
    """

    def init(params: Tree) -> State:
        return {"skipped": 0, "inner": optimizer.init(params)}

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        inner, skipped = entries("skip_not_finite", state, "inner", "skipped")
        if not_finite(grads):
            idle = tree_map(lambda p: namespace(p).zeros_like(p), params)
            return idle, {**state, "skipped": skipped + 1}
        updates, inner = optimizer.update(grads, inner, params)
        return updates, {**state, "inner": inner}

    return Optimizer(init, update)


def zeros(params: Tree) -> Tree:
    """Make moments for parameters: zeros, in at least float32.

    Raises
    ------
    ShapeError
        For a leaf that is no array of real numbers.
    """

    def make(path: Path, p: Array) -> Array:
        if not is_array(p) or not is_floating(p):
            what = dtype_name(p) if is_array(p) else type(p).__name__
            raise ShapeError(f"{named(path)}: {what} cannot be trained: parameters are floating")
        return namespace(p).zeros_like(astype(p, compute_dtype(p)))

    return map_with_path(make, params)


def not_finite(tree: Tree) -> list[str]:
    """Name the arrays that hold a NaN or an infinity.

    Examples
    --------
    >>> import numpy as np
    >>> not_finite({"a": np.asarray([1.0]), "b": np.asarray([np.inf])})
    ['b']
    """
    return [
        named(path)
        for path, a in leaves(tree)
        if not bool(to_numpy(namespace(a).all(namespace(a).isfinite(a))))
    ]


def entries(where: str, state: Any, *names: str) -> list[Any]:
    """Take the entries of an optimiser's state.

    Raises
    ------
    ConfigError
        If it is another one's state.
    """
    if not isinstance(state, dict) or {*state} != {*names}:
        have = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ConfigError(
            f"{where}: a state with {have or 'nothing'} is not one of this optimizer, which has "
            f"{', '.join(names)}: give what its init(params) or its last update gave"
        )
    return [state[name] for name in names]


def check_nests(where: str, params: Tree, **others: Tree) -> None:
    """Refuse gradients, or an optimiser's moments, that are not those of the parameters.

    Raises
    ------
    BackendError
        If they are of another library.
    ShapeError
        Naming the arrays.
    """
    namespace(*map(first, (params, *others.values())))
    for name, tree in others.items():
        if alike(tree, params):
            continue
        have, need = ({named(p): tuple(a.shape) for p, a in leaves(t)} for t in (tree, params))
        odd = sorted(k for k in {*have, *need} if have.get(k) != need.get(k))
        lines = [
            f"{k}: {have.get(k, 'missing')}, not {need[k]}" if k in need else f"{k}: unexpected"
            for k in odd[:10]
        ]
        raise ShapeError(
            f"{where}: {name} cannot be those of the parameters:\n  " + "\n  ".join(lines)
        )


def as_like(x: Array, like: Array) -> Array:
    """Round an array to another one's dtype."""
    return x if x.dtype == like.dtype else astype(x, dtype_name(like))


def check_from_zero(where: str, **numbers: float) -> None:
    """Refuse numbers that are negative or not finite."""
    for name, value in numbers.items():
        if not (value >= 0 and isfinite(value)):
            raise ConfigError(f"{where}: {name}={value} cannot be: give a number from 0 on")


def check_decay(where: str, name: str, value: float) -> None:
    """Refuse a factor of decay outside [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{where}: {name} {value} cannot decay: give numbers in [0, 1)")
