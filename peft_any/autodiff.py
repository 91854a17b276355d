"""Gradients on any array library: JAX's, torch's, or the tape's, behind one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, Literal, TypeAlias

from peft_any._engines import ENGINES, Engine
from peft_any._libraries import library_of
from peft_any.arguments import checked
from peft_any.backend import dtype_name, is_array, namespace
from peft_any.errors import GradientError
from peft_any.tape import space as tape
from peft_any.tape.rules import is_inexact

EngineName: TypeAlias = Literal["auto", "tape"]
_SEQUENCES = (list, tuple)


def flatten(
    tree: Any, path: str = "params"
) -> tuple[list[Any], Callable[[], list[str]], Callable[[list[Any]], Any]]:
    """Take the arrays out of a nest; give them, what tells their paths, and what fills it again.

    Examples
    --------
    >>> import numpy as np
    >>> leaves, paths, fill = flatten({"a": [np.ones(1), "text"]})
    >>> paths(), fill([2])
    (["params['a'][0]"], {'a': [2, 'text']})
    """
    return [*_arrays(tree)], lambda: [*_paths(tree, path)], lambda new: _filled(tree, iter(new))


def _arrays(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for v in node.values():
            yield from _arrays(v)
    elif isinstance(node, _SEQUENCES):
        for v in node:
            yield from _arrays(v)
    elif is_array(node):
        yield node


def _paths(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, (dict, *_SEQUENCES)):
        for k, v in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _paths(v, f"{path}[{k!r}]")
    elif is_array(node):
        yield path


def _filled(node: Any, new: Iterator[Any]) -> Any:
    if isinstance(node, dict):
        values = {k: _filled(v, new) for k, v in node.items()}
        if type(node) is dict:
            return values
        made = copy(node)
        made.update(values)
        return made
    if isinstance(node, _SEQUENCES):
        items = [_filled(v, new) for v in node]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    return next(new) if is_array(node) else node


def _engine(leaves: Sequence[Any], paths: Callable[[], list[str]], engine: EngineName) -> Engine:
    if engine not in ("auto", "tape"):
        raise GradientError(f'engine={engine!r}: is not known: choose "auto" or "tape"')
    if not leaves:
        raise GradientError("params: there is no array to differentiate with respect to")
    for i, x in enumerate(leaves):
        if not is_inexact(x.dtype):
            raise GradientError(
                f"{paths()[i]}: an array of {dtype_name(x)} cannot have a gradient: give it among "
                "the other arguments, or convert it with peft_any.backend.astype"
            )
    xp, name = namespace(*leaves), library_of(leaves[0]).name
    if engine == "auto" and (own := ENGINES.get(name)) is not None:
        return own
    root = xp.root if isinstance(xp, tape.Space) else name or xp.__name__
    return _Tape(tape.space_of(xp, root))


class _Tape(Engine):
    """The tape over a namespace."""

    def __init__(self, space: tape.Space) -> None:
        self.space = space

    def vjp(self, run: Any, leaves: list[Any], *, keep: bool) -> Any:
        outputs, aux, back, _ = tape.record(self.space, run, leaves)
        return outputs, aux, lambda gs: back(gs, keep=keep)


def _call(
    f: Callable[..., Any],
    params: Any,
    rest: tuple[Any, ...],
    engine: EngineName,
    check: Callable[[Any], None],
    *,
    has_aux: bool,
    keep: bool,
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Run f; give its value, its extras, and the way from a cotangent to the gradients."""
    leaves, paths, fill = flatten(params)
    chosen = _engine(leaves, paths, engine)
    shape: list[Callable[..., Any]] = []

    def run(arrays: list[Any]) -> tuple[list[Any], Any]:
        given, space = rest, namespace(arrays[0])
        if isinstance(chosen, _Tape):
            others, _, refill = flatten(rest)
            namespace(*leaves, *others)
            given = refill([space.lift(x) for x in others])
        value, aux = _split(f(fill(arrays), *given), has_aux=has_aux)
        check(value)
        if keep:
            outputs, _, rebuild = flatten(value, "value")
        else:  # a loss, which is one array
            outputs, rebuild = [value], _first
        shape[:] = [rebuild]
        return outputs, None if aux is None else _plain(chosen, space, aux)

    outputs, aux, pull = chosen.vjp(run, leaves, keep=keep)

    def back(cotangent: Any) -> Any:
        if not keep:
            return fill(pull([cotangent]))
        gs, where, _ = flatten(cotangent, "cotangent")
        if len(gs) != len(outputs):
            raise GradientError(
                f"cotangent: {len(gs)} arrays cannot meet {len(outputs)} results: give one of "
                "each result's shape"
            )
        for g, y, path in zip(gs, outputs, where(), strict=True):
            if tuple(g.shape) != tuple(y.shape) or dtype_name(g) != dtype_name(y):
                raise GradientError(
                    f"{path}: {tuple(g.shape)} of {dtype_name(g)} cannot meet a result of "
                    f"{tuple(y.shape)} of {dtype_name(y)}"
                )
        return fill(pull(gs))

    return shape[0](outputs), aux, back


def _first(values: list[Any]) -> Any:
    return values[0]


