"""Law 5: gradients of every row agree on all engines, and with finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from peft_any.backend import namespace
from peft_any.layer import Dense
from peft_any.methods import lora
from tests.cases import CASES, Case
from tests.gradients import ENGINES, difference, finite_differences, gradients, like
from tests.test_laws import inputs

table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ways = pytest.mark.parametrize("way", ["forward", "merge"])


class Problem:
    """A loss of a row's trained parameters; all else is frozen and comes as other arguments."""

    def __init__(self, case: Case, way: str) -> None:
        self.case, self.way = case, way
        self.config, base = case.config.at(case.site), case.base(dtype="float64")
        p = case.params(base, dtype="float64")
        names = set(self.config.shapes(case.site)) - self.config.frozen
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


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold what a method detaches at the values of its first computation."""
    held: list[Any] = []

    def hold(x: Any) -> Any:
        held.append(x)
        return held[0]

    monkeypatch.setattr(lora, "detach", hold)
    yield


@table
@ways
def test_gradients_are_finite_differences(case: Case, way: str, constants: None) -> None:
    problem = Problem(case, way)
    numeric = finite_differences(problem.loss, problem.trained, *problem.rest)
    _, grads = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    assert difference(grads, numeric) < 1e-6


@table
@ways
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_gradients_agree_on_every_engine(case: Case, way: str, engine: str) -> None:
    problem = Problem(case, way)
    value, want = gradients("numpy", problem.loss, problem.trained, *problem.rest)
    loss, got = gradients(engine, problem.loss, problem.trained, *problem.rest)
    assert abs(loss - value) <= 1e-12 * max(abs(value), 1.0)
    assert difference(got, want) < 1e-12
    assert any(np.any(g != 0) for g in got.values())
