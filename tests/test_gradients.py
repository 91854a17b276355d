"""Law 5: gradients of every row agree on all engines, and with finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from peft_any import blocks, mixtures, variants
from peft_any.backend import namespace
from peft_any.layer import Dense
from peft_any.methods import osf
from peft_any.tape import var
from tests.cases import CASES, Case
from tests.gradients import ENGINES, difference, gradients, like
from tests.test_laws import inputs

table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ways = pytest.mark.parametrize("way", ["forward", "merge"])


class Problem:
    """A loss of a row's trained parameters; all else is frozen and comes as other arguments."""

    def __init__(self, case: Case, way: str) -> None:
        self.case, self.way = case, way
        self.config, base = case.config.at(case.site), case.base(dtype="float64")
        p = case.params(base, dtype="float64")
        shared = self.config.shared_shapes([case.site])
        names = {*self.config.shapes(case.site), *shared} - self.config.frozen
        self.trained = {k: v for k, v in p.items() if k in names}
        frozen = {k: v for k, v in p.items() if k not in names}
        x = inputs(case, (2, 3), "float64", 0)
        self.rest = frozen, x, base.weight, base.bias

    def loss(self, trained: Any, frozen: Any, x: Any, weight: Any, bias: Any) -> Any:
        layer, p = Dense(weight, bias, self.case.site), {**frozen, **trained}
        if self.way == "forward":
            parts = [self.config.forward(p, x, layer)]
        else:
            merged = self.config.merge(p, layer)
            parts = [merged.weight] if bias is None else [merged.weight, merged.bias]
        xp = namespace(*parts)
        total = 0.0
        for y in parts:
            n = np.arange(np.prod(y.shape, dtype=int))
            total = total + xp.sum(y * y * like(np.cos(1.0 + n).reshape(y.shape), y))
        return total


class Constants:
    """Stands in for `detach`: what one computation detaches is what all the later ones get."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.next: Iterator[Any] | None = None

    def __call__(self, x: Any) -> Any:
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


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> Constants:
    """Hold what a method detaches at the values of its first computation."""
    found = Constants()
    for module in (blocks, mixtures, osf, variants):
        monkeypatch.setattr(module, "detach", found)
    return found


def slope(problem: Problem, along: dict[str, np.ndarray], h: float = 1e-4) -> float:
    """Differentiate along a direction by central differences of fourth order."""

    def at(t: float) -> float:
        p = {k: v + t * along[k] for k, v in problem.trained.items()}
        return float(problem.loss(p, *problem.rest))

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


@table
@ways
def test_gradients_are_finite_differences(case: Case, way: str, constants: Constants) -> None:
    problem, rng = Problem(case, way), np.random.default_rng(1)
    constants.watch(lambda: problem.loss(problem.trained, *problem.rest))
    _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    for _ in range(3):
        along = {k: rng.standard_normal(v.shape) for k, v in problem.trained.items()}
        numeric = slope(problem, along)
        slant = sum(float(np.sum(grads[k] * d)) for k, d in along.items())
        size = sum(float(np.sum(np.abs(grads[k] * d))) for k, d in along.items())
        assert abs(slant - numeric) <= 1e-6 * max(size, 1.0)


@table
@ways
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(case: Case, way: str, engine: str) -> None:
    problem = Problem(case, way)
    value, want = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    loss, got = gradients(engine, problem.loss, problem.trained, *problem.rest)
    assert abs(loss - value) <= 1e-12 * max(abs(value), 1.0)
    assert difference(got, want) < 1e-12


def test_the_gradient_of_dora_takes_its_norm_as_constant() -> None:
    case = next(c for c in CASES if c.name == "dora")
    problem = Problem(case, "merge")
    _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    _, other = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    assert difference(grads, other) == 0
    along = {k: grads[k] * (k == "lora_A.weight") for k in grads}
    steep = sum(float(np.sum(g * g)) for g in along.values())
    assert abs(slope(problem, along) - steep) > 1e-3 * abs(steep)  # of the norm, too


def test_frozen_arrays_get_no_gradient_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "vera")
    problem, shapes = Problem(case, "forward"), []
    settle = var.settle

    def watch(xp: Any, g: Any, shape: Any, dtype: Any) -> Any:
        shapes.append(tuple(shape))
        return settle(xp, g, shape, dtype)

    monkeypatch.setattr(var, "settle", watch)
    _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    assert set(grads) == {"vera_lambda_b", "vera_lambda_d"}
    frozen, _, weight, _ = problem.rest
    large = {a.shape for a in (*frozen.values(), weight)}
    assert shapes
    assert not large & set(shapes)