def _split(value: Any, *, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return value, None
    if not isinstance(value, tuple) or len(value) != 2:
        raise GradientError("has_aux=True: the function must return (loss, aux)")
    return value


def _plain(engine: Engine, space: Any, tree: Any) -> Any:
    """Take extras out of the recording."""
    leaves, _, fill = flatten(tree)
    if isinstance(engine, _Tape):
        return fill([space.lower(x) for x in leaves])
    if engine is ENGINES["torch"]:
        return fill([x.detach() if hasattr(x, "detach") else x for x in leaves])
    return tree


def _scalar(loss: Any) -> None:
    if not is_array(loss):
        raise GradientError(
            f"the loss is a {type(loss).__name__}, not an array: return what the array library "
            "computed, without float()"
        )
    if tuple(loss.shape) or not dtype_name(loss).startswith(("float", "bfloat")):
        raise GradientError(
            f"a loss of shape {tuple(loss.shape)}, {dtype_name(loss)}, cannot be differentiated: "
            "reduce it to one real number with xp.sum or xp.mean, or use peft_any.vjp"
        )


@checked
def value_and_grad(
    f: Callable[..., Any], has_aux: bool = False, *, engine: EngineName = "auto"
) -> Callable[..., tuple[Any, Any]]:
    """Make a function that computes a loss and its gradient.

    The first argument's arrays decide how: JAX's by ``jax.vjp``, torch's by its autograd, those of
    any other library by the tape.

    Parameters
    ----------
    f : callable
        ``f(params, *rest) -> loss``, or ``(loss, aux)``: a real array () and anything else.
        `params` is an array or a nest of dicts, lists and tuples of floating arrays of one library;
        `rest` is not differentiated. Under the tape both are arrays of the recording namespace, so
        write `f` with their namespace's functions, or operators.
    has_aux : bool
        Whether `f` returns something beside the loss.
    engine : {"auto", "tape"}
        ``"tape"`` records arrays of JAX and torch too.

    Returns
    -------
    callable
        ``(params, *rest) -> (loss, grads)``, or ``((loss, aux), grads)``; `grads` has the nest,
        shapes and dtypes of `params`, zeros where the loss does not depend on them.
        Of a complex parameter it is ∂L/∂Re + i·∂L/∂Im: the direction of ascent, as in torch, on
        every library.

    Raises
    ------
    GradientError
        If there are no arrays in `params`, or ones of integers; if the loss is no real scalar; if
        `f` uses a function without a derivative rule, or takes a traced array out of the library.
    BackendError
        If `params` are of several libraries.

    Examples
    --------
    >>> import numpy as np
    >>> loss, grads = value_and_grad(lambda p, x: (p["w"] * x) ** 2)({"w": np.asarray(3.0)}, 2.0)
    >>> float(loss), float(grads["w"])
    (36.0, 24.0)
    """

    def call(params: Any, *rest: Any) -> tuple[Any, Any]:
        loss, aux, back = _call(f, params, rest, engine, _scalar, has_aux=has_aux, keep=False)
        grads = back(namespace(loss).ones_like(loss))
        return ((loss, aux) if has_aux else loss), grads

    return call


@checked
def grad(
    f: Callable[..., Any], has_aux: bool = False, *, engine: EngineName = "auto"
) -> Callable[..., Any]:
    """Make a function that computes the gradient of a loss: `value_and_grad` without the value.

    Returns
    -------
    callable
        ``(params, *rest) -> grads``, or ``(grads, aux)``.

    Raises
    ------
    GradientError, BackendError
        As `value_and_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> grad(lambda w: w * w)(np.asarray(3.0))
    array(6.)
    """
    both = value_and_grad(f, has_aux, engine=engine)

    def call(params: Any, *rest: Any) -> Any:
        value, grads = both(params, *rest)
        return (grads, value[1]) if has_aux else grads

    return call


@checked
def vjp(
    f: Callable[..., Any], params: Any, *rest: Any, engine: EngineName = "auto"
) -> tuple[Any, Callable[[Any], Any]]:
    """Compute a function and the way back: from a cotangent of its value to gradients.

    For what comes after a network in a code that has an adjoint of its own.

    Parameters
    ----------
    f : callable
        ``f(params, *rest)``, whose value is an array or a nest of arrays of any shape.
    params, rest, engine
        As for `value_and_grad`.

    Returns
    -------
    value
        What `f` gave.
    pullback : callable
        From the cotangent, in the value's nest, shapes and dtypes, to the gradients in that of
        `params`. It may be called again, and holds what `f` recorded until it is dropped.

    Raises
    ------
    GradientError, BackendError
        As `value_and_grad`; from the pullback, if the cotangent does not fit the value.

    Examples
    --------
    >>> import numpy as np
    >>> y, pullback = vjp(lambda w: w * w, np.asarray([1.0, 2.0]))
    >>> pullback(np.asarray([1.0, 10.0]))
    array([ 2., 40.])
    """
    value, _, back = _call(f, params, rest, engine, _some, has_aux=False, keep=True)
    return value, back


def _some(value: Any) -> None:
    leaves, paths, _ = flatten(value, "value")
    if not leaves:
        raise GradientError(f"the value is a {type(value).__name__}, without an array in it")
    for x, path in zip(leaves, paths(), strict=True):
        if not is_inexact(x.dtype):
            raise GradientError(f"{path}: an array of {dtype_name(x)} has no cotangent")
