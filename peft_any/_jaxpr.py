"""Functions of JAX in which weights stay what they are made of: products apply the adapted layer.

JAX's functions ask no operand how it wants to be multiplied. But a function can be traced to the
list of its elementary operations (a jaxpr), in which a weight is an operation of its own, and that
list carried out by an interpreter, as JAX's documentation describes:
https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html. Where an
operation is not known here it gets the array, so that results never depend on this module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

from peft_any._libraries import LIBRARIES, find_library
from peft_any.arguments import checked
from peft_any.errors import BackendError

_mode: ContextVar[str] = ContextVar("peft_any_jaxpr", default="")
"""Whether weights are to be operations ("tracing"), or to tell that they are wanted ("asking")."""
_INLINED = frozenset({"pjit", "jit", "closed_call", "core_call"})
_CHECKPOINTS = frozenset({"checkpoint", "remat", "remat2"})


class Weight(Protocol):
    """A matrix that is not formed: what an interpreted operation asks of it."""

    @property
    def merged(self) -> Any:
        """The matrix as an array."""

    @property
    def T(self) -> Any:  # noqa: N802 - the standard's name
        """The matrix turned around."""

    def contracted(self, x: Any, axis: int, own: int) -> Any:
        """Multiply over an axis of `x` and one of its own; its other axis last, None if it cannot.

        In the dtype of `x`.
        """


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a weight is made of a nest of arrays.

    Attributes
    ----------
    make : callable (nest) -> Weight
    shape, dtype
        Of the matrix.
    nest
        The nest's structure, of JAX.
    """

    make: Callable[[Any], Weight]
    shape: tuple[int, ...]
    dtype: Any
    nest: Any

    def __call__(self, arrays: Sequence[Any]) -> Weight:
        """Make it of the arrays of a nest."""
        return self.make(self.nest.unflatten(arrays))


class _WantedError(BaseException):
    """A weight was given to a function of JAX; not an error that a function might handle."""


def is_tracing() -> bool:
    """Whether weights are to be operations now."""
    if _mode.get() == "asking":
        raise _WantedError
    return _mode.get() == "tracing"


def tried(run: Callable[[Callable[..., Any]], Any], f: Callable[..., Any]) -> Any:
    """Give ``run(f)``; ``run(interpreted(f))`` if `f` gives a weight to a function of JAX."""
    token = _mode.set("asking")
    try:
        return run(f)
    except _WantedError:
        pass
    finally:
        _mode.reset(token)
    try:
        return run(interpreted(f))
    except (TypeError, IndexError, BackendError):  # it asks for values, which eager JAX has
        return run(f)


def recipe_of(make: Callable[[Any], Weight], nest: Any, like: Any) -> tuple[Recipe, list[Any]]:
    """Give the recipe of a weight with the shape and dtype of an array, and what it needs."""
    arrays, structure = LIBRARIES["jax"].module.tree_util.tree_flatten(nest)
    return Recipe(make, tuple(like.shape), like.dtype, structure), arrays


def symbol(recipe: Recipe, arrays: Sequence[Any]) -> Any:
    """Give a weight as an operation of the function that is being traced."""
    return _primitive().bind(*arrays, recipe=recipe)


@cache
def _primitive() -> Any:
    """Make the operation: by itself it merges."""
    jax = LIBRARIES["jax"].module
    from jax.extend.core import Primitive  # noqa: PLC0415 - only with JAX
    from jax.interpreters import ad, batching, mlir  # noqa: PLC0415

    def merged(*arrays: Any, recipe: Recipe) -> Any:
        return recipe(arrays).merged

    def shape(*arrays: Any, recipe: Recipe) -> Any:  # noqa: ARG001 - the primitive's signature
        return jax.core.ShapedArray(recipe.shape, recipe.dtype)

    zeros: Any = ad.instantiate_zeros

    def derivative(primals: Any, tangents: Any, *, recipe: Recipe) -> Any:
        filled = tuple(zeros(t) for t in tangents)
        return jax.jvp(partial(merged, recipe=recipe), tuple(primals), filled)

    def batch(arrays: Any, axes: Any, *, recipe: Recipe) -> Any:
        return jax.vmap(partial(merged, recipe=recipe), in_axes=axes)(*arrays), 0

    weight: Any = Primitive("adapted_weight")
    weight.def_impl(merged)
    weight.def_abstract_eval(shape)
    ad.primitive_jvps[weight] = derivative
    batching.primitive_batchers[weight] = batch
    mlir.register_lowering(weight, mlir.lower_fun(merged, multiple_results=False))
    return weight


