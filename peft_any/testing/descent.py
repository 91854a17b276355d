"""The law of gradients: finite differences, and every engine, agree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import cycle
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import numpy as np

from peft_any.backend import detach, namespace
from peft_any.layer import Dense
from peft_any.testing.case import Case
from peft_any.testing.gradients import difference, gradients, like

Way = Literal["forward", "merge"]
_OWNERS = {"peft_any", "peft_any.backend", "peft_any._arrays", "peft_any.tape.var", __name__}
Outputs = Callable[..., list[Any]]
_STEPS = 1e-4, 1e-6
"""Steps of finite differences: a kink, as max(·, 0) has one, lies rarely within the second."""


class Problem:
    """A loss of trained parameters; all else is frozen and comes as other arguments.

    Attributes
    ----------
    where, what : str
        What errors begin with, and the function that is differentiated.
    outputs : callable (trained, *rest) -> list of arrays
    trained : dict of arrays
    rest : tuple
        Arrays, dicts of them, and None.
    idle : collection of str, optional
        What has no gradient; where None, that is not looked at.
    """

    idle: Collection[str] | None = None

    def __init__(
        self, where: str, what: str, outputs: Outputs, trained: dict[str, Any], *rest: Any
    ) -> None:
        self.where, self.what, self.outputs = where, what, outputs
        self.trained, self.rest = trained, rest

    def loss(self, trained: Any, *rest: Any) -> Any:
        """Weigh the squares of the outputs with fixed numbers."""
        parts = self.outputs(trained, *rest)
        xp = namespace(*parts)
        total = 0.0
        for y in parts:
            n = np.arange(np.prod(y.shape, dtype=int))
            total = total + xp.sum(y * y * like(np.cos(1.0 + n).reshape(y.shape), y))
        return total

    def slope(self, along: dict[str, Any], h: float = _STEPS[0]) -> float:
        """Differentiate along a direction by central differences of fourth order."""

        def at(t: float) -> float:
            p = {k: v + t * along[k] if k in along else v for k, v in self.trained.items()}
            return float(self.loss(p, *self.rest))

        return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def of_layer(case: Case, way: Way) -> Problem:
    """Pose the problem of a case's output, or of its merged layer."""
    config, base = case.resolved, case.base(dtype="float64")
    p = case.params(base, dtype="float64")
    every = [*config.shapes(case.site), *config.shared_shapes([case.site])]
    names = {name for name in every if not config.is_frozen(name)}
    trained = {k: v for k, v in p.items() if k in names}
    arrays = {k: v for k, v in case.routing.items() if isinstance(v, np.ndarray)}
    frozen = {k: v for k, v in p.items() if k not in names} | arrays

    def outputs(trained: Any, frozen: Any, x: Any, weight: Any, bias: Any) -> list[Any]:
        layer, p = Dense(weight, bias, case.site), {**case.routing, **frozen, **trained}
        if way == "forward":
            return [config.forward(p, x, layer)]
        merged = config.merge(p, layer)
        return [merged.weight] if bias is None else [merged.weight, merged.bias]

    x = case.inputs(dtype="float64")
    made = Problem(case.where, way, outputs, trained, frozen, x, base.weight, base.bias)
    made.idle = case.idle if way == "forward" else None
    return made


class Constants:
    """Stands in for `detach`: what one computation detaches is what all the later ones get."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.next: Iterator[Any] | None = None

    def __call__(self, x: Any) -> Any:
        """Hold an array, or give the one that is held in its place."""
        if self.next is None:
            self.held.append(x)
            return x
        constant = next(self.next)
        return x.space.wrap(constant) if hasattr(x, "space") else constant

    def watch(self, compute: Callable[[], object]) -> None:
        """Compute; from now on give what this has detached, in turn."""
        self.held.clear()
        compute()
        self.next = cycle(self.held)


@contextmanager
def constants() -> Iterator[Constants]:
    """Hold what methods detach at the values of the first computation that is watched."""
    found, changed = Constants(), list[tuple[ModuleType, Any]]()
    for name, module in [*sys.modules.items()]:
        if name not in _OWNERS and vars(module).get("detach") is detach:
            changed.append((module, patch.object(module, "detach", found)))
    for _, one in changed:
        one.start()
    try:
        yield found
    finally:
        for _, one in changed:
            one.stop()


def differences(problem: Problem) -> None:
    """Check gradients, as the tape computes them, against finite differences.

    What the method detaches counts as constant.
    """
    rng = np.random.default_rng(1)
    if not problem.trained:
        return
    with constants() as held:
        held.watch(lambda: problem.loss(problem.trained, *problem.rest))
        _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)

        def agree(names: Any) -> bool:
            along = {k: rng.standard_normal(problem.trained[k].shape) for k in names}
            slant = sum(float(np.sum(grads[k] * d)) for k, d in along.items())
            size = sum(float(np.sum(np.abs(grads[k] * d))) for k, d in along.items())
            off = min(abs(slant - problem.slope(along, h)) for h in _STEPS)
            return off <= 1e-6 * max(size, 1.0)

        if all(agree(problem.trained) for _ in range(3)):
            _refuse_idle(problem, grads)
            return
        wrong = [k for k in problem.trained if not agree([k])]
    raise AssertionError(
        f"{problem.where}: {problem.what} has a wrong gradient by "
        f"{', '.join(wrong or problem.trained)}: it is not what finite differences give; look for "
        "a custom_vjp, and for what is rounded or chosen"
    )


def _refuse_idle(problem: Problem, grads: dict[str, Any]) -> None:
    if problem.idle is None:
        return
    still = [k for k, g in grads.items() if g.size and not np.any(g) and k not in problem.idle]
    if still:
        raise AssertionError(
            f"{problem.where}: {problem.what} has no gradient by {', '.join(still)}: training "
            "would leave them as they are; do not detach them, or name them in `frozen`; where "
            "the numbers of the configuration leave no other choice, say so with idle="
        )


def engines(problem: Problem, engine: str) -> None:
    """Check that an engine gives the gradients of the tape on NumPy.

    Raises
    ------
    unittest.SkipTest
        If its library is not installed.
    """
    if not problem.trained:
        return
    value, want = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    loss, got = gradients(engine, problem.loss, problem.trained, *problem.rest)
    where, way = f"{problem.where}: {engine}: the", problem.what
    if abs(loss - value) > 1e-12 * max(abs(value), 1.0):
        raise AssertionError(f"{where} loss of {way} is {loss}, not {value}")
    off = difference(got, want)
    if not off < 1e-12:
        wrong = [k for k in want if not difference(got[k], want[k]) < 1e-12]
        raise AssertionError(
            f"{where} gradient of {way} by {', '.join(wrong)} is not the tape's on NumPy: they are "
            f"{off:.2g} of the largest entry apart"
        )
