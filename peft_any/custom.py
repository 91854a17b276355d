"""Steps with a way back of their own: a derivative given by hand, or computed anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from peft_any._engines import ENGINES
from peft_any.arguments import checked
from peft_any.autodiff import flatten
from peft_any.backend import backend_of, dtype_name, namespace
from peft_any.errors import GradientError
from peft_any.tape import space as tape


@checked
def custom_vjp(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function whose derivative is given: one definition for all engines.

    It becomes a ``torch.autograd.Function``, a ``jax.custom_vjp`` or one step of the tape.

    Parameters
    ----------
    forward : callable
        ``forward(*args) -> (out, saved)``: an array or a tuple of arrays, and a nest of arrays for
        `backward`. Its arguments are plain arrays, nests of them, or anything else.
    backward : callable
        ``backward(saved, g) -> cotangents``: a tuple with one for every argument, None where it
        has none; `g` is as `out`. With complex arrays, in torch's convention.

    Returns
    -------
    callable
        ``(*args) -> out``.

    Raises
    ------
    GradientError
        From the sweep, if `backward` gives not one cotangent for every argument.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.autodiff import grad
    >>> softly = custom_vjp(lambda x: (abs(x), x), lambda x, g: (g * x / (1 + abs(x)),))
    >>> grad(softly)(np.asarray(1.0))
    array(0.5)
    """

    @wraps(forward)
    def call(*args: Any) -> Any:
        leaves, _, fill = flatten(args, "args")
        sizes = [len(flatten(a)[0]) for a in args]

        def run(*arrays: Any) -> Any:
            return forward(*fill(list(arrays)))

        def back(saved: Any, g: Any) -> list[Any]:
            found = backward(saved, g)
            if not isinstance(found, tuple | list) or len(found) != len(args):
                raise GradientError(
                    f"custom_vjp: backward must give a tuple of {len(args)} cotangents, one for "
                    "every argument (None where there is none)"
                )
            parts: list[Any] = []
            for h, n in zip(found, sizes, strict=True):
                parts += [None] * n if h is None else flatten(h)[0]
            return parts

        if not leaves:
            return forward(*args)[0]
        xp = namespace(*leaves)
        if isinstance(xp, tape.Space):
            return tape.custom(xp, run, back, leaves)
        engine = ENGINES.get(backend_of(leaves[0]).name)
        return run(*leaves)[0] if engine is None else engine.custom(run, back, leaves)

    return call


@checked
def remat(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that keeps only its arguments for the gradient, and is computed again then.

    For a block of a deep network: memory for one block's inside instead of all blocks'.

    Parameters
    ----------
    f : callable
        From arrays, and nests of them, to an array or a nest of arrays. It must give the same when
        called again, and read no traced array but its arguments.

    Returns
    -------
    callable
        As `f`.

    Raises
    ------
    GradientError
        If `f` reads a traced array that is not among its arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from peft_any.autodiff import grad
    >>> grad(lambda x: remat(lambda y: y * y * y)(x))(np.asarray(2.0))
    array(12.)
    """

    @wraps(f)
    def call(*args: Any) -> Any:
        leaves, _, fill = flatten(args, "args")
        nest: list[Callable[..., Any]] = []

        def run(*arrays: Any) -> tuple[Any, ...]:
            outputs, _, rebuild = flatten(f(*fill(list(arrays))), "value")
            nest[:] = [rebuild]
            return tuple(outputs)

        if not leaves:
            return f(*args)
        xp = namespace(*leaves)
        if isinstance(xp, tape.Space):
            outputs = tape.custom(xp, *_again(xp, run), leaves)
        else:
            engine = ENGINES.get(backend_of(leaves[0]).name)
            outputs = run(*leaves) if engine is None else engine.remat(run, leaves)
        return nest[0](list(outputs))

    return call


def _again(
    space: tape.Space, run: Callable[..., tuple[Any, ...]]
) -> tuple[Callable[..., Any], Callable[..., list[Any]]]:
    """Give the forward that records nothing, and the backward that records and sweeps."""

    def forward(*values: Any) -> tuple[Any, Any]:
        outputs = run(*map(space.lift, values))
        for y in outputs:
            if getattr(space.lift(y), "node", None) is not None:
                raise GradientError(
                    "remat: the function reads a traced array from around it: give it as an "
                    "argument"
                )
        return tuple(space.lower(y) for y in outputs), values

    def backward(values: Sequence[Any], gs: Any) -> list[Any]:
        moving = [i for i, x in enumerate(values) if dtype_name(x)[:2] in ("fl", "bf", "co")]

        def part(arrays: list[Any]) -> tuple[list[Any], None]:
            whole = [space.lift(x) for x in values]
            for i, x in zip(moving, arrays, strict=True):
                whole[i] = x
            return list(run(*whole)), None

        _, _, back, _ = tape.record(space, part, [values[i] for i in moving])
        found: list[Any] = [None] * len(values)
        for i, g in zip(moving, back(gs, keep=False), strict=True):
            found[i] = g
        return found

    return forward, backward