@checked
def without_merging(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of JAX arrays multiply by adapted weights without forming them.

    ``jnp.matmul``, ``jnp.einsum``, Flax's and Equinox's layers take the arrays that
    ``model.bind(params).weights`` stands for; in the function made here their products apply the
    adapted layers. It may be jitted, differentiated and vectorised in turn. `value_and_grad` and
    `fit` do this by themselves, and other libraries need it not: for their arrays it is `f`.

    Parameters
    ----------
    f : callable
        It is traced, so it cannot ask for values. Arrays among its arguments, in any pytree, are
        traced, anything else is passed as it is; its result is a pytree of arrays.

    Examples
    --------
    >>> import numpy as np
    >>> without_merging(np.matmul)(np.eye(2), np.ones(2))
    array([1., 1.])
    """

    def call(*args: Any) -> Any:
        if "jax" not in sys.modules:
            return f(*args)
        tree = LIBRARIES["jax"].module.tree_util
        leaves, structure = tree.tree_flatten(args, is_leaf=_is_weight)
        if not any(getattr(find_library(x), "name", "") == "jax" for x in leaves):
            return f(*args)
        free = [find_library(x) is not None and not _is_weight(x) for x in leaves]

        def of_arrays(arrays: list[Any]) -> Any:
            given = iter(arrays)
            pairs = zip(leaves, free, strict=True)
            return f(*structure.unflatten([next(given) if is_free else x for x, is_free in pairs]))

        return interpreted(of_arrays)(
            [x for x, is_free in zip(leaves, free, strict=True) if is_free]
        )

    return call


def _is_weight(x: Any) -> bool:
    return hasattr(type(x), "contracted")


def interpreted(f: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Make a function of a list of JAX arrays that does what `f` does, adapted weights unmerged.

    Raises
    ------
    jax.errors.ConcretizationTypeError, TypeError
        If `f` needs values.
    """

    def call(arrays: list[Any]) -> Any:
        jax = LIBRARIES["jax"].module
        token = _mode.set("tracing")
        try:
            closed, shapes = jax.make_jaxpr(f, return_shape=True)(arrays)
        finally:
            _mode.reset(token)
        found = _evaluate(closed.jaxpr, closed.consts, arrays, {})
        return jax.tree_util.tree_structure(shapes).unflatten(map(_array, found))

    return call


@dataclass(frozen=True)
class _Unformed:
    """A weight among the interpreter's values, with the dtype that the operations gave it."""

    weight: Weight
    dtype: Any

    def array(self) -> Any:
        """The matrix as an array."""
        return self.weight.merged.astype(self.dtype)


def _array(x: Any) -> Any:
    return x.array() if isinstance(x, _Unformed) else x


def _evaluate(jaxpr: Any, consts: Any, args: Any, made: dict[Any, Any]) -> list[Any]:
    """Carry out a jaxpr; results may be weights."""
    from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun  # noqa: PLC0415 - only with JAX

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        given = [read(x) for x in eqn.invars]
        found = _step(eqn, given, made)
        if found is None:  # as the function itself has it
            held = [
                (v, _array(x))
                for v, x in zip(eqn.invars, given, strict=True)
                if not isinstance(v, Literal)
            ]
            alone = jaxpr.replace(
                constvars=[], invars=[v for v, _ in held], outvars=eqn.outvars, eqns=[eqn]
            )
            found = jaxpr_as_fun(ClosedJaxpr(alone, []))(*(x for _, x in held))
        values.update(zip(eqn.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _step(eqn: Any, given: list[Any], made: dict[Any, Any]) -> Sequence[Any] | None:
    """Carry out an operation that has to do with weights; None for any other."""
    name, params = eqn.primitive.name, eqn.params
    if name == "adapted_weight":
        recipe = params["recipe"]
        key = recipe, *map(id, given)
        if key not in made:  # with what its key is made of, lest that be made anew
            made[key] = _Unformed(recipe(given), recipe.dtype), given
        return [made[key][0]]
    unformed = any(isinstance(x, _Unformed) for x in given)
    inner = params.get("jaxpr")
    if inner is not None and (unformed or _has_weights(inner)):
        if name in _INLINED:
            return _evaluate(inner.jaxpr, inner.consts, given, made)
        if name in _CHECKPOINTS:
            run = LIBRARIES["jax"].module.checkpoint(
                lambda *args: [*map(_array, _evaluate(inner, (), args, {}))],
                prevent_cse=params["prevent_cse"],
                policy=params["policy"],
            )
            return run(*map(_array, given))
    found = _RULES[name](eqn, *given) if unformed and name in _RULES else None
    return None if found is None else [found]


def _has_weights(jaxpr: Any) -> bool:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = [v for v in eqn.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns")]
        if eqn.primitive.name == "adapted_weight" or any(map(_has_weights, inner)):
            return True
    return False


def _transposed(eqn: Any, w: _Unformed) -> Any:
    return replace(w, weight=w.weight.T) if len(eqn.params["permutation"]) == 2 else None


def _converted(eqn: Any, w: _Unformed) -> Any:
    dtype = eqn.params["new_dtype"]
    return replace(w, dtype=dtype) if _is_floating(dtype) else None


def _is_floating(dtype: Any) -> bool:
    jnp = LIBRARIES["jax"].module.numpy
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _multiplied(eqn: Any, a: Any, b: Any) -> Any:
    """Contract one axis of an array with a weight, in any dtype but at no special precision."""
    jnp = LIBRARIES["jax"].module.numpy
    (left, right), batch = eqn.params["dimension_numbers"]
    if any(batch) or len(left) != 1 or eqn.params["precision"] is not None:
        return None
    on_right = isinstance(b, _Unformed)
    w, x, own, axis = (b, a, right[0], left[0]) if on_right else (a, b, left[0], right[0])
    x, dtype = _array(x), eqn.outvars[0].aval.dtype
    if not (_is_floating(x.dtype) and _is_floating(dtype)):
        return None
    y = w.weight.contracted(x.astype(jnp.promote_types(x.dtype, dtype)), axis, own)
    if y is None:
        return None
    return (y if on_right else jnp.moveaxis(y, -1, 0)).astype(dtype)


_RULES: dict[str, Callable[..., Any]] = {
    "transpose": _transposed,
    "convert_element_type": _converted,
    "dot_general": _multiplied,
}
"""Operations that leave a weight unformed."""
